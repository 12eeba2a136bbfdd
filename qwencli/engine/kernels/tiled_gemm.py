"""Products of quantized matrices with the rows of prompts and of steps of many rows.

A program makes a tile of the result: ROWS rows of the matrix by TOKENS rows of activations. The
matrix is the first operand of each instruction, so that few tokens still fill it. SPLITS programs
share the columns of a tile where there are too few tiles for the device: each stores its sums, and
the one that arrives last adds them up in order, so that a result does not depend on the order of
arrival.

fp8 and int8 weights are multiplied as they are with activations of the same type: each side has one
scale a row, which the end applies. Sums of int8 are whole numbers until then. int4 weights become
float16 in registers, (q - zero) * scale, and meet float16 activations (`row_quant`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qwencli.engine.kernels.row_quant import FLOAT16, INT8, QuantizedRows, RowFormat
from qwencli.engine.kernels.tiles import ProductTiles
from qwencli.engine.quant.quantized_tensor import QuantizedTensor

# Tiles of a product whose columns are shared.
MOST_SHARED_TILES = 4096


@triton.jit
def int4_as_float16(q, zero, scale):
    """uint8 0 to 15 -> (q - zero) * scale. Under the exponent of 1024, q reads 1024 + q."""
    read = (q.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    return ((read - 1024.0) - zero) * scale


@triton.jit(do_not_specialize=["M"])
def tiled_gemm_kernel(
    x_ptr,  # [M, K] in FORMAT
    x_scale_ptr,  # float32 [M]
    w_ptr,  # FP8, INT8: [N, K]; FLOAT16: uint8 [N, K / 2]
    scale_ptr,  # [N]; FLOAT16: [N, K / G]
    zero_point_ptr,  # FLOAT16: [N, K / G]
    bias_ptr,  # [N], or None
    y_ptr,  # [M, N]; ADD: what is added to
    sums_ptr,  # float32 [tiles, SPLITS, ROWS, TOKENS]
    semaphore_ptr,  # int32 [tiles], 0 before and after
    M,
    N,
    K,
    EVEN: tl.constexpr,
    G: tl.constexpr,
    FORMAT: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """COLUMNS: of a step of the loop; of int4 within a group. EVEN: do they divide K. BAND: blocks
    of tokens that meet a block of rows in turn, while caches hold it.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    blocks = tl.cdiv(M, TOKENS)
    width = BAND * tl.cdiv(N, ROWS)
    first = tile // width * BAND
    high = tl.minimum(blocks - first, BAND)
    rows = tile % width // high * ROWS + tl.arange(0, ROWS)
    tokens = (first + tile % width % high) * TOKENS + tl.arange(0, TOKENS)
    # Rows and tokens behind the last are read as the last, and not stored.
    read_rows = tl.minimum(rows, N - 1).to(tl.int64)
    read_tokens = tl.minimum(tokens, M - 1).to(tl.int64)
    share = tl.cdiv(tl.cdiv(K, COLUMNS), SPLITS) * COLUMNS
    begin = split * share
    end = tl.minimum(begin + share, K)
    acc = tl.zeros((ROWS, TOKENS), tl.int32 if FORMAT == INT8 else tl.float32)
    if FORMAT == FLOAT16:
        inner = tl.arange(0, COLUMNS // 2)
        w_row = w_ptr + read_rows[:, None] * (K // 2) + inner[None, :]
        x_row = x_ptr + read_tokens[None, :] * K + inner[:, None]
        group_row = read_rows * (K // G)
        for start in tl.range(begin, end, COLUMNS, num_stages=STAGES):
            packed = tl.load(w_row + start // 2)
            low_x = tl.load(x_row + start // 2)
            high_x = tl.load(x_row + (start // 2 + K // 2))
            scale = tl.load(scale_ptr + group_row + start // G).to(tl.float16)[:, None]
            zero = tl.load(zero_point_ptr + group_row + start // G).to(tl.float16)[:, None]
            acc = tl.dot(int4_as_float16(packed & 15, zero, scale), low_x, acc)
            acc = tl.dot(int4_as_float16(packed >> 4, zero, scale), high_x, acc)
    else:
        inner = tl.arange(0, COLUMNS)
        w_row = w_ptr + read_rows[:, None] * K + inner[None, :]
        x_row = x_ptr + read_tokens[None, :] * K + inner[:, None]
        for start in tl.range(begin, end, COLUMNS, num_stages=STAGES):
            if EVEN:
                w = tl.load(w_row + start)
                x = tl.load(x_row + start)
            else:
                w = tl.load(w_row + start, mask=(start + inner < K)[None, :], other=0.0)
                x = tl.load(x_row + start, mask=(start + inner < K)[:, None], other=0.0)
            acc = tl.dot(w, x, acc, out_dtype=acc.dtype)
    acc = acc.to(tl.float32)
    if SPLITS == 1:
        finish_tile(
            acc, rows, tokens, M, N, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, FORMAT, ADD
        )  # fmt: skip
    else:
        at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        sums_ptr += tile.to(tl.int64) * (SPLITS * ROWS * TOKENS)
        tl.store(sums_ptr + split * (ROWS * TOKENS) + at, acc)
        # Every thread's sums are stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(semaphore_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(semaphore_ptr + tile, 0)  # for the next product
            # Past the first-level cache, which does not see what other programs wrote.
            total = tl.load(sums_ptr + at, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                total += tl.load(sums_ptr + other * (ROWS * TOKENS) + at, cache_modifier=".cg")
            finish_tile(
                total, rows, tokens, M, N, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, FORMAT, ADD
            )  # fmt: skip


@triton.jit
def finish_tile(
    sums, rows, tokens, M, N, x_scale_ptr, scale_ptr, bias_ptr, y_ptr,
    FORMAT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Scale the sums [ROWS, TOKENS], add bias and residual, store them as [TOKENS, ROWS]."""
    inside, real = rows < N, tokens < M
    if FORMAT != FLOAT16:
        sums *= tl.load(scale_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    sums *= tl.load(x_scale_ptr + tokens, mask=real, other=0.0)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    there = inside[:, None] & real[None, :]
    if ADD:
        sums += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, sums.to(y_ptr.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class TiledGemm:
    """Launches `tiled_gemm_kernel` on one device.

    Args:
        semaphore: int32 [MOST_SHARED_TILES], zeros.
    """

    semaphore: torch.Tensor

    @classmethod
    def on(cls, device: torch.device) -> TiledGemm:
        return cls(torch.zeros(MOST_SHARED_TILES, dtype=torch.int32, device=device))

    def __call__(
        self,
        x: QuantizedRows,
        matrix: QuantizedTensor,
        y: torch.Tensor,
        tiles: ProductTiles,
        bias: torch.Tensor | None = None,
        add: bool = False,
    ) -> None:
        """y [M, N] = x matrix^T + bias, or with `add` y += it."""
        rows, columns = matrix.rows, matrix.columns
        step = tiles.columns
        data = matrix.data
        if x.format is RowFormat.FLOAT16:
            step, data = min(step, matrix.group), data.view(torch.uint8)
        count = triton.cdiv(rows, tiles.rows) * triton.cdiv(len(x), tiles.tokens)
        splits = min(tiles.splits, triton.cdiv(columns, step))
        sums = self.semaphore
        if splits > 1:
            assert count <= MOST_SHARED_TILES, "so many tiles fill a device by themselves"
            size = count * splits * tiles.rows * tiles.tokens
            sums = torch.empty(size, dtype=torch.float32, device=y.device)
        tiled_gemm_kernel[count * splits,](
            x.values,
            x.scale,
            data,
            matrix.scale,
            matrix.zero_point,
            bias,
            y,
            sums,
            self.semaphore,
            len(x),
            rows,
            columns,
            EVEN=columns % step == 0,
            G=matrix.group,
            FORMAT=int(x.format),
            ADD=add,
            ROWS=tiles.rows,
            TOKENS=tiles.tokens,
            COLUMNS=step,
            SPLITS=splits,
            BAND=tiles.band,
            STAGES=tiles.stages,
            num_warps=tiles.num_warps,
        )
