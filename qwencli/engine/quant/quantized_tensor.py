"""Weights of fewer bits: how a matrix is cut down, packed, and dequantized.

int8, fp8   one scale a row: w = scale * q. In pre-quantized checkpoints also a scale for each group
            of columns, and for int8 a zero: w = scale * (q - zero).
int4        asymmetric groups along the columns: w = scale * (q - zero), q from 0 to 15. A group's
            range is shrunk to the one of `SHRINKS` that leaves the smallest squared error, which
            is what outliers cost (Nagel et al. 2021, arXiv 2106.08295, section 3.1).
nf4, fp4    groups along the columns, and a table of 16 values for all: w = scale * table[q]
            (QLoRA, arXiv 2305.14314, section 3). Pre-quantized checkpoints only.

This module knows neither kernels nor which matrices of a model are worth it, nor how others pack
theirs (`checkpoint_formats`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from qwencli.config import Quantization

Tensor = torch.Tensor

GROUPS = (128, 64, 32)
NIBBLES = 8  # of one int32
SHRINKS = tuple(1 - 0.05 * step for step in range(8))
# Rows that are worked on at a time: in float32 a vocabulary's matrix takes gigabytes.
ROWS_AT_A_TIME = 4096
# Values that are dequantized at a time: 16 MB in float32, which caches hold, and enough for a GPU.
VALUES_AT_A_TIME = 2**22
INT4_MAX = 15


class Scheme(StrEnum):
    """How values of a matrix are stored: one byte each, or two values in a byte."""

    INT8 = "int8"
    FP8 = "fp8-e4m3"
    INT4 = "int4"
    NF4 = "nf4"
    FP4 = "fp4"


IN_NIBBLES = (Scheme.INT4, Scheme.NF4, Scheme.FP4)
CODEBOOK_SCHEMES = (Scheme.NF4, Scheme.FP4)
# Which bit of a word each of its eight columns begins at. int4: byte i has column i in its low half
# and column i + 4 in the high one, so that masked once and shifted once a word is eight int8 in
# order. Tables: in order, as the instruction that looks four of them up takes them.
_IN_ORDER = tuple(range(0, 32, 4))
_PLACES = {
    Scheme.INT4: (0, 8, 16, 24, 4, 12, 20, 28),
    Scheme.NF4: _IN_ORDER,
    Scheme.FP4: _IN_ORDER,
}
# Which of a word's columns are in the low halves of its bytes, and in the high ones: the same told
# the other way round.
_IN_TURNS = (slice(0, NIBBLES, 2), slice(1, NIBBLES, 2))
_HALVES = {
    Scheme.INT4: (slice(0, 4), slice(4, NIBBLES)),
    Scheme.NF4: _IN_TURNS,
    Scheme.FP4: _IN_TURNS,
}
STEPS_TRIED = 1024
# What a label leaves out: bitsandbytes has no other block by default.
CODEBOOK_GROUP = 64
# Of one value, before its row's scale.
LARGEST: Mapping[Scheme, int] = {Scheme.INT8: 127, Scheme.FP8: 448}
# Rows of zeros have to divide by something.
_SMALLEST_ROW = 1e-30

# What a mode makes of the decoder's matrices, and of the output head: at 4 bits a head loses most
# and saves least.
SCHEMES: Mapping[Quantization, tuple[Scheme, Scheme]] = {
    Quantization.INT8: (Scheme.INT8, Scheme.INT8),
    Quantization.FP8: (Scheme.FP8, Scheme.FP8),
    Quantization.INT4: (Scheme.INT4, Scheme.INT8),
}


@dataclass(frozen=True)
class Codebook:
    """What 4-bit values stand for.

    Args:
        values: float32 [16]. codes: int32 [4], the values as int8 in units of `step`, four a word,
            the first in the lowest byte; for kernels that multiply integers.
    """

    values: Tensor
    codes: Tensor
    step: float

    def to(self, device: torch.device) -> Codebook:
        return replace(self, values=self.values.to(device), codes=self.codes.to(device))


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix [rows, columns]; equal to itself alone.

    Args:
        data: int8 or float8_e4m3fn [rows, columns]; int4, nf4, fp4: int32 [rows, columns / 8],
            see `pack`.
        scale: of a float type, [rows], or [rows, groups].
        zero_point: float16 [rows, groups]; int4 always has one, int8 may.
        codebook: of nf4 and fp4.
        g_idx_sort_indices: int32 [columns]; column i of `data` is column order[i] of the matrix.
            None = i.
    """

    scheme: Scheme
    data: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    codebook: Codebook | None = None
    g_idx_sort_indices: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def columns(self) -> int:
        return self.data.shape[1] * (NIBBLES if self.scheme in IN_NIBBLES else 1)

    @property
    def bits(self) -> int:
        """Bits of a stored value."""
        return 4 if self.scheme in IN_NIBBLES else 8

    @property
    def grouped(self) -> bool:
        return self.scale.dim() == 2

    @property
    def scaled_by_row(self) -> bool:
        """Whether a row is its values times one scale: no groups, zero points, order or table."""
        others = self.zero_point, self.g_idx_sort_indices, self.codebook
        return not self.grouped and all(other is None for other in others)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scale.shape[1] if self.grouped else self.columns

    @property
    def label(self) -> str:
        """For results: the scheme, and the group where there is one."""
        usual = self.scheme in CODEBOOK_SCHEMES and self.group == CODEBOOK_GROUP
        return f"{self.scheme}-g{self.group}" if self.grouped and not usual else str(self.scheme)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Every tensor of it by the name of its field."""
        found = {
            name: getattr(self, name)
            for name in ("data", "scale", "zero_point", "g_idx_sort_indices")
        }
        if self.codebook is not None:
            found["codebook"] = self.codebook.values
        return {name: part for name, part in found.items() if part is not None}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, columns] that the kernels compute with: float32, rounded to `dtype`.

        `VALUES_AT_A_TIME` of it are float32, unless that is the type.
        """
        out = torch.empty(self.rows, self.columns, dtype=dtype, device=self.data.device)
        for rows in self.pieces():
            self._read(rows, out[rows])
        return out

    def pieces(self) -> list[slice]:
        """Its rows, as many at a time as may be float32."""
        # A compiler has no use for pieces: it computes a value where it is read.
        whole = torch.compiler.is_compiling()
        step = self.rows if whole else max(1, VALUES_AT_A_TIME // self.columns)
        return [slice(start, start + step) for start in range(0, self.rows, step)]

    def part(self, rows: slice) -> QuantizedTensor:
        """Some of its rows as a matrix; nothing is copied."""
        zero = None if self.zero_point is None else self.zero_point[rows]
        return replace(self, data=self.data[rows], scale=self.scale[rows], zero_point=zero)

    def _read(self, rows: slice, out: Tensor) -> None:
        data = self.data[rows]
        q = unpack(data, self.scheme) if self.scheme in IN_NIBBLES else data
        if self.codebook is not None:
            values = self.codebook.values.index_select(0, q.view(-1).int()).view(q.shape)
        elif self.g_idx_sort_indices is None and out.dtype is torch.float32:
            values = out.copy_(q)
        else:
            values = q.float()
        groups = values.view(len(q), -1, self.group)
        if self.zero_point is not None:
            groups -= self.zero_point[rows].float()[..., None]
        groups *= self.scale[rows].float().view(len(q), -1, 1)
        if self.g_idx_sort_indices is not None:
            out.index_copy_(1, self.g_idx_sort_indices.long(), values.to(out.dtype))
        elif values is not out:
            out.copy_(values)


def stack(parts: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """Matrices of equal columns as one, their rows in turn; None where they are not of one kind."""
    first = parts[0]
    kinds = {(p.scheme, p.scale.shape[1:], p.scale.dtype, frozenset(p.parts)) for p in parts}
    shared = (
        torch.equal(first.parts[name], part.parts[name])
        for part in parts[1:]
        for name in ("codebook", "g_idx_sort_indices")
        if name in first.parts and name in part.parts
    )
    if len(kinds) > 1 or not all(shared):
        return None
    if len(parts) == 1:
        return first
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return replace(
        first,
        data=torch.cat([part.data for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat(zeros) if zeros else None,
    )


def group_of(columns: int) -> int | None:
    """The largest group that divides a row; None where int4 cannot store the matrix."""
    return next((group for group in GROUPS if columns % group == 0), None)


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Quantize a matrix [rows, columns] of any float type, on its device.

    A matrix that int4 cannot cut into groups becomes int8.
    """
    group = group_of(weight.shape[1])
    if scheme is Scheme.INT4 and group is None:
        scheme = Scheme.INT8
    # What stays is allocated before what does not, so that a heap can give the rest back.
    whole = _empty(weight, scheme, group)
    if weight.is_meta:
        return whole
    for start in range(0, len(weight), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        data, scale, zero = _part(weight[rows].float(), scheme, group)
        whole.data[rows] = data
        whole.scale[rows] = scale
        if whole.zero_point is not None:
            whole.zero_point[rows] = zero
    return whole


# A matrix of any float type and what to make of it -> that.
Quantizer = Callable[[Tensor, Scheme], QuantizedTensor]


def _empty(weight: Tensor, scheme: Scheme, group: int | None) -> QuantizedTensor:
    (rows, columns), device = weight.shape, weight.device
    if scheme is Scheme.INT4:
        assert group is not None, "the caller looked"
        data = torch.empty(rows, columns // NIBBLES, dtype=torch.int32, device=device)
        scale = torch.empty(rows, columns // group, dtype=torch.float16, device=device)
        return QuantizedTensor(scheme, data, scale, torch.empty_like(scale))
    dtype = torch.int8 if scheme is Scheme.INT8 else torch.float8_e4m3fn
    data = torch.empty(rows, columns, dtype=dtype, device=device)
    return QuantizedTensor(scheme, data, torch.empty(rows, device=device))


def _part(w: Tensor, scheme: Scheme, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if scheme is Scheme.INT4:
        assert group is not None, "the caller looked"
        return _int4(w, group)
    data, scale = quantize_rows(w, scheme)
    return data, scale, scale


def quantize_rows(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Rows [..., n] in float32 -> int8 or fp8 of the same shape, and float32 scales [...]."""
    assert scheme in LARGEST, "the others have groups, or tables"
    scale = w.abs().amax(dim=-1).clamp(min=_SMALLEST_ROW) / LARGEST[scheme]
    scaled = w / scale[..., None]
    if scheme is Scheme.INT8:
        return scaled.round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale


def _int4(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    grouped = w.view(len(w), -1, group)
    low = grouped.amin(dim=2, keepdim=True).clamp(max=0.0)
    high = grouped.amax(dim=2, keepdim=True).clamp(min=0.0)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    # A tensor: by a number torch multiplies with the reciprocal on a GPU, which rounds otherwise.
    top = low.new_tensor(INT4_MAX)
    for shrink in SHRINKS:
        step = ((high - low) * shrink / top).clamp(min=1e-7).half().float()
        offset = (-low * shrink / step).half().float()
        q = (grouped / step + offset).round_().clamp_(0, INT4_MAX)
        error = ((q - offset) * step - grouped).square_().sum(dim=2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, offset, zero)
    q = (grouped / scale + zero).round_().clamp_(0, INT4_MAX).to(torch.int32)
    return pack(q.view(len(w), -1)), scale[..., 0].half(), zero[..., 0].half()


def pack(q: Tensor, scheme: Scheme = Scheme.INT4) -> Tensor:
    """Values 0 to 15, int32 [rows, columns] -> int32 [rows, columns / 8].

    Column i of a word's eight is at bit `_PLACES[scheme][i]`.
    """
    columns = q.view(len(q), -1, NIBBLES)
    packed = torch.zeros(columns.shape[:2], dtype=q.dtype, device=q.device)
    for column, place in enumerate(_PLACES[scheme]):
        packed |= columns[:, :, column] << place
    return packed


def unpack(data: Tensor, scheme: Scheme = Scheme.INT4) -> Tensor:
    """The inverse of `pack`: uint8 [rows, columns]."""
    raw = data.view(torch.uint8).view(len(data), -1, 4)
    columns = torch.empty(len(data), raw.shape[1], NIBBLES, dtype=torch.uint8, device=data.device)
    low, high = _HALVES[scheme]
    columns[..., low] = raw & INT4_MAX
    columns[..., high] = raw >> 4
    return columns.view(len(data), -1)


def codebook_of(values: Tensor) -> Codebook:
    """The table of 16 float values, with the int8 steps that are nearest to it."""
    values = values.float().cpu()
    most = 127 / float(values.abs().max().clamp(min=1e-30))
    finest = torch.linspace(most / 2, most, STEPS_TRIED)[:, None]
    steps = 1 / finest[((values * finest).round() / finest - values).square().sum(1).argmin()]
    codes = (values / steps).round().to(torch.int8)
    return Codebook(values, codes.view(torch.int32), float(steps))
