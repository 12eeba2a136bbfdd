"""Quantized matrices read back whole, for products with more rows than a step has.

Each packed value is read once and written once: a prompt's product then costs what it costs with
unquantized weights, and the time of these bytes. Products and roundings are those of
`Quantized.dequantize`, bit for bit. Everything is done with integers and float32, so fp8 needs no
instruction that converts it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwencli.engine.kernels.gemv_quantized import half, to_float
from qwencli.engine.native.quantized import IN_NIBBLES, Quantized, Scheme

CHUNK = 8  # columns of a thread: 16 bytes of bfloat16, and one word of 4-bit values
# Chunks that a program has on their way at once, one a thread, and how many times.
WARPS = 4
CHUNKS = 32 * WARPS
TURNS = 4


@triton.jit
def read_back_kernel(
    data_ptr,  # int8 [N, K], fp8 as its bits; NIBBLES: int32 [N, K / 8]
    scale_ptr,  # [N, K / G]
    zero_ptr,  # as scale; None = no zeros
    table_ptr,  # float32 [16]; None = values are what they are
    order_ptr,  # int32 [K], where the columns go; None = where they are
    out_ptr,  # [N, K]
    N,
    K: tl.constexpr,
    G: tl.constexpr,
    NIBBLES: tl.constexpr,
    FP8: tl.constexpr,
    CHUNKS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """TURNS times CHUNKS chunks of eight columns, of all rows one after the other."""
    PER_ROW: tl.constexpr = (K + 7) // 8
    GROUPS: tl.constexpr = K // G
    first = tl.program_id(0) * (CHUNKS * TURNS) + tl.arange(0, CHUNKS)
    within = tl.arange(0, 8)[None, :]
    packed = ()
    scales = ()
    zeros = ()
    # All reads first: a write between them would be waited for, as it could be what is read next.
    for turn in tl.static_range(TURNS):
        chunk = first + turn * CHUNKS
        there = chunk < N * PER_ROW
        row = (chunk // PER_ROW).to(tl.int64)
        start = chunk % PER_ROW * 8
        group = row * GROUPS + start // G
        if NIBBLES:
            at = chunk
            inside = there
        else:
            at = (row * K + start)[:, None] + within
            inside = in_row(there, start, K)
        packed += (tl.load(data_ptr + at, mask=inside, other=0, eviction_policy="evict_first"),)  # type: ignore[assignment]
        scales += (tl.load(scale_ptr + group, mask=there, other=0.0).to(tl.float32),)  # type: ignore[assignment]
        if zero_ptr is not None:
            zeros += (tl.load(zero_ptr + group, mask=there, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    for turn in tl.static_range(TURNS):
        chunk = first + turn * CHUNKS
        row = (chunk // PER_ROW).to(tl.int64)
        start = chunk % PER_ROW * 8
        inside = in_row(chunk < N * PER_ROW, start, K)
        scale = scales[turn]
        if FP8:
            # With four bits of exponent in the place of float16's five, values are 2^8 too small.
            bits = packed[turn].to(tl.int32)
            values = half(((bits & 0x80) << 8) | ((bits & 0x7F) << 7))
            scale *= 256.0
        elif NIBBLES:
            values = of_nibbles(packed[turn][:, None], within, table_ptr)
        else:
            values = to_float(packed[turn].to(tl.int32))
        if zero_ptr is not None:
            values -= zeros[turn][:, None]
        values *= scale[:, None]
        columns = start[:, None] + within
        if order_ptr is not None:
            columns = tl.load(order_ptr + columns, mask=inside, other=0)
        at = (row * K)[:, None] + columns
        tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def in_row(there, start, K: tl.constexpr):
    """Which columns of chunks are inside their rows: [n, 1], or [n, 8] where rows end within one."""
    inside = there[:, None]
    if K % 8 != 0:
        inside = inside & (start[:, None] + tl.arange(0, 8)[None, :] < K)
    return inside


@triton.jit
def of_nibbles(words, within, table_ptr):
    """The columns `within` [1, 8] of int32 words [n, 1], float32; see `quantized.pack`."""
    if table_ptr is None:
        q = (words >> ((within & 3) * 8 + (within >> 2) * 4)) & 15
        values = to_float(q)
    else:
        values = tl.load(table_ptr + ((words >> (4 * within)) & 15))
    return values


def read_back(matrix: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """As `Quantized.dequantize`; NaN of fp8, which no loaded matrix has, is not kept."""
    rows, columns = matrix.rows, matrix.columns
    nibbles = matrix.scheme in IN_NIBBLES
    assert not matrix.grouped or matrix.group % CHUNK == 0, "a chunk has one scale"
    out = torch.empty(rows, columns, dtype=dtype, device=matrix.data.device)
    read_back_kernel[triton.cdiv(rows * triton.cdiv(columns, CHUNK), CHUNKS * TURNS),](
        matrix.data if nibbles else matrix.data.view(torch.int8),
        matrix.scale,
        matrix.zero if matrix.grouped else None,
        None if matrix.table is None else matrix.table.values,
        matrix.order,
        out,
        rows,
        K=columns,
        G=matrix.group,
        NIBBLES=nibbles,
        FP8=matrix.scheme is Scheme.FP8,
        CHUNKS=CHUNKS,
        TURNS=TURNS,
        num_warps=WARPS,
    )
    return out
