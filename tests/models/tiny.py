"""Tiny model folders in the hub's file layout, built without torch."""

from __future__ import annotations

import json
from math import prod

from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import expected_tensors

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 40,
}
TOKENS = {
    "image_token_id": 30,
    "video_token_id": 31,
    "vision_start_token_id": 32,
    "vision_end_token_id": 33,
}
CONFIGS = {
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "rope_scaling": {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        **TOKENS,
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 2,
            "hidden_size": 8,
            "num_heads": 2,
            "intermediate_size": 12,
            "out_hidden_size": 16,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        **TEXT,
        **TOKENS,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 2,
            "hidden_size": 8,
            "num_heads": 2,
            "intermediate_size": 12,
            "out_hidden_size": 16,
            "patch_size": 4,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3": {"model_type": "qwen3", **TEXT, "head_dim": 8, "tie_word_embeddings": False},
}


def pack_safetensors(tensors):
    """Bytes of a bfloat16 safetensors file of zeros: name -> shape."""
    header, position = {}, 0
    for name, shape in tensors.items():
        size = prod(shape) * 2
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(position)


def write_model(folder, family="qwen3_vl", config=None, tensors=None):
    """A complete model folder of zeros; returns it."""
    config = CONFIGS[family] if config is None else config
    tensors = expected_tensors(read_shape(CONFIGS[family])) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(pack_safetensors(tensors))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder
