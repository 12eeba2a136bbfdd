"""Launches kernels of prompts for a GPU that is not there, first and again, and compares.

A program of its own, because Triton decides when it is imported whether it interprets. What a
launch hands to the driver the second time has to be what it would hand over if Triton looked the
kernel up again: the same compiled function, grid and arguments, but for the tensor that is new.
Prints a kernel's name and how many pairs of launches were alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import LazyDict
from triton.runtime.driver import driver

from qwencli.engine.kernels import add_norm, dequantize, qk_norm_rope
from tests.engine.quant.drawn_matrices import KINDS, drawn

handed: list[tuple[Any, ...]] = []


class Launcher:
    """What the driver makes of a compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self._name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        handed.append((id(self), self._name, *arguments))


def pretend_a_gpu() -> None:
    binaries = iter(range(1, 1000))
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, next(binaries), 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 2**18},
        unload_module=lambda _: None,
    )
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 7,
            launcher_cls=Launcher,
            utils=utils,
        )
    )


def of(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """Arguments that can be compared: storage, shape and type of tensors. What profilers are told
    is made anew for each launch."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument.data_ptr(), argument.shape, argument.dtype
        elif not isinstance(argument, LazyDict):
            yield argument


def count_alike(launches: list[tuple[Callable[[], Any], Callable[[], Any]]], new: int) -> int:
    """How often both of a pair handed over the same; `new`: tensors that may differ in place."""
    for again, looked_up in launches:
        handed.clear()
        kept = again(), looked_up()
        one, other = (list(of(launch)) for launch in handed)
        differing = [n for n, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        assert len(differing) <= new, (kept, one, other)
    return len(launches)


def heads_launches() -> list[tuple[Callable[[], Any], Callable[[], Any]]]:
    found = []
    for with_gains in (True, False):
        rope = tuple(torch.zeros(1, 48, 1, 64, dtype=torch.bfloat16) for _ in range(2))
        split = torch.zeros(1, 48, 8, 64, dtype=torch.bfloat16)
        gains = torch.ones(6, 64, dtype=torch.bfloat16) if with_gains else None
        cache = torch.zeros(1, 4, 64, 64, dtype=torch.bfloat16)
        rest = (split, rope, 6, gains, 1e-6, cache, torch.arange(48))
        known = qk_norm_rope.QkNormRope()
        known(*rest)  # type: ignore[arg-type]
        found.append((lambda k=known, r=rest: k(*r), lambda r=rest: qk_norm_rope.QkNormRope()(*r)))
    return found  # type: ignore[return-value]


def sum_launches() -> list[tuple[Callable[[], Any], Callable[[], Any]]]:
    found = []
    hidden, weight = torch.zeros(5, 144, dtype=torch.bfloat16), torch.ones(144).bfloat16()
    for update in (None, hidden.clone()):
        for bias in (None, weight.clone()):
            known = add_norm.AddNorm()
            rest = (hidden, update, weight, bias, 1e-6)
            known(*rest)
            found.append((lambda k=known, r=rest: k(*r), lambda r=rest: add_norm.AddNorm()(*r)))
    return found  # type: ignore[return-value]


def read_back_launches() -> list[tuple[Callable[[], Any], Callable[[], Any]]]:
    found = []
    for kind in KINDS.values():
        matrix = drawn(kind, 13, 384)
        dequantize.dequantize(matrix, torch.bfloat16)
        assert matrix in dequantize._launches
        found.append(
            (
                lambda m=matrix: dequantize.dequantize(m, torch.bfloat16),
                lambda m=matrix: dequantize._first_dequantize(m, torch.bfloat16),
            )
        )
    return found  # type: ignore[return-value]


if __name__ == "__main__":
    pretend_a_gpu()
    print("heads", count_alike(heads_launches(), new=0))
    print("add_norm", count_alike(sum_launches(), new=1))
    print("dequantize", count_alike(read_back_launches(), new=1))
