"""Products of one row with a matrix on the CPU, of buffers that stay where they are.

numpy multiplies on one core, and its calls take a third of torch's; torch wakes a team of threads.
Of a small matrix a core has read its part before the others are awake, and a team waits for each of
its threads: where another program has a core, a product that takes 10 us takes milliseconds. MKL,
which torch multiplies with on x86, is the exception on Intel's processors: two cores of one read
matrices as small as the bundled model's in two thirds of the time.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
import torch

from qwencli.engine.machine.host import cpu_model

# 1 MB in float32, which is what the second-level caches of today's cores hold.
ONE_CORE_VALUES = 2**18


class Product(Protocol):
    """x W of a row x [1, in] and a matrix W [in, out], into or onto a row [1, out]."""

    def write(self, factor: float) -> None:
        """out = factor x W + bias. May overwrite x."""

    def add(self) -> None:
        """out += x W + bias."""


class OneCore:
    """numpy's."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        self._x, self._weight, self._out = x.numpy()[0], weight.numpy(), out.numpy()[0]
        self._bias = None if bias is None else bias.numpy()
        self._product = np.empty_like(self._out)

    def write(self, factor: float) -> None:
        np.multiply(self._x, factor, self._x)
        self._x.dot(self._weight, self._out)
        if self._bias is not None:
            np.add(self._out, self._bias, self._out)

    def add(self) -> None:
        self._x.dot(self._weight, self._product)
        np.add(self._out, self._product, self._out)
        if self._bias is not None:
            np.add(self._out, self._bias, self._out)


class Team:
    """torch's."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        self._x, self._weight, self._bias, self._out = x, weight, bias, out

    def write(self, factor: float) -> None:
        out = self._out
        if self._bias is None:
            torch.addmm(out, self._x, self._weight, beta=0, alpha=factor, out=out)
        else:
            torch.addmm(self._bias, self._x, self._weight, alpha=factor, out=out)

    def add(self) -> None:
        self._out.addmm_(self._x, self._weight)
        if self._bias is not None:
            self._out.add_(self._bias)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> Product:
    """The faster of the two. Which one it is depends on the matrix and the machine alone, so that
    the same request gives the same text again."""
    alone = weight.numel() <= ONE_CORE_VALUES and not _teams_are_quick()
    return OneCore(x, weight, bias, out) if alone else Team(x, weight, bias, out)


def _teams_are_quick() -> bool:
    return torch.get_num_threads() > 1 and _has_intels_mkl()


@functools.cache
def _has_intels_mkl() -> bool:
    intel = "intel" in (cpu_model() or "").lower()
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return intel and has_mkl
