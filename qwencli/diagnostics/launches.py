"""What the kernels of a decode step cost beside reading the weights."""

from __future__ import annotations

# Native engine, plain torch in one CUDA graph, NVIDIA H200, qwen3-vl-4b, 36 layers, sdpa
# (results/2026-11-23-h200-native-first-look/probe.log): kernels of a step, and its time. Reading
# its weights and keys takes 1.9 ms of that at 4.36 TB/s; the rest is shared among the kernels.
_KERNELS, _LAYERS = 694.4, 36
_STEP_MS, _READ_MS = 4.602, 1.89


def launches_per_token(layers: int) -> float:
    return _KERNELS / _LAYERS * layers


def kernel_ms_per_token(layers: int) -> float:
    """Time of a step beyond reading, in ms: gaps, small kernels, products below full speed."""
    return (_STEP_MS - _READ_MS) / _LAYERS * layers
