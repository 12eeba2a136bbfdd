"""Writes a trained model as a hub-layout folder: configuration, processor, weights in bf16.

python -m tools.scenes.export OUT/model.safetensors qwencli/bundled/scenes
python -m tools.scenes.export OUT/model.safetensors FOLDER --model hybrid
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.scenes.grid import MAX_PIXELS, MERGE, MIN_PIXELS, PATCH
from tools.scenes.hybrid import TAPS, HybridShape
from tools.scenes.model import ModelShape
from tools.scenes.tokenizer import MAX_LENGTH

TOKENIZER = Path(__file__).parents[2] / "qwencli" / "bundled" / "scenes"
SHAPES = {"scenes": ModelShape, "hybrid": HybridShape}


def model_config(shape: ModelShape, tokenizer: Tokenizer) -> dict[str, object]:
    token = tokenizer.token_to_id
    hybrid = isinstance(shape, HybridShape)
    family = "qwen3_5" if hybrid else "qwen3_vl"
    rope: dict[str, object] = {
        "mrope_interleaved": True,
        "mrope_section": list(shape.mrope_section),
        "rope_type": "default",
    }
    return {
        "architectures": [f"Qwen3{'_5' if hybrid else 'VL'}ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_id": token("<|image_pad|>"),
        "model_type": family,
        "pad_token_id": token("<|endoftext|>"),
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": token("<|endoftext|>"),
            "dtype": "bfloat16",
            "eos_token_id": token("<|im_end|>"),
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": 0.02,
            "intermediate_size": shape.intermediate,
            "max_position_embeddings": MAX_LENGTH,
            "model_type": f"{family}_text",
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "pad_token_id": token("<|endoftext|>"),
            "rms_norm_eps": 1e-06,
            **(
                _hybrid_config(shape, rope)
                if isinstance(shape, HybridShape)
                else {"rope_scaling": rope, "rope_theta": shape.rope_theta}
            ),
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": shape.vocab,
        },
        "tie_word_embeddings": True,
        "video_token_id": token("<|video_pad|>"),
        "vision_config": {
            "deepstack_visual_indexes": list(shape.deepstack),
            "depth": shape.vision_depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": shape.vision_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": shape.vision_intermediate,
            "model_type": family,
            "num_heads": shape.vision_heads,
            "num_position_embeddings": shape.position_side**2,
            "out_hidden_size": shape.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_start_token_id": token("<|vision_start|>"),
    }


def _hybrid_config(shape: HybridShape, rope: dict[str, object]) -> dict[str, object]:
    return {
        "attn_output_gate": True,
        "full_attention_interval": shape.interval,
        "layer_types": shape.layer_types,
        "linear_conv_kernel_dim": TAPS,
        "linear_key_head_dim": shape.delta_dim,
        "linear_num_key_heads": shape.k_heads,
        "linear_num_value_heads": shape.v_heads,
        "linear_value_head_dim": shape.delta_dim,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "rope_parameters": rope
        | {"rope_theta": shape.rope_theta, "partial_rotary_factor": shape.rotated},
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, object]:
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return {
        "bos_token_id": pad,
        "do_sample": False,
        "eos_token_id": [end, pad],
        "max_new_tokens": 128,
        "pad_token_id": pad,
    }


def processor_config(kind: str) -> dict[str, object]:
    return {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": MERGE,
        "patch_size": PATCH,
        "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": MAX_PIXELS, "shortest_edge": MIN_PIXELS},
        "temporal_patch_size": 2,
        **(
            {"image_processor_type": "Qwen2VLImageProcessorFast"}
            if kind == "image"
            else {"video_processor_type": "Qwen3VLVideoProcessor"}
        ),
    }


def export(state: dict[str, Tensor], shape: ModelShape, folder: Path) -> None:
    """The tokenizer's files come from the bundled model. Raises OSError where it cannot write."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if folder.resolve() != TOKENIZER:
            shutil.copyfile(TOKENIZER / name, folder / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = {
        "config.json": model_config(shape, tokenizer),
        "generation_config.json": generation_config(tokenizer),
        "preprocessor_config.json": processor_config("image"),
        "video_preprocessor_config.json": processor_config("video"),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = {
        name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="scenes")
    options = parser.parse_args()
    export(load_file(options.weights), SHAPES[options.model](), options.folder)
