"""Weights of fewer bits: how a matrix is cut down, packed, and read back.

int8, fp8   one scale a row: w = scale * q.
int4        asymmetric groups along the columns: w = scale * (q - zero), q from 0 to 15. A group's
            range is shrunk to the one of `SHRINKS` that leaves the smallest squared error, which
            is what outliers cost (Nagel et al. 2021, arXiv 2106.08295, section 3.1).

This module knows neither kernels nor which matrices of a model are worth it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from qwencli.config import Quantization

Tensor = torch.Tensor

GROUPS = (128, 64, 32)
NIBBLES = 8  # of one int32
SHRINKS = tuple(1 - 0.05 * step for step in range(8))
# Rows that are worked on at a time: in float32 a vocabulary's matrix takes gigabytes.
ROWS_AT_A_TIME = 4096
INT8_MAX, INT4_MAX, FP8_MAX = 127, 15, 448.0


class Scheme(StrEnum):
    INT8 = "int8"
    FP8 = "fp8-e4m3"
    INT4 = "int4"


# What a mode makes of the decoder's matrices, and of the output head: at 4 bits a head loses most
# and saves least.
SCHEMES: Mapping[Quantization, tuple[Scheme, Scheme]] = {
    Quantization.INT8: (Scheme.INT8, Scheme.INT8),
    Quantization.FP8: (Scheme.FP8, Scheme.FP8),
    Quantization.INT4: (Scheme.INT4, Scheme.INT8),
}


@dataclass(frozen=True)
class Quantized:
    """A matrix [rows, columns].

    Args:
        data: int8 or float8_e4m3fn [rows, columns]; int4: int32 [rows, columns / 8], see `pack`.
        scale: float32 [rows]; int4: float16 [rows, groups]. zero: int4: float16 [rows, groups].
    """

    scheme: Scheme
    data: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def columns(self) -> int:
        return self.data.shape[1] * (NIBBLES if self.scheme is Scheme.INT4 else 1)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns if self.scale.dim() == 1 else self.columns // self.scale.shape[1]

    @property
    def label(self) -> str:
        """For results: the scheme, and the group where there is one."""
        return f"{self.scheme}-g{self.group}" if self.zero is not None else str(self.scheme)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scale, self.zero) if t is not None)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, columns] that the kernels compute with, rounded to `dtype`."""
        if self.zero is None:
            return (self.data.float() * self.scale[:, None]).to(dtype)
        q = unpack(self.data).view(self.rows, -1, self.group).float()
        values = (q - self.zero.float()[..., None]) * self.scale.float()[..., None]
        return values.view(self.rows, -1).to(dtype)


def group_of(columns: int) -> int | None:
    """The largest group that divides a row; None where int4 cannot store the matrix."""
    return next((group for group in GROUPS if columns % group == 0), None)


def quantize(weight: Tensor, scheme: Scheme) -> Quantized:
    """Quantize a matrix [rows, columns] of any float type, on its device.

    A matrix that int4 cannot cut into groups becomes int8.
    """
    group = group_of(weight.shape[1])
    if scheme is Scheme.INT4 and group is None:
        scheme = Scheme.INT8
    parts = [_part(rows.float(), scheme, group) for rows in torch.split(weight, ROWS_AT_A_TIME)]
    data, scale, zero = zip(*parts, strict=True)
    return Quantized(
        scheme,
        torch.cat(data),
        torch.cat(scale),
        torch.cat(zero) if scheme is Scheme.INT4 else None,
    )


def _part(w: Tensor, scheme: Scheme, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if scheme is Scheme.INT4:
        assert group is not None, "the caller looked"
        return _int4(w, group)
    data, scale = quantize_rows(w, scheme)
    return data, scale, scale


def quantize_rows(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Rows [..., n] in float32 -> int8 or fp8 of the same shape, and float32 scales [...]."""
    assert scheme is not Scheme.INT4, "its groups have zeros"
    largest = w.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny * FP8_MAX)
    if scheme is Scheme.INT8:
        scale = largest / INT8_MAX
        return (w / scale[..., None]).round().to(torch.int8), scale
    scale = largest / FP8_MAX
    return (w / scale[..., None]).to(torch.float8_e4m3fn), scale


def _int4(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    grouped = w.view(len(w), -1, group)
    low = grouped.amin(dim=2, keepdim=True).clamp(max=0.0)
    high = grouped.amax(dim=2, keepdim=True).clamp(min=0.0)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        step = ((high - low) * shrink / INT4_MAX).clamp(min=1e-7).half().float()
        offset = (-low * shrink / step).half().float()
        q = (grouped / step + offset).round_().clamp_(0, INT4_MAX)
        error = ((q - offset) * step - grouped).square_().sum(dim=2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, offset, zero)
    q = (grouped / scale + zero).round_().clamp_(0, INT4_MAX).to(torch.int32)
    return pack(q.view(len(w), -1)), scale[..., 0].half(), zero[..., 0].half()


def pack(q: Tensor) -> Tensor:
    """Values 0 to 15, int32 [rows, columns] -> int32 [rows, columns / 8].

    Byte i of a word has column i of its eight in the low half, and column i + 4 in the high one:
    masked once and shifted once, a word is eight int8 in order.
    """
    columns = q.view(len(q), -1, 2, 4)
    packed = torch.zeros_like(columns[:, :, 0, 0])
    for half, place in itertools.product(range(2), range(4)):
        packed |= columns[:, :, half, place] << (8 * place + 4 * half)
    return packed


def unpack(data: Tensor) -> Tensor:
    """The inverse of `pack`."""
    shifts = [8 * place + 4 * half for half in range(2) for place in range(4)]
    places = torch.tensor(shifts, device=data.device, dtype=torch.int32)
    return ((data[..., None] >> places) & INT4_MAX).view(len(data), -1)
