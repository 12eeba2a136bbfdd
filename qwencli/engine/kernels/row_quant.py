"""Quantizes the rows of an activation matrix, in one pass with what is in front of the product.

A program reads a row once, applies the RMS norm or SwiGLU that comes before the matrix, and writes
the row in the format that `tiled_gemm` multiplies. Nothing is rounded in between.

format   values
FP8      float8_e4m3fn, x * 448 / max
INT8     int8, x * 127 / max, rounded to the nearest
FLOAT16  float16, x / max, in halves

Each row has one scale. "In halves": columns 0 to 3 of each 8 of the row lie before all columns 4 to
7, as a byte of int4 weights holds column i and column i + 4 (`quantized_tensor.pack`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl

from qwencli.engine.ops.decoder_ops import RMSNorm


class RowFormat(IntEnum):
    FP8 = 1
    FLOAT16 = 2
    INT8 = 3


FP8 = tl.constexpr(int(RowFormat.FP8))
FLOAT16 = tl.constexpr(int(RowFormat.FLOAT16))
INT8 = tl.constexpr(int(RowFormat.INT8))
VALUE_TYPES = {
    RowFormat.FP8: torch.float8_e4m3fn,
    RowFormat.INT8: torch.int8,
    RowFormat.FLOAT16: torch.float16,
}
# Values of a row that a thread holds; more than twice as many spill.
VALUES_PER_THREAD = 32
MOST_WARPS = 16
SHORTEST_BLOCK = 128


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [M, K]; SWIGLU: [M, 2 K], gate in front of up
    gain_ptr,  # [K], weight of the RMS norm; None = no norm
    values_ptr,  # [M, K]
    scale_ptr,  # float32 [M]
    K,
    eps,
    FORMAT: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    if SWIGLU:
        gate = tl.load(x_ptr + row * 2 * K + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * 2 * K + K + columns, mask=inside, other=0.0).to(tl.float32)
        x = gate / (1.0 + tl.exp(-gate)) * up
    else:
        x = tl.load(x_ptr + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x) / K + eps) * gain
    largest = tl.maximum(tl.max(tl.abs(x)), 1e-30)
    at = columns
    if FORMAT == FP8:
        tl.store(scale_ptr + row, largest * (1.0 / 448.0))
        x *= 448.0 / largest
    elif FORMAT == INT8:
        tl.store(scale_ptr + row, largest * (1.0 / 127.0))
        # Adding 1.5 * 2^23 rounds to an integer, in the lowest bits of the result.
        x = (x * (127.0 / largest) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    else:
        tl.store(scale_ptr + row, largest)
        x *= 1.0 / largest
        at = (columns // 4 % 2) * (K // 2) + columns // 8 * 4 + columns % 4
    tl.store(values_ptr + row * K + at, x.to(values_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class QuantizedRows:
    """Activations [M, K] as `quantize_rows_kernel` stores them."""

    format: RowFormat
    values: torch.Tensor
    scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)


def quantize_rows(
    x: torch.Tensor,
    row_format: RowFormat,
    norm: RMSNorm | None = None,
    gated: bool = False,
) -> QuantizedRows:
    """Quantize the rows of norm(x), or with `gated` of SwiGLU of x [M, 2 K]."""
    x = x.contiguous()
    rows, columns = len(x), x.shape[1] // 2 if gated else x.shape[1]
    values = torch.empty(rows, columns, dtype=VALUE_TYPES[row_format], device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = max(triton.next_power_of_2(columns), SHORTEST_BLOCK)
    quantize_rows_kernel[rows,](
        x,
        None if norm is None else norm.weight,
        values,
        scale,
        columns,
        0.0 if norm is None else norm.eps,
        FORMAT=int(row_format),
        SWIGLU=gated,
        BLOCK=block,
        num_warps=min(max(block // (32 * VALUES_PER_THREAD), 1), MOST_WARPS),
    )
    return QuantizedRows(row_format, values, scale)
