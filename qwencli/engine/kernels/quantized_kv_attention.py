"""Attention over a quantized cache, whose bytes are read as matrix instructions take them.

As in `mma_operands`: what a contraction runs over may come in any order that both operands share,
so a lane reads 16 bytes in a row that become its own operand, and all indices are of one dimension.
Each warp has 8 * TURNS slots of a block and a softmax of its own; all are joined at the end.

keys     rows of slots: the 4 lanes of a row read it together. Queries are the columns, in the order
         in which the bytes of a key become float16.
values   transposed, rows of the head: a lane reads its columns of 2 * TURNS slots, and a pair of
         float16 is one column of two of them. Weights are the columns: these alone change lanes.

Slot TURNS * (2 lane + half) + turn of a warp is row 8 * turn + 2 lane + half of the scores: what a
lane reads of the turns lies side by side, under one address.

What stands for a byte is 1152 + q of int8, and 2^-8 of an fp8. -1152 times the sum of the queries
is where scores start from; that of the weights is taken off the result. Float16 has three bits more
than bfloat16 and less range: queries, divided by the root of D, have to stay below 45,000. Weights
have their value's scale in them, and are in units of about 2^-10 of the largest so far: what
float16 rounds to nothing is 2^-34 of that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwencli.engine.kernels.mma_operands import FOURS, as_float16

# Scores that are not there: finite, so that a warp without slots has no difference of infinities.
LOWEST = tl.constexpr(-1e30)
ROOM = tl.constexpr(10.0)
LOGARITHM = tl.constexpr(2.0**-23)
BIAS = tl.constexpr(127.0)
OFFSET = tl.constexpr(1152.0)


@triton.jit
def key_words(k_ptr, start, end, D: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """Start reading the keys of BLOCK slots: int32 [M], by turn, part of a row, warp, slot of a
    turn, lane and word."""
    RUN: tl.constexpr = 4 if D >= 64 else D // 16
    PARTS: tl.constexpr = D // (16 * RUN)
    TURNS: tl.constexpr = BLOCK // (8 * WARPS)
    i = tl.arange(0, BLOCK * D // 4)
    row = i // (4 * RUN) % 8
    warp = i // (32 * RUN) % WARPS
    part = i // (32 * RUN * WARPS) % PARTS
    turn = i // (32 * RUN * WARPS * PARTS)
    slot = start + (warp * 8 + row) * TURNS + turn
    at = slot.to(tl.int64) * (D // 4) + part * (4 * RUN) + i % (4 * RUN)
    return tl.load(k_ptr.to(tl.pointer_type(tl.int32)) + at, mask=slot < end, other=0)


@triton.jit
def value_words(v_ptr, start, end, D: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """Likewise the values: by part of a row, turn, half, warp, eighth of a part, lane and word."""
    RUN: tl.constexpr = 4 if D >= 128 else D // 32
    TURNS: tl.constexpr = BLOCK // (8 * WARPS)
    i = tl.arange(0, BLOCK * D // 4)
    lane = i // RUN % 4
    eighth = i // (4 * RUN) % 8
    warp = i // (32 * RUN) % WARPS
    half = i // (32 * RUN * WARPS) % 2
    turn = i // (64 * RUN * WARPS) % TURNS
    part = i // (64 * RUN * WARPS * TURNS)
    slot = start + (warp * 8 + lane * 2 + half) * TURNS + turn
    at = slot.to(tl.int64) * (D // 4) + (part * 8 + eighth) * RUN + i % RUN
    return tl.load(v_ptr.to(tl.pointer_type(tl.int32)) + at, mask=slot < end, other=0)


@triton.jit
def slot_scales(ptr, start, end, BLOCK: tl.constexpr):
    """Likewise the scales: [BLOCK], a slot's in one lane."""
    slot = start + tl.arange(0, BLOCK)
    return tl.load(ptr + slot, mask=slot < end, other=1.0)


@triton.jit
def of_slots(scales, WARPS: tl.constexpr):
    """`slot_scales` in the order of the scores, by way of shared memory: [WARPS, slots, 1]."""
    TURNS: tl.constexpr = scales.shape[0] // (8 * WARPS)
    each = tl.permute(tl.reshape(scales, (WARPS, 8, TURNS)), (0, 2, 1))
    return tl.reshape(each, (WARPS, 8 * TURNS))[:, :, None]


