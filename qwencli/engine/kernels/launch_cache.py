"""Launches that are repeated without asking Triton again what was compiled for them.

A launch from Python asks for type, alignment and divisibility of every argument and looks up what
belongs to them, which takes the host longer than many kernels run. In a CUDA graph that happens
once; the kernels of prompts are launched each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Takes the arguments that are not constants.
CachedLaunch = Callable[..., None]


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    num_warps: int,
) -> CachedLaunch | None:
    """Launch as `kernel[grid]` does. Returns what launches the same again; None where nothing is
    compiled, as in Triton's interpreter.

    What is returned may be given other tensors of the same types, on the same device and equally
    aligned, which all are that torch allocates; everything else has to stay.

    Args:
        constants: the `tl.constexpr`, in the order of the signature, where they come last.
    """
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps)
    if compiled is None:
        return None
    run, values = compiled[grid], tuple(constants.values())
    return lambda *changed: run(*changed, *values)
