"""Products of quantized matrices with 2 to 8 vectors, on matrix units.

A program owns 16 rows, and each of its warps chunks of columns of its own (`rounding`), whose
products are added up at the end. While one tile is worked on the next is on its way; the first one
is before the wait for the kernel in front (programmatic dependent launch).

Weights become float16 two at a time: their bits under an exponent, so that int8 reads 1152 + q and
int4 1024 + q. What that is too much is where the sum starts from. fp8 reads as float16 with an
exponent that is 8 too small, which is in the vectors' units.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.epilogue import store_several
from qwencli.engine.kernels.operands import of_groups, of_parts, operand, row_words, vectors
from qwencli.engine.kernels.rounding import shared_norms

ROWS = 16  # of a program: what a matrix instruction takes


@triton.jit
def quantized_dots(
    low, high, x, unit, starts, scale_ptr, zero_ptr, chunk, rows, N, K: tl.constexpr,
    BITS: tl.constexpr, FP8: tl.constexpr, G: tl.constexpr, DEPTH: tl.constexpr,
    WARPS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Products of a tile of 16 rows with 8 vectors: [WARPS, 16, 8]."""
    w = operand(low, high, BITS, FP8, DEPTH, WARPS, RUN)
    products = (tl.dot(w, x) if FP8 else tl.dot(w, x, starts)) * unit
    if BITS == 4:
        zero = of_groups(zero_ptr, chunk, rows, N, K, G, DEPTH, WARPS, RUN)
        scale = of_groups(scale_ptr, chunk, rows, N, K, G, DEPTH, WARPS, RUN)
        products = scale * (products + zero * (starts * unit * (1.0 / 1024.0)))
    return tl.sum(tl.reshape(products, (DEPTH * 4 // RUN, WARPS, 16, 8)), axis=0)


@triton.jit
def gemm_quantized_kernel(
    values_ptr,  # what `round_kernel` made of the vectors: these three
    units_ptr,
    starts_ptr,
    squares_ptr,
    w_ptr,  # int32 [N, K * BITS / 32], or [2 N, ..] for SWIGLU
    scale_ptr,  # float32 [N] or [2 N]; int4: float16 [.., K / G]
    zero_ptr,  # int4: float16, as scale
    bias_ptr,  # [N]
    y_ptr,  # [TOKENS, N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    fed_ptr,  # int64 [TOKENS], the tokens of this step
    best_ptr,  # int64 [TOKENS]
    N,
    eps,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    WARPS: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    RUN: tl.constexpr,
    G: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemm_kernel`, 16 rows a program. DEPTH: chunks that a warp reads at once."""
    WIDTH: tl.constexpr = K * BITS // 32
    COLUMNS: tl.constexpr = 512 // BITS
    CHUNKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    TILE: tl.constexpr = DEPTH * WARPS
    first = tl.program_id(0) * 16
    up_ptr = w_ptr + N.to(tl.int64) * WIDTH
    low = row_words(w_ptr, 0, first, N, WIDTH, TILE, RUN)
    high = row_words(w_ptr, 0, first + 8, N, WIDTH, TILE, RUN)
    if SWIGLU:
        up_low = row_words(up_ptr, 0, first, N, WIDTH, TILE, RUN)
        up_high = row_words(up_ptr, 0, first + 8, N, WIDTH, TILE, RUN)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = vectors(values_ptr, 0, CHUNKS, BITS, DEPTH, WARPS, RUN)
    unit = of_parts(units_ptr, 0, CHUNKS, DEPTH, WARPS, RUN)
    starts = of_parts(starts_ptr, 0, CHUNKS, DEPTH, WARPS, RUN)
    acc = tl.zeros((WARPS, 16, 8), tl.float32)
    up_acc = tl.zeros((WARPS, 16, 8), tl.float32)
    for chunk in tl.range(0, CHUNKS, TILE, num_stages=1):
        after = (chunk + TILE) * 16
        next_low = row_words(w_ptr, after, first, N, WIDTH, TILE, RUN)
        next_high = row_words(w_ptr, after, first + 8, N, WIDTH, TILE, RUN)
        if SWIGLU:
            next_up_low = row_words(up_ptr, after, first, N, WIDTH, TILE, RUN)
            next_up_high = row_words(up_ptr, after, first + 8, N, WIDTH, TILE, RUN)
        next_x = vectors(values_ptr, chunk + TILE, CHUNKS, BITS, DEPTH, WARPS, RUN)
        next_unit = of_parts(units_ptr, chunk + TILE, CHUNKS, DEPTH, WARPS, RUN)
        next_starts = of_parts(starts_ptr, chunk + TILE, CHUNKS, DEPTH, WARPS, RUN)
        acc += quantized_dots(
            low, high, x, unit, starts, scale_ptr, zero_ptr, chunk, first, N,
            K, BITS, FP8, G, DEPTH, WARPS, RUN,
        )  # fmt: skip
        low, high = next_low, next_high
        if SWIGLU:
            far = N.to(tl.int64) * (K // G)
            up_acc += quantized_dots(
                up_low, up_high, x, unit, starts, scale_ptr + far, zero_ptr + far, chunk, first, N,
                K, BITS, FP8, G, DEPTH, WARPS, RUN,
            )  # fmt: skip
            up_low, up_high = next_up_low, next_up_high
        x, unit, starts = next_x, next_unit, next_starts

    rows = first + tl.arange(0, 16)
    inside = rows < N
    y = tl.sum(acc, axis=0)  # [16, 8]
    up_y = tl.sum(up_acc, axis=0)
    if NORM:
        norms = shared_norms(squares_ptr, eps, K, CHUNKS)[None, :]
        y *= norms
        up_y *= norms
    if BITS == 8:
        y *= tl.load(scale_ptr + rows, mask=inside, other=0.0)[:, None]
        if SWIGLU:
            up_y *= tl.load(scale_ptr + N + rows, mask=inside, other=0.0)[:, None]
    store_several(
        y, up_y, rows, N, bias_ptr, y_ptr, seen_ptr, penalty_ptr, fed_ptr, best_ptr,
        TOKENS, SWIGLU, BIAS, ADD, ARGMAX,
    )  # fmt: skip
