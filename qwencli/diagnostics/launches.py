"""What the kernels of a decode step cost beside reading the weights."""

from __future__ import annotations

# Native engine, plain torch in one CUDA graph, NVIDIA H200, qwen3-vl-4b, 36 layers, sdpa
# (results/2026-11-23-h200-native-first-look/probe.log): kernels of a step, and its time. Reading
# its weights and keys takes 1.9 ms of that at 4.36 TB/s; the rest is shared among the kernels.
_OPERATORS, _LAYERS = 694.4, 36
_STEP_MS, _READ_MS = 4.602, 1.89


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
