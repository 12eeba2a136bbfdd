"""Dequantizes whole matrices, for products with more rows than a step has.

Each packed value is read once and written once: a prompt's product then costs what it costs with
unquantized weights, and the time of these bytes. Products and roundings are those of
`QuantizedTensor.dequantize`, bit for bit. Everything is done with integers and float32, so fp8
needs no instruction that converts it.

Where memory allows, a batch keeps the result (`keep_dense`): its products then cost what they cost
with unquantized weights and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from qwencli.engine.kernels.gemv_quantized import half, to_float
from qwencli.engine.kernels.launch_cache import CachedLaunch, launch
from qwencli.engine.quant.quantized_tensor import IN_NIBBLES, QuantizedTensor, Scheme

CHUNK = 8  # columns of a thread: 16 bytes of bfloat16, and one word of 4-bit values
# Chunks that a program has on their way at once, one a thread, and how many times.
WARPS = 4
CHUNKS = 32 * WARPS
TURNS = 4


@triton.jit
def place_of(chunk, K: tl.constexpr):
    """Row (int64) and first column of chunks; the last chunk of a row may end behind it."""
    PER_ROW: tl.constexpr = (K + 7) // 8
    return (chunk // PER_ROW).to(tl.int64), chunk % PER_ROW * 8


@triton.jit
def in_row(chunk, N, K: tl.constexpr):
    """Which columns of chunks there are: [n, 1], or [n, 8] where rows end within a chunk."""
    PER_ROW: tl.constexpr = (K + 7) // 8
    inside = (chunk < N * PER_ROW)[:, None]
    if K % 8 != 0:
        columns = (chunk % PER_ROW * 8)[:, None] + tl.arange(0, 8)[None, :]
        inside = inside & (columns < K)
    return inside


@triton.jit
def packed_chunks(
    ptr, first, N, K: tl.constexpr, NIBBLES: tl.constexpr, STEP: tl.constexpr, TURNS: tl.constexpr
):
    """Start reading chunks from `first` on: int8 [n, 8], or int32 [n] of NIBBLES, for each turn."""
    tiles = ()
    for turn in tl.static_range(TURNS):
        chunk = first + turn * STEP
        at = chunk
        inside = chunk < N * (K // 8)
        if not NIBBLES:
            row, start = place_of(chunk, K)
            at = (row * K + start)[:, None] + tl.arange(0, 8)[None, :]
            inside = in_row(chunk, N, K)
        tiles += (tl.load(ptr + at, mask=inside, other=0, eviction_policy="evict_first"),)  # type: ignore[assignment]
    return tiles


@triton.jit
def of_groups(
    ptr, first, N, K: tl.constexpr, G: tl.constexpr, STEP: tl.constexpr, TURNS: tl.constexpr
):
    """Start reading what belongs to the groups of chunks, of any float type: [n] for each turn."""
    GROUPS: tl.constexpr = K // G
    tiles = ()
    for turn in tl.static_range(TURNS):
        row, start = place_of(first + turn * STEP, K)
        tiles += (tl.load(ptr + row * GROUPS + start // G, mask=row < N, other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def floats_of(packed, codebook_ptr, NIBBLES: tl.constexpr, FP8: tl.constexpr):
    """What the integers of chunks stand for before zero and scale, float32 [n, 8].

    FP8: times 2^-8, as its four bits of exponent are put in the place of float16's five.
    """
    if FP8:
        bits = packed.to(tl.int32)
        values = half(((bits & 0x80) << 8) | ((bits & 0x7F) << 7))
    elif NIBBLES:
        column = tl.arange(0, 8)[None, :]
        if codebook_ptr is None:
            values = to_float((packed[:, None] >> ((column & 3) * 8 + (column >> 2) * 4)) & 15)
        else:
            values = tl.load(codebook_ptr + ((packed[:, None] >> (4 * column)) & 15))
    else:
        values = to_float(packed.to(tl.int32))
    return values


@triton.jit
def dequantize_kernel(
    out_ptr,  # [N, K]
    data_ptr,  # int8 [N, K], fp8 as its bits; NIBBLES: int32 [N, K / 8], see `pack`
    scale_ptr,  # [N, K / G]
    zero_point_ptr,  # as scale; None = no zeros
    codebook_ptr,  # float32 [16]; None = values are what they are
    g_idx_sort_ptr,  # int32 [K], where columns go; None = they stay
    N,
    K: tl.constexpr,
    G: tl.constexpr,
    NIBBLES: tl.constexpr,
    FP8: tl.constexpr,
    CHUNKS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """CHUNKS chunks of eight columns, TURNS times; chunks are counted along the rows."""
    first = tl.program_id(0) * (CHUNKS * TURNS) + tl.arange(0, CHUNKS)
    # All reads first: behind a write they would wait for it, as it could be what they read.
    packed = packed_chunks(data_ptr, first, N, K, NIBBLES, CHUNKS, TURNS)
    scales = of_groups(scale_ptr, first, N, K, G, CHUNKS, TURNS)
    if zero_point_ptr is not None:
        zeros = of_groups(zero_point_ptr, first, N, K, G, CHUNKS, TURNS)
    for turn in tl.static_range(TURNS):
        chunk = first + turn * CHUNKS
        inside = in_row(chunk, N, K)
        values = floats_of(packed[turn], codebook_ptr, NIBBLES, FP8)
        if zero_point_ptr is not None:
            values -= zeros[turn].to(tl.float32)[:, None]
        # 2^8 changes no digit of the scale, so none of the product.
        values *= (scales[turn].to(tl.float32) * (256.0 if FP8 else 1.0))[:, None]
        row, start = place_of(chunk, K)
        columns = start[:, None] + tl.arange(0, 8)[None, :]
        if g_idx_sort_ptr is not None:
            columns = tl.load(g_idx_sort_ptr + columns, mask=inside, other=0)
        at = (row * K)[:, None] + columns
        tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class CachedDequantize:
    """How a matrix was dequantized before: `run` wants what `of` says behind the result."""

    dtype: torch.dtype
    size: tuple[int, int]
    of: tuple[torch.Tensor | int | None, ...]
    run: CachedLaunch


_launches: WeakKeyDictionary[QuantizedTensor, CachedDequantize] = WeakKeyDictionary()


_dense_copies: WeakKeyDictionary[QuantizedTensor, torch.Tensor] = WeakKeyDictionary()


def keep_dense(matrices: Iterable[QuantizedTensor], dtype: torch.dtype) -> None:
    """Dequantize these once, until `forget_dense`."""
    for matrix in matrices:
        _dense_copies[matrix] = dequantize(matrix, dtype)


def forget_dense(matrices: Iterable[QuantizedTensor]) -> None:
    for matrix in matrices:
        _dense_copies.pop(matrix, None)


def is_kept_dense(matrix: QuantizedTensor) -> bool:
    return matrix in _dense_copies


def dequantize(matrix: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """As `QuantizedTensor.dequantize`, to be read only; NaN of fp8, which no loaded matrix has, is
    not kept."""
    if (copy := _dense_copies.get(matrix)) is not None and copy.dtype is dtype:
        return copy
    known = _launches.get(matrix)
    if known is None or known.dtype is not dtype:
        return _first_dequantize(matrix, dtype)
    out = torch.empty(known.size, dtype=dtype, device=matrix.data.device)
    known.run(out, *known.of)
    return out


def _first_dequantize(matrix: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = matrix.rows, matrix.columns
    nibbles = matrix.scheme in IN_NIBBLES
    assert not matrix.grouped or matrix.group % CHUNK == 0, "a chunk has one scale"
    out = torch.empty(rows, columns, dtype=dtype, device=matrix.data.device)
    of = (
        matrix.data if nibbles else matrix.data.view(torch.int8),
        matrix.scale,
        matrix.zero_point if matrix.grouped else None,
        None if matrix.codebook is None else matrix.codebook.values,
        matrix.g_idx_sort_indices,
        rows,
    )
    constants = {
        "K": columns,
        "G": matrix.group,
        "NIBBLES": nibbles,
        "FP8": matrix.scheme is Scheme.FP8,
        "CHUNKS": CHUNKS,
        "TURNS": TURNS,
    }
    programs = triton.cdiv(rows * triton.cdiv(columns, CHUNK), CHUNKS * TURNS)
    run = launch(dequantize_kernel, (programs, 1, 1), (out, *of), constants, WARPS)
    if run is not None:
        _launches[matrix] = CachedDequantize(dtype, (rows, columns), of, run)
    return out
