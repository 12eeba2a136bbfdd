"""Products of quantized matrices with 2 to 8 vectors, on matrix units.

Done by every program again, rounding the vectors took longer than the products. So `round_kernel`
rounds them once for all programs, to the steps that a single vector is rounded to (`handover`), and
lays them out so that what a thread loads is what its matrix instruction takes. The columns of one
such instruction may come in any order as long as both operands have the same: a lane takes 16 bytes
in a row of the weights, and never hands any of them to another lane.

A chunk is what the 4 lanes of a row read at once: 64 columns of 8 bits, 128 of 4. Each warp of a
program has chunks of its own; sums over a chunk are exact in units of the vector's largest value in
it. Weights become float16 two at a time: their bits under an exponent, so that int8 reads 1152 + q
and int4 1024 + q, and what that is too much is where the sum starts from.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.epilogue import store_several

LANE_BYTES = 16
LANES = 4  # that share a chunk of a row
ROWS = 16  # of a program: what a matrix instruction takes
# Whether a lane's columns of an instruction are four in a row to the compiler, as they are to that
# of Triton 3.6, or two pairs, as to 3.9's. Either is right; the other one moves them among lanes.
FOURS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


def chunk_columns(bits: int) -> int:
    return LANES * LANE_BYTES * 8 // bits


def words_in_a_row(group: int, columns: int) -> int:
    """Words of 4 bits that a lane takes in a row: a chunk may not end one group and begin another
    within one instruction."""
    if group == columns or group % 128 == 0:
        return 4
    return 2 if group % 64 == 0 else 1


@triton.jit
def round_kernel(
    x_ptr,  # [TOKENS, K]
    gain_ptr,  # [K], or None
    values_ptr,  # float16 [chunks, steps, 8, 4, 4], `steps` instructions of 16 columns a chunk
    units_ptr,  # float32 [chunks * PARTS, 8], PARTS of a chunk with a unit each
    starts_ptr,  # float32, as units
    squares_ptr,  # float32 [programs, 8]
    K,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    SPAN: tl.constexpr,
    RUN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Round one chunk of one vector to steps of SPAN columns, in units of each part's largest."""
    chunk = tl.program_id(0)
    token = tl.program_id(1)
    OF_WORD: tl.constexpr = 32 // BITS
    PARTS: tl.constexpr = 4 // RUN
    COLUMNS: tl.constexpr = 16 * OF_WORD
    at = tl.arange(0, COLUMNS)
    columns = chunk * COLUMNS + at
    inside = columns < K
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        tl.store(squares_ptr + chunk * 8 + token, tl.sum(x * x))
        x *= gain
    blocks = tl.reshape(x, (COLUMNS // SPAN, SPAN))
    largest = tl.maximum(tl.max(tl.abs(blocks), axis=1), 1e-30)[:, None]
    blocks *= 1.0 / largest
    if FP8:
        blocks = blocks.to(tl.float16).to(tl.float32) * largest
    else:
        # Adding 1.5 * 2^23 rounds to an integer, in the lowest bits of the result.
        q = (blocks * 127.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        blocks = q.to(tl.float32) * (largest * (1.0 / 127.0))
    parts = tl.reshape(blocks, (PARTS, COLUMNS // PARTS))
    unit = tl.maximum(tl.max(tl.abs(parts), axis=1), 1e-30)
    units = (parts * (1.0 / unit)[:, None]).to(tl.float16)
    total = tl.sum(units.to(tl.float32), axis=1)
    part = (chunk * PARTS + tl.arange(0, PARTS)) * 8 + token
    # fp8 is read as float16 with an exponent that is 8 too small.
    tl.store(units_ptr + part, unit * 256.0 if FP8 else unit)
    start = total * (-1152.0 if BITS == 8 else -1024.0)
    tl.store(starts_ptr + part, start)
    # Where the thread takes each from that multiplies it.
    word = at // OF_WORD
    lane = word // RUN % 4
    word = word // (4 * RUN) * RUN + word % RUN
    place = at % OF_WORD
    if BITS == 8:
        step = word
        turn = place % 2 * 2 + place // 2
    else:
        nibble = place % 4 * 2 + place // 4
        pair = nibble % 4
        step = word * 2 + pair // 2
        turn = pair % 2 * 2 + nibble // 4
    to = ((step // 2 * 8 + token) * 4 + lane) * 8 + step % 2 * 4 + turn
    tl.store(values_ptr + chunk * (COLUMNS * 8) + to, tl.reshape(units, (COLUMNS,)))


@triton.jit
def row_words(
    w_ptr,
    start,
    rows,
    N,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Start reading words of 8 `rows` of int32 [N, WIDTH]: [CHUNKS * 8 * 4 * 4], by chunk, row,
    lane and word."""
    i = tl.arange(0, CHUNKS * 128)
    column = i % 16  # in order, where a lane takes all its words in a row
    if RUN < 4:
        column = i % 4 // RUN * (4 * RUN) + i // 4 % 4 * RUN + i % RUN
    column += start + i // 128 * 16
    row = rows + i // 16 % 8
    there = (row < N) & (column < WIDTH)
    return tl.load(
        w_ptr + row.to(tl.int64) * WIDTH + column,
        mask=there,
        other=0,
        eviction_policy="evict_first",
    )


@triton.jit
def both_halves(pairs):
    """Two float16 in each int32: [..., 2]."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def as_float16(words, BITS: tl.constexpr, FP8: tl.constexpr):
    """int32 [M] -> float16 [M, steps of a word, 2, 2] that stand for its weights, see above; fp8
    for 2^-8 of them."""
    if BITS == 4:
        first = tl.join(
            both_halves((words & 0x000F000F) | 0x64006400),
            both_halves(((words >> 8) & 0x000F000F) | 0x64006400),
        )
        second = tl.join(
            both_halves(((words >> 4) & 0x000F000F) | 0x64006400),
            both_halves(((words >> 12) & 0x000F000F) | 0x64006400),
        )
        # [M, half, step, turn] -> [M, step, turn, half]
        weights = tl.permute(tl.join(first, second), (0, 2, 3, 1))
    else:
        if FP8:
            even = ((words << 8) & -0x7FFF8000) | ((words << 7) & 0x3F803F80)
            odd = (words & -0x7FFF8000) | ((words >> 1) & 0x3F803F80)
        else:
            even = (words & 0x00FF00FF) ^ 0x64806480
            odd = ((words >> 8) & 0x00FF00FF) ^ 0x64806480
        pairs = tl.join(both_halves(even), both_halves(odd))  # [M, half, turn]
        weights = tl.permute(pairs, (0, 2, 1))[:, None, :, :]
    return weights


@triton.jit
def operand(
    low, high, BITS: tl.constexpr, FP8: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Words of 8 rows and of the 8 after them -> float16 [DEPTH * PARTS * WARPS, 16, columns]."""
    STEPS: tl.constexpr = 8 // BITS  # of a word
    PARTS: tl.constexpr = 4 // RUN
    w = tl.join(as_float16(low, BITS, FP8), as_float16(high, BITS, FP8))
    w = tl.reshape(w, (DEPTH, WARPS, 8, 4, PARTS, RUN * STEPS, 2, 2, 2))
    # chunk, warp, row, lane, part, step, turn, half, eight -> part of a warp, row, column
    if FOURS:
        w = tl.permute(w, (0, 4, 1, 8, 2, 5, 3, 6, 7))
    else:
        w = tl.permute(w, (0, 4, 1, 8, 2, 5, 6, 3, 7))
    return tl.reshape(w, (DEPTH * PARTS * WARPS, 16, RUN * STEPS * 16))


@triton.jit
def vectors(
    values_ptr, chunk, CHUNKS: tl.constexpr, BITS: tl.constexpr, DEPTH: tl.constexpr,
    WARPS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The other operand of the chunks from `chunk` on: [DEPTH * PARTS * WARPS, columns, 8]."""
    PAIRS: tl.constexpr = 16 // BITS  # of instructions a chunk
    PARTS: tl.constexpr = 4 // RUN
    i = tl.arange(0, DEPTH * WARPS * 256)
    at = values_ptr + (chunk + i // 256) * (PAIRS * 256) + i % 256
    there = chunk + i // 256 < CHUNKS
    first = tl.load(at, mask=there, other=0.0)
    second = tl.load(at + 256, mask=there, other=0.0)
    if PAIRS == 4:
        third = tl.load(at + 512, mask=there, other=0.0)
        first = tl.join(first, third)
        second = tl.join(second, tl.load(at + 768, mask=there, other=0.0))
    x = tl.reshape(tl.join(first, second), (DEPTH, WARPS, 8, 4, 2, 2, 2, PARTS, PAIRS // PARTS))
    # chunk, warp, vector, lane, step of a pair, turn, half, part, pair -> part, column, vector
    if FOURS:
        x = tl.permute(x, (0, 7, 1, 8, 4, 3, 5, 6, 2))
    else:
        x = tl.permute(x, (0, 7, 1, 8, 4, 5, 3, 6, 2))
    return tl.reshape(x, (DEPTH * PARTS * WARPS, PAIRS // PARTS * 32, 8))


@triton.jit
def of_parts(ptr, chunk, CHUNKS: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
             RUN: tl.constexpr):  # fmt: skip
    """What each part has for each vector, as the products of a matrix instruction lie."""
    PARTS: tl.constexpr = 4 // RUN
    i = tl.arange(0, DEPTH * PARTS * WARPS * 32)
    part = i // 32
    of = chunk + part // (PARTS * WARPS) * WARPS + part % WARPS
    at = ptr + (of * PARTS + part // WARPS % PARTS) * 8 + i % 4 * 2
    pair = tl.join(
        tl.load(at, mask=of < CHUNKS, other=0.0), tl.load(at + 1, mask=of < CHUNKS, other=0.0)
    )
    pair = tl.reshape(pair, (DEPTH * PARTS * WARPS, 1, 8, 8))
    pair = tl.broadcast_to(pair, (DEPTH * PARTS * WARPS, 2, 8, 8))
    return tl.reshape(pair, (DEPTH * PARTS * WARPS, 16, 8))


@triton.jit
def of_groups(
    ptr, chunk, rows, N, K: tl.constexpr, G: tl.constexpr, DEPTH: tl.constexpr,
    WARPS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """What belongs to each part's group of G columns, float16 [N, K / G], likewise."""
    PARTS: tl.constexpr = 4 // RUN
    GROUPS: tl.constexpr = K // G
    i = tl.arange(0, DEPTH * PARTS * WARPS * 32)
    part = i // 32
    of = chunk + part // (PARTS * WARPS) * WARPS + part % WARPS
    group = (of * 128 + part // WARPS % PARTS * (RUN * 32)) // G
    row = rows + i // 4 % 8
    at = ptr + row * GROUPS + group
    low = tl.load(at, mask=(row < N) & (group < GROUPS), other=0.0)
    high = tl.load(at + 8 * GROUPS, mask=(row + 8 < N) & (group < GROUPS), other=0.0)
    both = tl.reshape(tl.join(low, high), (DEPTH * PARTS * WARPS, 8, 4, 1, 2))
    both = tl.permute(tl.broadcast_to(both, (DEPTH * PARTS * WARPS, 8, 4, 2, 2)), (0, 4, 1, 2, 3))
    return tl.reshape(both, (DEPTH * PARTS * WARPS, 16, 8)).to(tl.float32)


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


@triton.jit
def shared_norms(squares_ptr, eps, K: tl.constexpr, SHARES: tl.constexpr):
    """What the RMS norm multiplies each of 8 vectors with, from SHARES sums of squares: [8]."""
    squares = tl.zeros((32, 8), tl.float32)
    for i in tl.static_range((SHARES + 31) // 32):
        share = i * 32 + tl.arange(0, 32)[:, None]
        at = squares_ptr + share * 8 + tl.arange(0, 8)[None, :]
        squares += tl.load(at, mask=share < SHARES, other=0.0)
    return tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
