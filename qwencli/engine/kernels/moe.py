"""A mixture of experts: the router, and products that read the chosen experts' weights alone.

Few rows (a step of up to `MAX_BATCH_ROWS`) are three kernels. `route_kernel` norms a row and
multiplies it by the router; the program of a row that arrives last picks its experts. Then each
pair of a row and an expert is a product of its own: gate and up with SwiGLU, and down, in which a
program goes through all experts of its row and adds up their results by weight.

More rows and prompts sort the pairs by expert, and each expert's rows are tiles of a grouped
product. The host knows how many pairs there are and not whose: programs find their expert by where
its pairs begin, and those behind the last tile have nothing to do.

Weights are dequantized in registers to the type of the rows, rounded as `dense` does it. Reference:
`ops.moe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.dequantize import dequantize
from qwencli.engine.kernels.gemv_quantized import to_float
from qwencli.engine.ops.decoder_ops import Layer, Matrix, experts_residual
from qwencli.engine.ops.moe import Routing, mixture, shared_expert
from qwencli.engine.quant.quantized_tensor import IN_NIBBLES, QuantizedTensor, Scheme

Tensor = torch.Tensor
# For a number of warps.
Options = Callable[[int], Mapping[str, Any]]

# Of `route_kernel`: rows of the router a program, and columns at a time.
ROUTER_ROWS, ROUTER_DEPTH = 4, 1024
# Of products of pairs: rows of a matrix a program, and words or values of a row at a time.
GATE_UP_ROWS, DOWN_ROWS = 8, 8
MOST_WORDS, MOST_VALUES = 256, 512
# Of grouped products: rows of a matrix a program, rows of activations at most, columns of a step.
TILE_ROWS, FEWEST_TOKENS, MOST_TOKENS, TILE_DEPTH = 64, 16, 64, 64
# What sorts pairs looks at so many at a time.
SORT_BLOCK = 1024
ADD_BLOCK = 1024
WARPS, STAGES = 4, 3


@triton.jit
def fp8_as_float(bits):
    """The lowest 8 bits as e4m3, float32: its digits under float32's exponent."""
    value = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return value.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def value_of_words(words, i: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr):
    """Column i of those in each int32, float32; int4 lies as `quantized_tensor.pack` has it."""
    if BITS == 4:
        value = to_float((words >> (8 * (i % 4) + 4 * (i // 4))) & 15)
    elif FP8:
        value = fp8_as_float(words >> (8 * i))
    else:
        value = to_float((words << (24 - 8 * i)) >> 24)
    return value


@triton.jit
def row_products(
    w_ptr, scale_ptr, zero_point_ptr, row, inside, x_ptr, K: tl.constexpr, BITS: tl.constexpr,
    FP8: tl.constexpr, G: tl.constexpr, GROUPED: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products of rows of a matrix with a vector, not added up yet, [rows, DEPTH].

    BITS: 32 for weights that are floats. x: float32 in the order of `place_in_words`, so that what
    meets the words of a thread lies side by side.
    """
    acc = tl.zeros((row.shape[0], DEPTH), tl.float32)
    EACH: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = K // EACH
    for start in tl.static_range(0, WORDS, DEPTH):
        word = start + tl.arange(0, DEPTH)
        real = word < WORDS
        there = inside[:, None] & real[None, :]
        w = tl.load(w_ptr + row[:, None] * WORDS + word[None, :], mask=there, other=0)
        if BITS == 32:
            acc += w.to(tl.float32) * tl.load(x_ptr + word, mask=real, other=0.0)[None, :]
        else:
            part = tl.zeros((row.shape[0], DEPTH), tl.float32)
            total = tl.zeros((DEPTH,), tl.float32)
            for i in tl.static_range(EACH):
                x = tl.load(x_ptr + i * WORDS + word, mask=real, other=0.0)
                total += x
                part += value_of_words(w, i, BITS, FP8) * x[None, :]
            if GROUPED:
                group = row[:, None] * (K // G) + (word * EACH // G)[None, :]
                if zero_point_ptr is not None:
                    zero = tl.load(zero_point_ptr + group, mask=there, other=0.0)
                    part -= zero.to(tl.float32) * total[None, :]
                part *= tl.load(scale_ptr + group, mask=there, other=0.0).to(tl.float32)
            acc += part
    if BITS != 32 and not GROUPED:
        acc *= tl.load(scale_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def place_in_words(column, K: tl.constexpr, BITS: tl.constexpr):
    """Where `row_products` looks for a column: all first ones of words, all second ones, .."""
    EACH: tl.constexpr = 32 // BITS
    return column % EACH * (K // EACH) + column // EACH


@triton.jit
def pick_experts(
    logits, column, experts_ptr, weights_ptr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    SHARED: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """The experts of a row and their weights, by its logits; of equals the first one."""
    LANES: tl.constexpr = triton.next_power_of_2(TOP_K + SHARED)
    lane = tl.arange(0, LANES)
    left = tl.where(column < EXPERTS, logits, float("-inf"))
    top = tl.max(left)
    total = tl.sum(tl.exp(left - top))
    experts = tl.zeros((LANES,), tl.int32)
    weights = tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.max(left)
        # Logits that are no numbers equal nothing: an expert all the same, and no stray address.
        index = tl.minimum(tl.min(tl.where(left == best, column, EXPERTS)), EXPERTS - 1)
        experts = tl.where(lane == i, index, experts)
        weights = tl.where(lane == i, tl.exp(best - top), weights)
        left = tl.where(column == index, float("-inf"), left)
    weights = weights / (tl.sum(weights) if RENORMALIZE else total)
    if SHARED:
        gate = tl.sum(tl.where(column == EXPERTS, logits, 0.0))
        experts = tl.where(lane == TOP_K, EXPERTS, experts)
        weights = tl.where(lane == TOP_K, 1.0 / (1.0 + tl.exp(-gate)), weights)
    tl.store(experts_ptr + lane, experts, mask=lane < TOP_K + SHARED)
    tl.store(weights_ptr + lane, weights, mask=lane < TOP_K + SHARED)


@triton.jit
def pick_experts_kernel(
    logits_ptr,  # [M, COUNT]
    experts_ptr,  # int32 [M, TOP_K + SHARED]
    weights_ptr,  # float32, likewise
    COUNT: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """`pick_experts` of a row a program."""
    row = tl.program_id(0)
    column = tl.arange(0, triton.next_power_of_2(COUNT))
    logits = tl.load(logits_ptr + row * COUNT + column, mask=column < COUNT, other=0.0)
    to = row * (TOP_K + SHARED)
    pick_experts(
        logits.to(tl.float32), column, experts_ptr + to, weights_ptr + to, EXPERTS, TOP_K, SHARED,
        RENORMALIZE,
    )  # fmt: skip


@triton.jit
def route_kernel(
    hidden_ptr,  # [M, H]
    gain_ptr,  # [H], of the norm
    router_ptr,  # [COUNT, H]
    logits_ptr,  # float32 [M, COUNT]
    semaphore_ptr,  # int32 [M], 0 before and after
    normed_ptr,  # float32 [M, H], as `row_products` takes them
    experts_ptr,  # as in `pick_experts_kernel`
    weights_ptr,
    eps,
    H: tl.constexpr,
    COUNT: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (ROWS rows of the router, row of hidden states). BITS: of the experts' weights."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < COUNT
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    squares = tl.zeros((DEPTH,), tl.float32)
    for start in tl.static_range(0, H, DEPTH):
        column = start + tl.arange(0, DEPTH)
        real = column < H
        at = row.to(tl.int64)[:, None] * H + column[None, :]
        w = tl.load(router_ptr + at, mask=inside[:, None] & real[None, :], other=0.0)
        x = tl.load(hidden_ptr + token * H + column, mask=real, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + column, mask=real, other=0.0).to(tl.float32)
        squares += x * x
        acc += w.to(tl.float32) * (x * gain)[None, :]
    norm = tl.rsqrt(tl.sum(squares) / H + eps)
    if tl.program_id(0) == 0:
        for start in tl.static_range(0, H, DEPTH):
            place = start + tl.arange(0, DEPTH)
            there = place < H
            normed = tl.load(hidden_ptr + token * H + place, mask=there, other=0.0).to(tl.float32)
            weight = tl.load(gain_ptr + place, mask=there, other=0.0).to(tl.float32)
            to = normed_ptr + token * H + place_in_words(place, H, BITS)
            tl.store(to, normed * weight * norm, mask=there)
    tl.store(logits_ptr + token * COUNT + row, tl.sum(acc, axis=1) * norm, mask=inside)
    # Every thread's logits are stored before one of them says so.
    tl.debug_barrier()
    if tl.atomic_add(semaphore_ptr + token, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(semaphore_ptr + token, 0)  # for the next layer
        each = tl.arange(0, triton.next_power_of_2(COUNT))
        # Past the first-level cache, which does not see what other programs wrote.
        own_ptr = logits_ptr + token * COUNT + each
        logits = tl.load(own_ptr, mask=each < COUNT, other=0.0, cache_modifier=".cg")
        first = token * (TOP_K + SHARED)
        pick_experts(
            logits, each, experts_ptr + first, weights_ptr + first, EXPERTS, TOP_K, SHARED,
            RENORMALIZE,
        )  # fmt: skip


@triton.jit
def silu_times(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def experts_gate_up_kernel(
    normed_ptr,  # float32 [M, H], of `route_kernel`
    experts_ptr,  # int32 [M * SLOTS]
    w_ptr,  # [experts * 2 INNER, H]; int32 words of it where BITS is not 32
    scale_ptr,  # [experts * 2 INNER], or with GROUPED [.., H / G]
    zero_point_ptr,  # with GROUPED: as scale; None = no zeros
    activated_ptr,  # float32 [M * SLOTS, INNER], as `row_products` takes them
    INNER: tl.constexpr,
    H: tl.constexpr,
    SLOTS: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    G: tl.constexpr,
    GROUPED: tl.constexpr,
    DOWN_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (ROWS of INNER, pair): silu(gate) * up of the normed row with its expert.
    DOWN_BITS: of the weights that the result meets."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(1)
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    lane = tl.arange(0, 2 * ROWS)  # gates, then ups
    row = tl.program_id(0) * ROWS + lane % ROWS
    inside = row < INNER
    acc = row_products(
        w_ptr, scale_ptr, zero_point_ptr, expert * (2 * INNER) + lane // ROWS * INNER + row, inside,
        normed_ptr + pair // SLOTS * H, H, BITS, FP8, G, GROUPED, DEPTH,
    )  # fmt: skip
    both = tl.reshape(tl.sum(acc, axis=1), (2, ROWS))
    first = (tl.arange(0, 2) == 0)[:, None]
    gate = tl.sum(tl.where(first, both, 0.0), axis=0)
    up = tl.sum(tl.where(first, 0.0, both), axis=0)
    to = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = activated_ptr + pair * INNER + place_in_words(to, INNER, DOWN_BITS)
    tl.store(at, silu_times(gate, up), mask=to < INNER)


@triton.jit
def experts_down_kernel(
    activated_ptr,  # float32 [M * SLOTS, INNER]
    experts_ptr,  # int32 [M * SLOTS]
    weights_ptr,  # float32 [M * SLOTS]
    w_ptr,  # [experts * H, INNER], these three as in `experts_gate_up_kernel`
    scale_ptr,
    zero_point_ptr,
    hidden_ptr,  # [M, H], what is added to
    H: tl.constexpr,
    INNER: tl.constexpr,
    SLOTS: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    G: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (ROWS of H, row of hidden states)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < H
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(experts_ptr + pair).to(tl.int64)
        acc = row_products(
            w_ptr, scale_ptr, zero_point_ptr, expert * H + row, inside,
            activated_ptr + pair * INNER, INNER, BITS, FP8, G, GROUPED, DEPTH,
        )  # fmt: skip
        total += acc * tl.load(weights_ptr + pair)
    at = hidden_ptr + token * H + row
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32) + tl.sum(total, axis=1)
    tl.store(at, y.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def sort_pairs_kernel(
    experts_ptr,  # int32 [count]
    order_ptr,  # int32 [count], pairs by expert, those of one in their order
    starts_ptr,  # int32 [experts + 1], where each one's begin
    count,
    BLOCK: tl.constexpr,
):
    """Program (expert): places its pairs behind those of the experts before it. One program more
    says how many there are."""
    expert = tl.program_id(0)
    before = 0
    for start in range(0, count, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = tl.load(experts_ptr + pair, mask=pair < count, other=2147483647)
        before += tl.sum((chosen < expert).to(tl.int32))
    tl.store(starts_ptr + expert, before)
    for start in range(0, count, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        own = tl.load(experts_ptr + pair, mask=pair < count, other=2147483647) == expert
        rank = tl.cumsum(own.to(tl.int32))
        tl.store(order_ptr + before + rank - 1, pair, mask=own)
        before += tl.sum(own.to(tl.int32))


@triton.jit
def int4_tiles(
    w_ptr, scale_ptr, zero_point_ptr, row, start, K: tl.constexpr, G: tl.constexpr,
    DEPTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Columns from `start` on of int4 rows, those in low and those in high halves of bytes."""
    inner = start // 2 + tl.arange(0, DEPTH // 2)
    packed = tl.load(w_ptr + row[:, None] * (K // 2) + inner[None, :]).to(tl.int32)
    group = row * (K // G) + start // G
    scale = tl.load(scale_ptr + group).to(tl.float32)[:, None]
    zero = tl.load(zero_point_ptr + group).to(tl.float32)[:, None]
    low = (to_float(packed & 15) - zero) * scale
    high = (to_float(packed >> 4) - zero) * scale
    return low.to(TYPE), high.to(TYPE)


@triton.jit
def plain_tile(
    w_ptr, zero_point_ptr, row, start, K: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr,
    G: tl.constexpr, DEPTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Columns from `start` on of rows of floats or bytes, without their scales."""
    k = start + tl.arange(0, DEPTH)
    w = tl.load(w_ptr + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0)
    if BITS == 8:
        value = fp8_as_float(w.to(tl.int32)) if FP8 else to_float(w.to(tl.int32))
        if zero_point_ptr is not None:
            zero = tl.load(zero_point_ptr + row * (K // G) + start // G)
            value -= zero.to(tl.float32)[:, None]
        w = value
    return w.to(TYPE)


@triton.jit
def grouped_gemm_kernel(
    x_ptr,  # [.., K]: of GATED the rows, else what that stored
    w_ptr,  # [experts * N, K], of GATED [experts * 2 N, K]; int4: bytes [.., K / 2]
    scale_ptr,  # [..], or with GROUPED [.., K / G]
    zero_point_ptr,  # with GROUPED: as scale; None = no zeros
    order_ptr,  # as in `sort_pairs_kernel`
    starts_ptr,
    weights_ptr,  # float32 [pairs]
    y_ptr,  # of GATED [pairs by expert, N], else [pairs, N]
    N: tl.constexpr,
    K: tl.constexpr,
    STACKED: tl.constexpr,
    SLOTS: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    G: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of pairs, ROWS rows): GATED: silu(gate) * up of rows with their expert, else
    down of what that made, by the pair's weight. DEPTH columns at a time, within a group."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0) // BLOCKS
    each = tl.arange(0, triton.next_power_of_2(STACKED))
    begin = tl.load(starts_ptr + each, mask=each < STACKED, other=0)
    end = tl.load(starts_ptr + each + 1, mask=each < STACKED, other=0)
    tiles = (end - begin + TOKENS - 1) // TOKENS
    until = tl.cumsum(tiles)
    expert = tl.sum((until <= tile).to(tl.int32))
    if expert >= STACKED:
        return
    here = each == expert
    skipped = (tile - tl.sum(tl.where(here, until - tiles, 0))) * TOKENS
    place = tl.sum(tl.where(here, begin, 0)) + skipped + tl.arange(0, TOKENS)
    real = place < tl.sum(tl.where(here, end, 0))
    pair = tl.load(order_ptr + place, mask=real, other=0)
    token = tl.where(real, pair // SLOTS if GATED else place, 0)
    rows = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    # Rows behind the last are read as the last, and not stored.
    row = expert.to(tl.int64) * (N * (2 if GATED else 1)) + tl.minimum(rows, N - 1)
    x_row = x_ptr + token.to(tl.int64)[None, :] * K
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    up = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        if BITS == 4:
            inner = tl.arange(0, DEPTH // 2)
            column = start + inner // 4 * 8 + inner % 4
            low_x = tl.load(x_row + column[:, None])
            high_x = tl.load(x_row + column[:, None] + 4)
            low, high = int4_tiles(
                w_ptr, scale_ptr, zero_point_ptr, row, start, K, G, DEPTH, TYPE
            )  # fmt: skip
            acc = tl.dot(low, low_x, acc, input_precision=PRECISION)
            acc = tl.dot(high, high_x, acc, input_precision=PRECISION)
            if GATED:
                low, high = int4_tiles(
                    w_ptr, scale_ptr, zero_point_ptr, row + N, start, K, G, DEPTH, TYPE
                )  # fmt: skip
                up = tl.dot(low, low_x, up, input_precision=PRECISION)
                up = tl.dot(high, high_x, up, input_precision=PRECISION)
        else:
            k = start + tl.arange(0, DEPTH)
            x = tl.load(x_row + k[:, None], mask=(k < K)[:, None], other=0.0)
            w = plain_tile(w_ptr, zero_point_ptr, row, start, K, BITS, FP8, G, DEPTH, TYPE)
            if GROUPED:
                scale = tl.load(scale_ptr + row * (K // G) + start // G).to(tl.float32)
                acc += tl.dot(w, x, input_precision=PRECISION) * scale[:, None]
            else:
                acc = tl.dot(w, x, acc, input_precision=PRECISION)
            if GATED:
                w = plain_tile(w_ptr, zero_point_ptr, row + N, start, K, BITS, FP8, G, DEPTH, TYPE)
                if GROUPED:
                    scale = tl.load(scale_ptr + (row + N) * (K // G) + start // G).to(tl.float32)
                    up += tl.dot(w, x, input_precision=PRECISION) * scale[:, None]
                else:
                    up = tl.dot(w, x, up, input_precision=PRECISION)
    if BITS == 8 and not GROUPED:
        acc *= tl.load(scale_ptr + row).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scale_ptr + row + N).to(tl.float32)[:, None]
    if GATED:
        acc = silu_times(acc, up)
    else:
        acc *= tl.load(weights_ptr + pair, mask=real, other=0.0)[None, :]
    to = place if GATED else pair
    at = y_ptr + to.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & real[None, :])


@triton.jit
def add_results_kernel(results_ptr, hidden_ptr, width, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block): hidden [M, width] += the sum of results [M, SLOTS, width]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.load(hidden_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        at = results_ptr + (row * SLOTS + slot) * width + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    to = hidden_ptr + row * width + column
    tl.store(to, total.to(hidden_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class _Stored:
    """A stacked matrix [out, in] as the kernels take it."""

    data: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    bits: int
    fp8: bool
    group: int
    grouped: bool

    @classmethod
    def of(cls, matrix: Matrix) -> _Stored | None:
        """None where they do not: tables, reordered columns, groups that are cut elsewhere."""
        if isinstance(matrix, Tensor):
            weight = matrix.t()
            assert weight.is_contiguous(), "kernels read rows of the weight"
            return cls(weight, None, None, 32, False, weight.shape[1], False)
        bits = matrix.bits
        known = matrix.codebook is None and matrix.g_idx_sort_indices is None
        whole = matrix.columns % (32 // bits) == 0 and (not matrix.grouped or not matrix.group % 32)
        if not known or not whole or (matrix.scheme in IN_NIBBLES and matrix.zero_point is None):
            return None
        zero = matrix.zero_point if matrix.grouped else None
        fp8 = matrix.scheme is Scheme.FP8
        return cls(matrix.data, matrix.scale, zero, bits, fp8, matrix.group, matrix.grouped)

    @property
    def words(self) -> Tensor:
        return self.data if self.bits == 32 else self.data.view(torch.int32)

    @property
    def bytes(self) -> Tensor:
        if self.bits == 32:
            return self.data
        return self.data.view(torch.uint8 if self.bits == 4 else torch.int8)

    def modes(self) -> dict[str, Any]:
        return {"BITS": self.bits, "FP8": self.fp8, "G": self.group, "GROUPED": self.grouped}

    def depth(self, columns: int) -> int:
        """Words or values of a row that products of pairs take at a time."""
        if self.bits == 32:
            return min(int(triton.next_power_of_2(columns)), MOST_VALUES)
        return min(int(triton.next_power_of_2(columns * self.bits // 32)), MOST_WORDS)


class ExpertKernels:
    """Adds what experts make of rows to them; see the module.

    Args:
        most_few: rows that `few` takes at most.
        options: launch options for a number of warps.
        precision: of float32 operands.
    """

    def __init__(
        self, most_few: int, device: torch.device, options: Options, precision: str
    ) -> None:
        self._semaphore = torch.zeros(most_few, dtype=torch.int32, device=device)
        self._options, self._precision = options, precision

    def few(self, hidden: Tensor, layer: Layer) -> Tensor:
        """hidden [M, H] + the mixture of the normed rows, in place; each expert's weights are read
        once a row."""
        routing = layer.routing
        assert routing is not None, "a layer with experts"
        gate_up, down = _Stored.of(layer.gate_up), _Stored.of(layer.down)
        if gate_up is None or down is None:
            return experts_residual(hidden, layer, dequantize)
        alone = None
        if routing.shared_mlp is not None:
            alone = shared_expert(layer.mlp_norm(hidden), routing)
        (rows, width), slots = hidden.shape, routing.slots
        count, inner = len(routing.router), _inner(layer)
        experts, weights = _pairs(hidden, routing)
        logits = torch.empty(rows, count, dtype=torch.float32, device=hidden.device)
        normed = torch.empty(rows, width, dtype=torch.float32, device=hidden.device)
        route_kernel[triton.cdiv(count, ROUTER_ROWS), rows](
            hidden,
            layer.mlp_norm.weight,
            routing.router,
            logits,
            self._semaphore,
            normed,
            experts,
            weights,
            layer.mlp_norm.eps,
            H=width,
            COUNT=count,
            BITS=gate_up.bits,
            ROWS=ROUTER_ROWS,
            DEPTH=min(triton.next_power_of_2(width), ROUTER_DEPTH),
            **_picking(routing),
            **self._options(WARPS),
        )
        activated = torch.empty(rows * slots, inner, dtype=torch.float32, device=hidden.device)
        experts_gate_up_kernel[triton.cdiv(inner, GATE_UP_ROWS), rows * slots](
            normed,
            experts,
            gate_up.words,
            gate_up.scale,
            gate_up.zero_point,
            activated,
            INNER=inner,
            H=width,
            SLOTS=slots,
            DOWN_BITS=down.bits,
            ROWS=GATE_UP_ROWS,
            DEPTH=gate_up.depth(width),
            **gate_up.modes(),
            **self._options(WARPS),
        )
        experts_down_kernel[triton.cdiv(width, DOWN_ROWS), rows](
            activated,
            experts,
            weights,
            down.words,
            down.scale,
            down.zero_point,
            hidden,
            H=width,
            INNER=inner,
            SLOTS=slots,
            ROWS=DOWN_ROWS,
            DEPTH=down.depth(inner),
            **down.modes(),
            **self._options(WARPS),
        )
        return hidden if alone is None else hidden.add_(alone)

    def many(self, hidden: Tensor, layer: Layer) -> Tensor:
        """As `few`, of any number of rows; the router's logits are those of torch."""
        routing = layer.routing
        assert routing is not None, "a layer with experts"
        x = layer.mlp_norm(hidden)
        alone = None if routing.shared_mlp is None else shared_expert(x, routing)
        logits = torch.mm(x, routing.router.t())
        hidden = grouped_experts(hidden, layer, x, logits, self._precision)
        return hidden if alone is None else hidden.add_(alone)


def grouped_experts(
    hidden: Tensor,
    layer: Layer,
    x: Tensor,
    logits: Tensor,
    precision: str,
    tokens: int | None = None,
) -> Tensor:
    """hidden [M, H] + what the stacked experts make of the normed rows x, in place.

    Args:
        logits: [M, experts and gate] of any float type.
        precision: of float32 operands.
        tokens: rows of a tile; None = by how many an expert has on average.
    """
    routing = layer.routing
    assert routing is not None, "a layer with experts"
    gate_up, down = _Stored.of(layer.gate_up), _Stored.of(layer.down)
    if gate_up is None or down is None:
        stacked = replace(routing, shared_mlp=None)
        return hidden.add_(mixture(x, layer.gate_up, layer.down, stacked, dequantize))
    (rows, width), pairs = x.shape, len(x) * routing.slots
    inner, device = _inner(layer), x.device
    experts, weights = _pairs(x, routing)
    pick_experts_kernel[rows,](
        logits, experts, weights, COUNT=logits.shape[1], **_picking(routing), num_warps=1
    )
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    starts = torch.empty(routing.stacked + 1, dtype=torch.int32, device=device)
    sort_pairs_kernel[routing.stacked + 1,](
        experts, order, starts, pairs, BLOCK=SORT_BLOCK, num_warps=WARPS
    )
    tokens = tokens or _tile_tokens(pairs, routing.stacked)
    activated = torch.empty(pairs, inner, dtype=x.dtype, device=device)
    results = torch.empty(pairs, width, dtype=x.dtype, device=device)
    most = triton.cdiv(pairs, tokens) + min(pairs, routing.stacked)
    for matrix, of, to, gated in (
        (gate_up, x.contiguous(), activated, True),
        (down, activated, results, False),
    ):
        deep = not matrix.grouped or matrix.group % TILE_DEPTH == 0
        grouped_gemm_kernel[most * triton.cdiv(to.shape[1], TILE_ROWS),](
            of,
            matrix.bytes,
            matrix.scale,
            matrix.zero_point,
            order,
            starts,
            weights,
            to,
            N=to.shape[1],
            K=of.shape[1],
            STACKED=routing.stacked,
            SLOTS=routing.slots,
            GATED=gated,
            ROWS=TILE_ROWS,
            TOKENS=tokens,
            DEPTH=TILE_DEPTH if deep else 32,
            STAGES=STAGES if x.dtype.itemsize == 2 else 1,
            PRECISION=precision,
            **matrix.modes(),
            num_warps=WARPS,
        )
    add_results_kernel[rows, triton.cdiv(width, ADD_BLOCK)](
        results, hidden, width, SLOTS=routing.slots, BLOCK=ADD_BLOCK, num_warps=WARPS
    )
    return hidden


def _inner(layer: Layer) -> int:
    """Columns of an expert's down matrix."""
    down = layer.down
    return down.columns if isinstance(down, QuantizedTensor) else down.shape[0]


def _pairs(x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Where the experts of all rows and their weights go."""
    size = (len(x), routing.slots)
    experts = torch.empty(size, dtype=torch.int32, device=x.device)
    return experts, torch.empty(size, dtype=torch.float32, device=x.device)


def _picking(routing: Routing) -> dict[str, Any]:
    return {
        "EXPERTS": routing.num_experts,
        "TOP_K": routing.top_k,
        "SHARED": routing.shared,
        "RENORMALIZE": routing.renormalize,
    }


def _tile_tokens(pairs: int, experts: int) -> int:
    each = int(triton.next_power_of_2(triton.cdiv(pairs, experts)))
    return min(max(each, FEWEST_TOKENS), MOST_TOKENS)
