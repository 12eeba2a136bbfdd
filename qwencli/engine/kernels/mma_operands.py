"""What `gemm_quantized_kernel` loads, as its matrix instructions take it.

The columns of one such instruction may come in any order as long as both operands have the same. So
each of the 4 lanes of a row takes 16 bytes in a row of the weights, and of the vectors what
`quantize_activation_chunks_kernel` laid out to meet them; nothing is handed from lane to lane. All
indices are of one dimension, which leaves the compiler one way to share them among threads."""

from __future__ import annotations

import triton
import triton.language as tl

# Whether a lane's columns of an instruction are four in a row to the compiler, as they are to that
# of Triton 3.6, or two pairs, as to 3.9's. Either is right; the other one moves them among lanes.
FOURS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


@triton.jit
def row_words(
    w_ptr,
    chunk,
    end,
    rows,
    N,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Start reading TILE chunks, up to `end`, of 8 `rows` of int32 [N, WIDTH]:
    [TILE * 8 * 4 * 4], by chunk, row, lane and word."""
    i = tl.arange(0, TILE * 128)
    column = i % 16  # in order, where a lane takes all its words in a row
    if RUN < 4:
        column = i % 4 // RUN * (4 * RUN) + i // 4 % 4 * RUN + i % RUN
    of = chunk + i // 128
    column += of * 16
    row = rows + i // 16 % 8
    there = (row < N) & (column < WIDTH) & (of < end)
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
def as_float16(words, zero, BITS: tl.constexpr, FP8: tl.constexpr):
    """int32 [M] -> float16 [M, steps of a word, 2, 2] that stand for its weights, see
    `gemm_quantized`; fp8 for 2^-8 of them.

    `zero_point` is one that the compiler does not know: an exponent that is no constant lies in a
    register, where one instruction masks a word and joins it, which takes one constant, not two.
    """
    if BITS == 4:
        exponent = 0x64006400 + zero
        first = tl.join(
            both_halves((words & 0x000F000F) | exponent),
            both_halves(((words >> 8) & 0x000F000F) | exponent),
        )
        second = tl.join(
            both_halves(((words >> 4) & 0x000F000F) | exponent),
            both_halves(((words >> 12) & 0x000F000F) | exponent),
        )
        # [M, half, step, turn] -> [M, step, turn, half]
        weights = tl.permute(tl.join(first, second), (0, 2, 3, 1))
    else:
        if FP8:
            signs = zero - 0x7FFF8000
            even = ((words << 8) & signs) | ((words << 7) & 0x3F803F80)
            odd = (words & signs) | ((words >> 1) & 0x3F803F80)
        else:
            exponent = 0x64806480 + zero
            even = (words & 0x00FF00FF) ^ exponent
            odd = ((words >> 8) & 0x00FF00FF) ^ exponent
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
    zero = tl.program_id(2)  # grids have one axis
    w = tl.join(as_float16(low, zero, BITS, FP8), as_float16(high, zero, BITS, FP8))
    w = tl.reshape(w, (DEPTH, WARPS, 8, 4, PARTS, RUN * STEPS, 2, 2, 2))
    # chunk, warp, row, lane, part, step, turn, half, eight -> part of a warp, row, column
    if FOURS:
        w = tl.permute(w, (0, 4, 1, 8, 2, 5, 3, 6, 7))
    else:
        w = tl.permute(w, (0, 4, 1, 8, 2, 5, 6, 3, 7))
    return tl.reshape(w, (DEPTH * PARTS * WARPS, 16, RUN * STEPS * 16))


@triton.jit
def vector_words(
    act_values_ptr, chunk, end, BITS: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr
):
    """Start reading the vectors' values (`quantize_activation_chunks_kernel`, two in an int32) of
    the chunks from `chunk` on: [DEPTH * WARPS * 8 * 4 * 2 * 2, ...], by chunk, vector, lane, step
    of a pair and turn, and by the pairs of instructions of a chunk."""
    PAIRS: tl.constexpr = 16 // BITS
    i = tl.arange(0, DEPTH * WARPS * 128)
    at = act_values_ptr + (chunk + i // 128) * (PAIRS * 128) + i % 128
    there = chunk + i // 128 < end
    first = tl.load(at, mask=there, other=0)
    second = tl.load(at + 128, mask=there, other=0)
    if PAIRS == 4:
        first = tl.join(first, tl.load(at + 256, mask=there, other=0))
        second = tl.join(second, tl.load(at + 384, mask=there, other=0))
    return tl.join(first, second)


@triton.jit
def vectors(words, BITS: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr):
    """The other operand: [DEPTH * PARTS * WARPS, columns, 8]."""
    PAIRS: tl.constexpr = 16 // BITS  # of instructions a chunk
    PARTS: tl.constexpr = 4 // RUN
    x = tl.reshape(both_halves(words), (DEPTH, WARPS, 8, 4, 2, 2, PARTS, PAIRS // PARTS, 2))
    # chunk, warp, vector, lane, step of a pair, turn, part, pair, half -> part, column, vector
    if FOURS:
        x = tl.permute(x, (0, 6, 1, 7, 4, 3, 5, 8, 2))
    else:
        x = tl.permute(x, (0, 6, 1, 7, 4, 5, 3, 8, 2))
    return tl.reshape(x, (DEPTH * PARTS * WARPS, PAIRS // PARTS * 32, 8))


@triton.jit
def part_values(ptr, chunk, end, DEPTH: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr):
    """Start reading what each part has for each vector, as the products of a matrix instruction
    lie: [DEPTH * PARTS * WARPS * 32, 2], by part and lane, of two vectors."""
    PARTS: tl.constexpr = 4 // RUN
    i = tl.arange(0, DEPTH * PARTS * WARPS * 32)
    part = i // 32
    of = chunk + part // (PARTS * WARPS) * WARPS + part % WARPS
    at = ptr + (of * PARTS + part // WARPS % PARTS) * 8 + i % 4 * 2
    return tl.join(tl.load(at, mask=of < end, other=0.0), tl.load(at + 1, mask=of < end, other=0.0))


@triton.jit
def of_parts(pair, ALL: tl.constexpr):
    """`part_values` for all rows of the products: [ALL, 16, 8], ALL parts of all warps."""
    pair = tl.broadcast_to(tl.reshape(pair, (ALL, 1, 8, 8)), (ALL, 2, 8, 8))
    return tl.reshape(pair, (ALL, 16, 8))


@triton.jit
def group_values(
    ptr, chunk, end, rows, N, K: tl.constexpr, G: tl.constexpr, DEPTH: tl.constexpr,
    WARPS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Likewise what belongs to each part's group of G columns, float16 [N, K / G], of two rows."""
    PARTS: tl.constexpr = 4 // RUN
    GROUPS: tl.constexpr = K // G
    i = tl.arange(0, DEPTH * PARTS * WARPS * 32)
    part = i // 32
    of = chunk + part // (PARTS * WARPS) * WARPS + part % WARPS
    group = (of * 128 + part // WARPS % PARTS * (RUN * 32)) // G
    row = rows + i // 4 % 8
    at = ptr + row * GROUPS + group
    there = (of < end) & (group < GROUPS)
    low = tl.load(at, mask=(row < N) & there, other=0.0)
    return tl.join(low, tl.load(at + 8 * GROUPS, mask=(row + 8 < N) & there, other=0.0))


@triton.jit
def of_groups(pair, ALL: tl.constexpr):
    """`group_values` for all vectors: float32 [ALL, 16, 8]."""
    both = tl.reshape(pair, (ALL, 8, 4, 1, 2))
    both = tl.permute(tl.broadcast_to(both, (ALL, 8, 4, 2, 2)), (0, 4, 1, 2, 3))
    return tl.reshape(both, (ALL, 16, 8)).to(tl.float32)
