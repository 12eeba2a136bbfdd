"""Products of quantized matrices with 2 to 8 vectors, on matrix units.

A program owns 16 rows, and each of its warps chunks of columns of its own (`activation_quant`),
whose products are added up at the end, with those of the programs that share the rows
(`splitk_epilogue`). While one tile is worked on the next is on its way, with its groups' scales;
the first one is before the wait for the kernel in front (programmatic dependent launch).

Weights become float16 two at a time: their bits under an exponent, so that int8 reads 1152 + q and
int4 1024 + q. What that is too much is where the sum starts from. fp8 reads as float16 with an
exponent that is 8 too small, which is in the vectors' units.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.activation_quant import inverse_rms_of_rows
from qwencli.engine.kernels.mma_operands import (
    group_values,
    of_groups,
    of_parts,
    operand,
    part_values,
    row_words,
    vector_words,
    vectors,
)
from qwencli.engine.kernels.splitk_epilogue import load_epilogue_inputs, splitk_epilogue

ROWS = 16  # of a program: what a matrix instruction takes


@triton.jit
def quantized_dots(
    low, high, x, unit, starts, scale, zero, BITS: tl.constexpr, FP8: tl.constexpr,
    DEPTH: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Products of a tile of 16 rows with 8 vectors: [WARPS, 16, 8]."""
    ALL: tl.constexpr = DEPTH * 4 // RUN * WARPS
    w = operand(low, high, BITS, FP8, DEPTH, WARPS, RUN)
    unit = of_parts(unit, ALL)
    starts = of_parts(starts, ALL)
    products = (tl.dot(w, x) if FP8 else tl.dot(w, x, starts)) * unit
    if BITS == 4:
        sums = starts * unit * (1.0 / 1024.0)
        products = of_groups(scale, ALL) * (products + of_groups(zero, ALL) * sums)
    return tl.sum(tl.reshape(products, (DEPTH * 4 // RUN, WARPS, 16, 8)), axis=0)


@triton.jit
def gemm_quantized_kernel(
    # The vectors, rounded: these four as in `quantize_activation_chunks_kernel`, two values an
    # int32.
    x_values_ptr,
    x_group_scales_ptr,
    x_offsets_ptr,
    x_sum_squares_ptr,  # [SHARES, 8]
    w_ptr,  # int32 [N, K * BITS / 32], or [2 N, ..] for SWIGLU
    scale_ptr,  # float32 [N] or [2 N]; int4: float16 [.., K / G]
    zero_point_ptr,  # int4: float16, as scale
    bias_ptr,  # [N], or None
    y_ptr,  # [TOKENS, N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    input_ids_ptr,  # int64 [TOKENS], the tokens of this step
    best_ptr,  # int64 [TOKENS]
    partial_sums_ptr,  # these as in `splitk_epilogue`
    semaphore_ptr,
    next_gain_ptr,
    act_values_ptr,
    act_group_scales_ptr,
    act_offsets_ptr,
    sum_squares_ptr,
    N,
    eps,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARES: tl.constexpr,
    TOKENS: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    ACT_FORMAT: tl.constexpr,
    NEXT_RUN: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    RUN: tl.constexpr,
    G: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemm_float16_kernel`. SHARES is 0 without a norm."""
    WIDTH: tl.constexpr = K * BITS // 32
    COLUMNS: tl.constexpr = 512 // BITS
    CHUNKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    TILE: tl.constexpr = DEPTH * WARPS
    EACH: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    first = tl.program_id(0) // SPLITS * 16
    begin = tl.program_id(0) % SPLITS * EACH
    end = tl.minimum(begin + EACH, CHUNKS)
    up_ptr = w_ptr + N.to(tl.int64) * WIDTH
    low = row_words(w_ptr, begin, end, first, N, WIDTH, TILE, RUN)
    high = row_words(w_ptr, begin, end, first + 8, N, WIDTH, TILE, RUN)
    if SWIGLU:
        up_low = row_words(up_ptr, begin, end, first, N, WIDTH, TILE, RUN)
        up_high = row_words(up_ptr, begin, end, first + 8, N, WIDTH, TILE, RUN)
    scale, zero, up_scale, up_zero = 0.0, 0.0, 0.0, 0.0  # of int8 and fp8: at the end
    if BITS == 4:
        scale = group_values(scale_ptr, begin, end, first, N, K, G, DEPTH, WARPS, RUN)
        zero = group_values(zero_point_ptr, begin, end, first, N, K, G, DEPTH, WARPS, RUN)
        if SWIGLU:
            far = N.to(tl.int64) * (K // G)
            up_scale = group_values(scale_ptr + far, begin, end, first, N, K, G, DEPTH, WARPS, RUN)
            up_zero = group_values(
                zero_point_ptr + far, begin, end, first, N, K, G, DEPTH, WARPS, RUN
            )
    else:
        rows = first + tl.arange(0, 16)
        row_scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
        if SWIGLU:
            up_row_scale = tl.load(scale_ptr + N + rows, mask=rows < N, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    words = vector_words(x_values_ptr, begin, end, BITS, DEPTH, WARPS)
    unit = part_values(x_group_scales_ptr, begin, end, DEPTH, WARPS, RUN)
    starts = part_values(x_offsets_ptr, begin, end, DEPTH, WARPS, RUN)
    norms = tl.full((1, 8), 1.0, tl.float32)
    if SHARES > 0:
        norms = inverse_rms_of_rows(x_sum_squares_ptr, eps, K, SHARES)[None, :]
    state = load_epilogue_inputs(
        first,
        N,
        bias_ptr,
        y_ptr,
        seen_ptr,
        penalty_ptr,
        input_ids_ptr,
        TOKENS,
        ADD,
        ARGMAX,
        SPLITS,
        ACT_FORMAT,
    )
    acc = tl.zeros((WARPS, 16, 8), tl.float32)
    up_acc = tl.zeros((WARPS, 16, 8), tl.float32)
    for chunk in tl.range(begin, end, TILE, num_stages=1):
        after = chunk + TILE
        next_low = row_words(w_ptr, after, end, first, N, WIDTH, TILE, RUN)
        next_high = row_words(w_ptr, after, end, first + 8, N, WIDTH, TILE, RUN)
        if SWIGLU:
            next_up_low = row_words(up_ptr, after, end, first, N, WIDTH, TILE, RUN)
            next_up_high = row_words(up_ptr, after, end, first + 8, N, WIDTH, TILE, RUN)
        if BITS == 4:
            next_scale = group_values(scale_ptr, after, end, first, N, K, G, DEPTH, WARPS, RUN)
            next_zero = group_values(zero_point_ptr, after, end, first, N, K, G, DEPTH, WARPS, RUN)
            if SWIGLU:
                next_up_scale = group_values(
                    scale_ptr + far, after, end, first, N, K, G, DEPTH, WARPS, RUN
                )
                next_up_zero = group_values(
                    zero_point_ptr + far, after, end, first, N, K, G, DEPTH, WARPS, RUN
                )
        next_words = vector_words(x_values_ptr, after, end, BITS, DEPTH, WARPS)
        next_unit = part_values(x_group_scales_ptr, after, end, DEPTH, WARPS, RUN)
        next_starts = part_values(x_offsets_ptr, after, end, DEPTH, WARPS, RUN)
        x = vectors(words, BITS, DEPTH, WARPS, RUN)
        acc += quantized_dots(low, high, x, unit, starts, scale, zero, BITS, FP8, DEPTH, WARPS, RUN)
        low, high = next_low, next_high
        if BITS == 4:
            scale, zero = next_scale, next_zero
        if SWIGLU:
            up_acc += quantized_dots(
                up_low, up_high, x, unit, starts, up_scale, up_zero, BITS, FP8, DEPTH, WARPS, RUN
            )
            up_low, up_high = next_up_low, next_up_high
            if BITS == 4:
                up_scale, up_zero = next_up_scale, next_up_zero
        words, unit, starts = next_words, next_unit, next_starts

    y = tl.sum(acc, axis=0) * norms  # [16, 8]
    up_y = tl.sum(up_acc, axis=0) * norms
    if BITS == 8:
        y *= row_scale[:, None]
        if SWIGLU:
            up_y *= up_row_scale[:, None]
    splitk_epilogue(
        y, up_y, state, first, N, bias_ptr, y_ptr, best_ptr, partial_sums_ptr, semaphore_ptr,
        next_gain_ptr, act_values_ptr, act_group_scales_ptr, act_offsets_ptr, sum_squares_ptr,
        TOKENS, SWIGLU, ADD, ARGMAX, SPLITS, ACT_FORMAT, NEXT_RUN,
    )  # fmt: skip
