"""What a decode step of a model costs: its bytes, its sizes, its kernels. For probes and advice."""

from __future__ import annotations

from dataclasses import replace

from qwencli.config import Quantization
from qwencli.engine.instruments.probes.answers import Bandwidth, Work
from qwencli.models.memory import GPU_VALUE_BYTES, native_weight_bytes
from qwencli.models.shapes import ModelShape

# Native engine, plain torch in one CUDA graph, NVIDIA H200, qwen3-vl-4b, 36 layers, sdpa
# (results/2026-11-23-h200-native-first-look/probe.log): kernels of a step, and its time. Reading
# its weights and keys takes 1.9 ms of that at 4.36 TB/s; the rest is shared among the kernels.
_OPERATORS, _LAYERS = 694.4, 36
_STEP_MS, _READ_MS = 4.602, 1.89
# What a token reads comes so much faster than memory: beyond the noise of two measurements.
_CACHED_RATIO = 1.2


def operators_per_token(layers: int) -> float:
    """Kernels of a step in plain torch operators: what the host launches without a graph."""
    return _OPERATORS / _LAYERS * layers


def operators_ms_per_token(layers: int) -> float:
    """Time of such a step beyond reading, as part of a graph: gaps, small kernels, products below
    full speed. Of one GPU; an estimate for any other."""
    return (_STEP_MS - _READ_MS) / _LAYERS * layers


def fused_kernels_per_token(layers: int) -> int:
    """Kernels of a step of `qwencli.engine.kernels`: five a layer, the head, the choice."""
    return 5 * layers + 2


def work_of(shape: ModelShape) -> Work:
    text, tower = shape.text, shape.vision
    return Work(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_layers,
        heads=text.num_heads,
        kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        decoder_bytes=token_bytes(shape),
        vision_heads=tower.num_heads if tower else None,
        vision_head_dim=tower.head_dim if tower else None,
        vision_hidden=tower.hidden_size if tower else None,
        patch_size=tower.patch_size if tower else None,
        temporal_patch_size=tower.temporal_patch_size if tower else None,
        in_channels=tower.in_channels if tower else None,
    )


def token_bytes(
    shape: ModelShape,
    quantization: Quantization = Quantization.NONE,
    value_bytes: int = GPU_VALUE_BYTES,
) -> int:
    """Bytes of weights that one decode step of the native engine reads: the decoder and the head.

    Of the embedding a step reads one row, unless the head is tied to it and reads all of it; a
    quantized head is a copy of its own.

    Args:
        value_bytes: of a value that is not quantized.
    """
    text = shape.text
    read = text.tied_head and quantization is Quantization.NONE
    unread = 0 if read else value_bytes * text.vocab_size * text.hidden_size
    moe = text.moe
    if moe is not None:
        # As if there were no experts but those that a token takes.
        taken = replace(moe, num_experts=moe.top_k)
        shape = replace(shape, text=replace(text, moe=taken))
    return native_weight_bytes(replace(shape, vision=None), quantization, value_bytes) - unread


def token_is_cached(found: Bandwidth) -> bool:
    """Whether what a token reads is small enough to stay in a cache, as its rate tells."""
    return (found.token_bytes_per_s or 0.0) > _CACHED_RATIO * found.read_bytes_per_s


def image_tokens(shape: ModelShape, pixels: int) -> int:
    """Tokens of a picture of so many pixels; 0 for a model that does not see."""
    if shape.vision is None:
        return 0
    return -(-pixels // (shape.vision.patch_size * shape.vision.merge_size) ** 2)