@triton.jit
def keys_operand(
    words, zero, FP8: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr
):
    """`key_words` -> float16 [WARPS, slots, D]."""
    RUN: tl.constexpr = 4 if D >= 64 else D // 16
    PARTS: tl.constexpr = D // (16 * RUN)
    TURNS: tl.constexpr = BLOCK // (8 * WARPS)
    k = tl.reshape(as_float16(words, zero, 8, FP8), (TURNS, PARTS, WARPS, 8, 4, RUN, 2, 2))
    # turn, part, warp, row, lane, word, odd, half -> warp, slot, column
    k = tl.permute(k, (2, 0, 3, 1, 5, 4, 6, 7) if FOURS else (2, 0, 3, 1, 5, 6, 4, 7))
    return tl.reshape(k, (WARPS, 8 * TURNS, D))


@triton.jit
def queries_operand(low, high, WARPS: tl.constexpr):
    """Halves [ROWS, D / 2] of queries -> float16 [WARPS, D, ROWS], in the order of the keys."""
    ROWS: tl.constexpr = low.shape[0]
    D: tl.constexpr = 2 * low.shape[1]
    RUN: tl.constexpr = 4 if D >= 64 else D // 16
    # Joined, they would be of 8 bits to the compiler, which changes what it makes of `FOURS`.
    q = tl.where(tl.arange(0, 2)[None, :, None] == 0, low[:, None, :], high[:, None, :])
    q = tl.reshape(q, (ROWS, D)).to(tl.float16)
    q = tl.reshape(q, (ROWS, D // (16 * RUN), 4, RUN, 2, 2))
    # query, part, lane, word, half, odd -> column, query
    q = tl.permute(q, (1, 3, 2, 5, 4, 0) if FOURS else (1, 3, 5, 2, 4, 0))
    return tl.broadcast_to(tl.reshape(q, (1, D, ROWS)), (WARPS, D, ROWS))


@triton.jit
def values_operand(
    words, zero, FP8: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr
):
    """`value_words` -> float16 [WARPS, D, slots], columns in an order that `in_order` undoes."""
    RUN: tl.constexpr = 4 if D >= 128 else D // 32
    PARTS: tl.constexpr = D // (32 * RUN)
    TURNS: tl.constexpr = BLOCK // (8 * WARPS)
    v = as_float16(words, zero, 8, FP8)
    v = tl.reshape(v, (PARTS, TURNS // 2, 2, 2, WARPS, 8, 4, RUN, 2, 2))
    # part, two turns, turn, pair, warp, eighth, lane, word, odd, half -> warp, column, slot
    v = tl.permute(
        v, (4, 0, 7, 8, 9, 5, 1, 6, 2, 3) if FOURS else (4, 0, 7, 8, 9, 5, 1, 2, 6, 3)
    )  # fmt: skip
    return tl.reshape(v, (WARPS, D, 8 * TURNS))


@triton.jit
def weights_operand(w):
    """[WARPS, slots, ROWS], slots in the order of the values."""
    WARPS: tl.constexpr = w.shape[0]
    SLOTS: tl.constexpr = w.shape[1]
    ROWS: tl.constexpr = w.shape[2]
    if FOURS:
        w = tl.reshape(w, (WARPS, SLOTS // 16, 2, 4, 2, ROWS))
        w = tl.reshape(tl.permute(w, (0, 1, 3, 2, 4, 5)), (WARPS, SLOTS, ROWS))
    return w


@triton.jit
def in_order(acc):
    """[D, ROWS] in the order of `values_operand` -> [ROWS, D]."""
    D: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[1]
    RUN: tl.constexpr = 4 if D >= 128 else D // 32
    acc = tl.reshape(acc, (D // (32 * RUN), RUN, 2, 2, 8, ROWS))
    # part, word, odd, half, eighth, query -> query, column
    return tl.reshape(tl.permute(acc, (5, 0, 4, 1, 3, 2)), (ROWS, D))


@triton.jit
def sums_of_turns(weights):
    """[WARPS, slots, ROWS] -> [WARPS, 8, ROWS], within threads."""
    WARPS: tl.constexpr = weights.shape[0]
    TURNS: tl.constexpr = weights.shape[1] // 8
    ROWS: tl.constexpr = weights.shape[2]
    return tl.sum(tl.reshape(weights, (WARPS, TURNS, 8, ROWS)), axis=1)


@triton.jit
def known_after_reads(row_max):
    """Zero, for `as_float16`, by way of shared memory: what depends on it comes after the reads in
    front of it. By itself the assembler moves reads that only the next turn needs to the end of
    the turn, where they are waited for at once."""
    return (tl.max(tl.max(row_max, axis=1), axis=0) == float("inf")).to(tl.int32)


@triton.jit
def attend_cached(
    q_low,  # float32 [ROWS, D / 2]
    q_high,
    k_words,  # these four of the first block
    v_words,
    k_scale,
    v_scale,
    k_ptr,  # int8, fp8 as its bits
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    start,
    end,
    running_max,  # [ROWS], of what was looked at before
    running_sum,  # [ROWS]
    acc,  # [ROWS, D]
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
):
    """`running_max`, `running_sum` and `acc` with the slots from `start` to `end`."""
    ROWS: tl.constexpr = q_low.shape[0]
    D: tl.constexpr = 2 * q_low.shape[1]
    TURNS: tl.constexpr = BLOCK // (8 * WARPS)
    UNIT: tl.constexpr = 256.0 if FP8 else 1.0
    q = queries_operand(q_low, q_high, WARPS)
    starts = tl.zeros((WARPS, 8 * TURNS, ROWS), tl.float32)
    if not FP8:
        starts -= OFFSET * tl.sum(q.to(tl.float32), axis=1)[:, None, :]
    row = tl.arange(0, 8 * TURNS)[None, :, None]
    place = tl.arange(0, WARPS)[:, None, None] * (8 * TURNS) + row % 8 * TURNS + row // 8
    row_max = tl.full((WARPS, ROWS), LOWEST, tl.float32)
    row_sum = tl.zeros((WARPS, 8, ROWS), tl.float32)
    sums = tl.zeros((WARPS, 8, ROWS), tl.float32)
    found = tl.zeros((WARPS, D, ROWS), tl.float32)
    while start < end:
        there = start + place < end
        start += BLOCK
        # The next block is read while this one is worked on.
        next_k = key_words(k_ptr, start, end, D, BLOCK, WARPS)
        next_v = value_words(v_ptr, start, end, D, BLOCK, WARPS)
        next_k_scale = slot_scales(k_scales_ptr, start, end, BLOCK)
        next_v_scale = slot_scales(v_scales_ptr, start, end, BLOCK)
        zero = known_after_reads(row_max)
        scores = tl.dot(keys_operand(k_words, zero, FP8, D, BLOCK, WARPS), q, starts)
        scores *= of_slots(k_scale, WARPS) * UNIT
        of_values = of_slots(v_scale, WARPS)
        scores = tl.where(there, scores, float("-inf"))
        # The bits of a float are its logarithm to within a tenth, but for a factor and a bias: that
        # is enough for a unit.
        scaled = scores + of_values.to(tl.int32, bitcast=True).to(tl.float32) * LOGARITHM
        new_row_max = tl.maximum(row_max, tl.max(scaled, axis=1) - (BIAS + ROOM))
        weights = tl.exp2(scores - new_row_max[:, None, :])
        shrink = tl.exp2(row_max - new_row_max)[:, None, :]
        row_sum = row_sum * shrink + sums_of_turns(weights)
        w = (weights * of_values).to(tl.float16)
        if not FP8:
            sums = sums * shrink + sums_of_turns(w.to(tl.float32))
        v = values_operand(v_words, zero, FP8, D, BLOCK, WARPS)
        found = tl.dot(v, weights_operand(w), found * shrink)
        row_max = new_row_max
        k_words, v_words, k_scale, v_scale = next_k, next_v, next_k_scale, next_v_scale

    if not FP8:
        found -= OFFSET * tl.sum(sums, axis=1)[:, None, :]
    new_max = tl.maximum(running_max, tl.max(row_max, axis=0))
    shrink = tl.exp2(running_max - new_max)
    factors = tl.exp2(row_max - new_max[None, :])
    running_sum = running_sum * shrink + tl.sum(tl.sum(row_sum, axis=1) * factors, axis=0)
    found = in_order(tl.sum(found * (factors * UNIT)[:, None, :], axis=0))
    return new_max, running_sum, acc * shrink[:, None] + found
