"""Whether Triton can compile a kernel for this device and run it."""

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl

from qwencli.engine.instruments.probes.answers import TritonRun, Work

BLOCK = 128


@triton.jit  # type: ignore[untyped-decorator]
def _add_one(numbers, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = numbers + tl.arange(0, BLOCK)
    tl.store(places, tl.load(places) + 1)


def triton_run(device: str, work: Work) -> TritonRun:
    """Compile and run one small kernel.

    Raises:
        RuntimeError: it ran and the result is wrong; or what Triton raises where it cannot compile.
    """
    start = time.perf_counter()
    numbers = torch.zeros(BLOCK, device=device)
    _add_one[(1,)](numbers, BLOCK=BLOCK)
    if float(numbers.sum()) != BLOCK:
        raise RuntimeError("the compiled kernel computes wrongly")
    return TritonRun(str(triton.__version__), time.perf_counter() - start)
