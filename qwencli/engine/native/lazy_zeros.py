"""Zeros that take no memory until they are written to."""

from __future__ import annotations

import math
import mmap
import sys

import torch


def lazy_zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of a size that few requests use up.

    On the CPU torch.zeros writes every page; this asks the system for pages that are zero already
    and become resident one by one. Huge pages are declined: a cache whose heads lie 4 MB apart
    would make 2 MB resident for the first token of each head. numpy asks for them.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, math.prod(size)) * dtype.itemsize)
    if sys.platform == "linux":
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(size)).view(size)
