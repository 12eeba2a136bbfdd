"""Small random checkpoints of every family, in the hub's file layout, loadable by transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from qwencli.config import EngineConfig, ModelSource, ModelSpec
from qwencli.messages import ImagePart, VideoPart
from tests.engine.frontend.tiny_folder import CONTROL, tiny_tokenizer, write_tiny_folder

# More rows than the tokenizer has words, as published models have.
VOCAB_SIZE = 432

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
VISION = {"hidden_size": 32, "num_heads": 2, "depth": 2, "intermediate_size": 48, "in_channels": 3}
SECTIONED = {"type": "mrope", "mrope_section": [4, 2, 2]}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "text_config": {
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "model_type": "qwen3_5_text",
            "full_attention_interval": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {
            **VISION,
            "model_type": "qwen3_5",
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "hidden_act": "gelu_pytorch_tanh",
        },
        "tie_word_embeddings": True,
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "model_type": "qwen3_vl_text",
            "rope_theta": 1e6,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            **VISION,
            "model_type": "qwen3_vl",
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "hidden_act": "gelu_pytorch_tanh",
        },
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl": {
        **TEXT,
        "rope_theta": 1e6,
        "rope_scaling": SECTIONED,
        "vision_config": {
            **VISION,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
        "tie_word_embeddings": True,
    },
    "qwen2_vl": {
        **TEXT,
        "rope_theta": 1e6,
        "rope_scaling": SECTIONED,
        "vision_config": {
            "embed_dim": 32,
            "num_heads": 2,
            "depth": 2,
            "mlp_ratio": 2,
            "hidden_size": 64,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "hidden_act": "quick_gelu",
        },
        "tie_word_embeddings": False,
    },
    "qwen3": {**TEXT, "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": False},
    "qwen2": {**TEXT, "rope_theta": 1e6, "tie_word_embeddings": True},
}
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
# Those that `CONFIGS` has not, as most tests of families run requests alone.
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**CONFIGS["qwen3"], **EXPERTS},
    "qwen3_5_moe": {
        **CONFIGS["qwen3_5"],
        "text_config": {
            **CONFIGS["qwen3_5"]["text_config"],
            **{key: EXPERTS[key] for key in ("num_experts", "num_experts_per_tok")},
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
            "model_type": "qwen3_5_moe_text",
        },
        "vision_config": {**CONFIGS["qwen3_5"]["vision_config"], "model_type": "qwen3_5_moe"},
        "tie_word_embeddings": False,
    },
    "qwen3_vl_moe": {
        **CONFIGS["qwen3_vl"],
        "text_config": {
            **CONFIGS["qwen3_vl"]["text_config"],
            **EXPERTS,
            "model_type": "qwen3_vl_moe_text",
        },
        "vision_config": {**CONFIGS["qwen3_vl"]["vision_config"], "model_type": "qwen3_vl_moe"},
    },
}
VISION_FAMILIES = [family for family, config in CONFIGS.items() if "vision_config" in config]
# Those that run alone too, in a cache of their own; others are rows over pages in any case.
ALONE = [family for family in CONFIGS if family != "qwen3_5"]


def _config_of(family: str) -> dict[str, Any]:
    return CONFIGS[family] if family in CONFIGS else MIXTURES[family]


def hub_config(family: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config.json of the family, its token ids those of `tiny_folder`.

    `overrides` change the text model's part.
    """
    ids = {token: tiny_tokenizer().token_to_id(token) for token in CONTROL}
    config = {
        **copy.deepcopy(_config_of(family)),
        "model_type": family,
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "dtype": "bfloat16",
    }
    if "vision_config" in config:
        config |= {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
    target = config.get("text_config", config)
    target |= {"vocab_size": VOCAB_SIZE, **(overrides or {})}
    return config


def write_checkpoint(
    folder: Path, family: str, *, seed: int = 0, overrides: Mapping[str, Any] | None = None
) -> Path:
    """A complete folder with random bfloat16 weights, large enough to give varied text."""
    import torch
    import transformers

    from qwencli.engine.hf.load_model import FAMILIES, build_config

    # Its progress bar would end up in what the tests read as the program's own output.
    transformers.logging.disable_progress_bar()
    folder.mkdir(parents=True)
    config = build_config(hub_config(family, overrides))
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[family].model_class)(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hub_config(family, overrides)), encoding="utf-8")
    write_tiny_folder(folder)
    if "vision_config" in _config_of(family):
        patch_size = _config_of(family)["vision_config"]["patch_size"]
        processor = {
            "patch_size": patch_size,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": (2 * patch_size) ** 2, "longest_edge": 65536},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    stop = [tiny_tokenizer().token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "eos_token_id": stop, "pad_token_id": stop[1]}),
        encoding="utf-8",
    )
    return folder


def engine_config(folder: Path, **settings: Any) -> EngineConfig:
    spec = ModelSpec("tiny", ModelSource.LOCAL, path=folder)
    return EngineConfig(spec, **{"device": "cpu", **settings})


def picture(width: int = 64, height: int = 64, name: str = "picture.png") -> ImagePart:
    """A small picture with content, so that a model that looks at it can tell it from another."""
    image = Image.radial_gradient("L").resize((width, height)).convert("RGB")
    return ImagePart(image, name)


def film(count: int = 5, width: int = 64, height: int = 64) -> VideoPart:
    """A small video whose picture turns.

    A frame a second: transformers 5.17 rounds the seconds of a pair of frames down to whole ones.
    """
    still = picture(width, height).image
    frames = tuple(still.rotate(20 * index) for index in range(count))
    return VideoPart(frames, tuple(map(float, range(count))), float(count), "film.gif")
