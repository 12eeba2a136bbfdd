"""What each model family implies without saying so in its config.json: one table row a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwencli.engine.native.shapes import Activation, Norm


@dataclass(frozen=True)
class Family:
    """What a model_type implies without saying so in its config.json."""

    qk_norm: bool
    rope_theta: float
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    head_dim_key: bool = True
    qkv_bias: bool | None = (
        None  # None: the config's own attention_bias, which then covers o_proj too
    )
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    vision: str | None = None
    split_video_frames: bool = False


FAMILIES: Mapping[str, Family] = {
    "qwen3_vl": Family(
        qk_norm=True,
        rope_theta=500_000.0,
        default_head_dim=128,
        sections=(24, 20, 20),
        interleaved=True,
        vision="qwen3_vl",
        split_video_frames=True,
    ),
    "qwen2_5_vl": Family(
        qk_norm=False,
        rope_theta=1_000_000.0,
        head_dim_key=False,
        qkv_bias=True,
        sections=(16, 24, 24),
        vision="qwen2_5_vl",
    ),
    "qwen2_vl": Family(
        qk_norm=False,
        rope_theta=1_000_000.0,
        head_dim_key=False,
        qkv_bias=True,
        sections=(16, 24, 24),
        vision="qwen2_vl",
    ),
    "qwen3": Family(qk_norm=True, rope_theta=10_000.0, default_head_dim=128),
    "qwen2": Family(qk_norm=False, rope_theta=10_000.0, qkv_bias=True),
}


@dataclass(frozen=True)
class VisionFamily:
    """What a vision tower implies without saying so in its config.json."""

    width_key: str
    out_key: str
    norm: Norm
    default_activation: str
    gated_mlp: bool = False
    patch_bias: bool = False
    learned_positions: bool = False
    windows: bool = False


VISION_FAMILIES: Mapping[str, VisionFamily] = {
    "qwen3_vl": VisionFamily(
        "hidden_size",
        "out_hidden_size",
        "layer",
        "gelu_pytorch_tanh",
        patch_bias=True,
        learned_positions=True,
    ),
    "qwen2_5_vl": VisionFamily(
        "hidden_size", "out_hidden_size", "rms", "silu", gated_mlp=True, windows=True
    ),
    "qwen2_vl": VisionFamily("embed_dim", "hidden_size", "layer", "quick_gelu"),
}

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "quick_gelu": "quick_gelu",
}
