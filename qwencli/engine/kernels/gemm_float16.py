"""Products of matrices of 16-bit floats with 2 to 8 vectors, on matrix units.

As in `gemm_quantized`, a program owns 16 rows, and each of its warps chunks of columns of its own.
A chunk is what the 4 lanes of a row read at once, 16 bytes each: 32 columns. The columns of a
matrix instruction may come in any order as long as both operands have the same, so a lane's 16
bytes of a row meet its 16 bytes of a vector as they lie in memory, and nothing passes through
shared memory. While one tile is worked on the next is on its way, of the matrix and of the vectors.

Vectors are rounded after their norm, to the type they have. Its factors come from the squares that
the kernel in front left behind (`splitk_epilogue`), or from the vectors themselves where none did.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.activation_quant import inverse_rms_of_rows
from qwencli.engine.kernels.gemm import row_scales
from qwencli.engine.kernels.mma_operands import FOURS, row_words
from qwencli.engine.kernels.splitk_epilogue import load_epilogue_inputs, splitk_epilogue

CHUNK = 32  # columns


@triton.jit
def vector_words(x_ptr, chunk, end, WIDTH: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Start reading TILE chunks, up to `end`, of int32 [TOKENS, WIDTH], or of [WIDTH] for all with
    TOKENS 0: [TILE * 8 * 4 * 4], by chunk, vector, lane and word."""
    i = tl.arange(0, TILE * 128)
    of = chunk + i // 128
    column = of * 16 + i % 16
    there = (column < WIDTH) & (of < end)
    if TOKENS > 0:
        vector = i // 16 % 8
        there &= vector < TOKENS
        column += vector * WIDTH
    return tl.load(x_ptr + column, mask=there, other=0)


@triton.jit
def as_floats(words, TYPE: tl.constexpr):
    """Two floats of TYPE in each int32: [..., 2]."""
    low = words.to(tl.int16).to(TYPE, bitcast=True)
    high = (words >> 16).to(tl.int16).to(TYPE, bitcast=True)
    return tl.join(low, high)


@triton.jit
def rows_operand(low, high, TYPE: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr):
    """8 rows and the 8 after them -> [WARPS, 16, DEPTH * 32]."""
    w = tl.join(as_floats(low, TYPE), as_floats(high, TYPE))
    w = tl.reshape(w, (DEPTH, WARPS, 8, 4, 2, 2, 2, 2))
    # chunk, warp, row, lane, step, turn, half, eight -> warp, row, column
    w = tl.permute(w, (1, 7, 2, 0, 4, 3, 5, 6) if FOURS else (1, 7, 2, 0, 4, 5, 3, 6))
    return tl.reshape(w, (WARPS, 16, DEPTH * 32))


@triton.jit
def vectors_operand(x, DEPTH: tl.constexpr, WARPS: tl.constexpr):
    """Vectors [M, 2] of two floats a word -> [WARPS, DEPTH * 32, 8]."""
    x = tl.reshape(x, (DEPTH, WARPS, 8, 4, 2, 2, 2))
    # chunk, warp, vector, lane, step, turn, half -> warp, column, vector
    x = tl.permute(x, (1, 0, 4, 3, 5, 6, 2) if FOURS else (1, 0, 4, 5, 3, 6, 2))
    return tl.reshape(x, (WARPS, DEPTH * 32, 8))


@triton.jit
def normed(x, gain, factors, TILE: tl.constexpr, ZERO_CENTRED: tl.constexpr):
    """Vectors [M, 2] in the order they are read in, their gains likewise, and factors [8]."""
    gain = gain.to(tl.float32)
    if ZERO_CENTRED:
        gain += 1.0
    y = tl.reshape(x.to(tl.float32) * gain, (TILE, 8, 32))
    return tl.reshape((y * factors[None, :, None]).to(x.dtype), x.shape)


@triton.jit
def gemm_float16_kernel(
    x_ptr,  # int32 [TOKENS, K / 2]: two floats of TYPE each, as in all of these
    gain_ptr,  # int32 [K / 2], weight of the RMS norm of x; None = no norm
    norm_squares_ptr,  # float32 [SHARES, 8], sums of squares of shares of x
    w_ptr,  # int32 [N, K / 2], or [2 N, K / 2] for SWIGLU
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
    RUN: tl.constexpr,
    TYPE: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemv_kernel` for each vector, 16 rows a program, whose columns SPLITS programs share.
    DEPTH: chunks that a warp reads at once. ZERO_CENTRED: the norm multiplies by 1 + gain."""
    WIDTH: tl.constexpr = K // 2
    TILE: tl.constexpr = DEPTH * WARPS
    CHUNKS: tl.constexpr = (K + 31) // 32
    EACH: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    first = tl.program_id(0) // SPLITS * 16
    begin = tl.program_id(0) % SPLITS * EACH
    end = tl.minimum(begin + EACH, CHUNKS)
    up_ptr = w_ptr + N.to(tl.int64) * WIDTH
    low = row_words(w_ptr, begin, end, first, N, WIDTH, TILE, 4)
    high = row_words(w_ptr, begin, end, first + 8, N, WIDTH, TILE, 4)
    if SWIGLU:
        up_low = row_words(up_ptr, begin, end, first, N, WIDTH, TILE, 4)
        up_high = row_words(up_ptr, begin, end, first + 8, N, WIDTH, TILE, 4)
    if gain_ptr is not None:
        gain = vector_words(gain_ptr, begin, end, WIDTH, 0, TILE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    words = vector_words(x_ptr, begin, end, WIDTH, TOKENS, TILE)
    if gain_ptr is not None:
        if SHARES == 0:
            factors = row_scales(x_ptr.to(tl.pointer_type(TYPE)), eps, K, WARPS * 128, TOKENS)
        else:
            factors = inverse_rms_of_rows(norm_squares_ptr, eps, K, SHARES)
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
        next_low = row_words(w_ptr, after, end, first, N, WIDTH, TILE, 4)
        next_high = row_words(w_ptr, after, end, first + 8, N, WIDTH, TILE, 4)
        if SWIGLU:
            next_up_low = row_words(up_ptr, after, end, first, N, WIDTH, TILE, 4)
            next_up_high = row_words(up_ptr, after, end, first + 8, N, WIDTH, TILE, 4)
        next_words = vector_words(x_ptr, after, end, WIDTH, TOKENS, TILE)
        x = as_floats(words, TYPE)
        if gain_ptr is not None:
            next_gain = vector_words(gain_ptr, after, end, WIDTH, 0, TILE)
            x = normed(x, as_floats(gain, TYPE), factors, TILE, ZERO_CENTRED)
            gain = next_gain
        vectors = vectors_operand(x, DEPTH, WARPS)
        acc = tl.dot(rows_operand(low, high, TYPE, DEPTH, WARPS), vectors, acc)
        low, high = next_low, next_high
        if SWIGLU:
            up_acc = tl.dot(rows_operand(up_low, up_high, TYPE, DEPTH, WARPS), vectors, up_acc)
            up_low, up_high = next_up_low, next_up_high
        words = next_words

    splitk_epilogue(
        tl.sum(acc, axis=0), tl.sum(up_acc, axis=0), state, first, N, bias_ptr, y_ptr, best_ptr,
        partial_sums_ptr, semaphore_ptr, next_gain_ptr, act_values_ptr, act_group_scales_ptr,
        act_offsets_ptr, sum_squares_ptr, TOKENS, SWIGLU, ADD, ARGMAX, SPLITS, ACT_FORMAT, RUN,
    )  # fmt: skip
