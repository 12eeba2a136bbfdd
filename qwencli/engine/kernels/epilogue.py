"""Epilogue of the matrix-vector kernels: bias, residual, SwiGLU, argmax, activation
quantization."""

from __future__ import annotations

import triton
import triton.language as tl

from qwencli.engine.kernels.activation_quant import store_activation


@triton.jit
def ordered_bits(x):
    """int32 that sorts as the float32 `x` does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def update_argmax(y, seen, rows, inside, penalty_ptr, best_ptr):
    """Penalise what was seen, and raise `best` to the largest key of these rows.

    A key is ordered_bits(y) << 32 | (2^32 - 1 - row): the first of equal rows wins.
    """
    penalty = tl.load(penalty_ptr)
    y = tl.where(seen, tl.where(y < 0, y * penalty, y / penalty), y)
    key = (ordered_bits(y).to(tl.int64) << 32) | (0xFFFFFFFF - rows.to(tl.int64))
    mine = tl.max(tl.where(inside, key, -0x8000000000000000), axis=0)
    # Most programs see a larger one and leave the address that all share alone.
    if mine > tl.load(best_ptr, volatile=True):
        tl.atomic_max(best_ptr, mine, sem="relaxed")


@triton.jit
def load_row_constants(rows, inside, bias_ptr, next_gain_ptr):
    """What the rows' ends need and no kernel writes: bias, and the next norm's gain (if any)."""
    bias = tl.zeros(rows.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    gain = tl.full(rows.shape, 1.0, tl.float32)
    if next_gain_ptr is not None:
        gain = tl.load(next_gain_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    return bias, gain


@triton.jit
def load_row_state(rows, inside, y_ptr, seen_ptr, ADD: tl.constexpr, ARGMAX: tl.constexpr):
    """What the rows' ends need and kernels write: the residual, and what was seen (if asked)."""
    before = tl.zeros(rows.shape, tl.float32)
    if ADD:
        before = tl.load(y_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    seen = inside
    if ARGMAX:
        seen = tl.load(seen_ptr + rows, mask=inside, other=0) != 0
    return before, seen


@triton.jit
def row_epilogue(
    y,  # float32 [ROWS]
    up_y,  # float32 [ROWS], of SWIGLU
    rows,
    inside,
    constants,
    state,
    y_ptr,
    penalty_ptr,
    best_ptr,
    act_values_ptr,
    act_scales_ptr,
    sum_squares_ptr,
    N,
    SWIGLU: tl.constexpr,
    ARGMAX: tl.constexpr,
    ACT_FORMAT: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """SWIGLU: silu(y) * up_y. Bias and residual are added. ARGMAX: the rows are offered to `best`;
    else stored, and handed over in ACT_FORMAT unless that is 0. SQUARES: with the gain and for a
    norm."""
    bias, gain = constants
    before, seen = state
    if SWIGLU:
        y = y * tl.sigmoid(y) * up_y
    y += bias + before
    if ARGMAX:
        update_argmax(y, seen, rows, inside, penalty_ptr, best_ptr)
    else:
        y = tl.where(inside, y, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + rows, y, mask=inside)
        if ACT_FORMAT > 0:
            y = y.to(tl.float32)
            if SQUARES:
                tl.store(sum_squares_ptr + tl.program_id(0), tl.sum(y * y))
                y *= gain
            store_activation(
                y, rows, inside, act_values_ptr, act_scales_ptr, N, ACT_FORMAT, ACT_GROUP
            )


@triton.jit
def load_tile_state(
    rows, N, bias_ptr, y_ptr, seen_ptr, penalty_ptr, input_ids_ptr,
    TOKENS: tl.constexpr, ADD: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """What `store_tile` needs, to be read before the products: bias and residual [ROWS, 8],
    what was seen (likewise) and its penalty.

    A token fed counts as seen for its own vector and those after it.
    """
    tokens = tl.arange(0, 8)
    inside = rows < N
    before = tl.zeros((rows.shape[0], 8), tl.float32)
    if bias_ptr is not None:
        before += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    if ADD:
        there = inside[:, None] & (tokens < TOKENS)[None, :]
        at = tokens[None, :] * N + rows[:, None]
        before += tl.load(y_ptr + at, mask=there, other=0.0).to(tl.float32)
    seen = before == 0.0
    penalty = 1.0
    if ARGMAX:
        penalty = tl.load(penalty_ptr)
        seen = (tl.load(seen_ptr + rows, mask=inside, other=0) != 0)[:, None]
        seen = seen | (tokens < 0)[None, :]
        for i in tl.static_range(1, TOKENS):
            seen |= (rows == tl.load(input_ids_ptr + i))[:, None] & (tokens >= i)[None, :]
    return before, seen, penalty


@triton.jit
def store_tile(
    y, state, rows, N, y_ptr, best_ptr, sum_squares_ptr,
    TOKENS: tl.constexpr, ARGMAX: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """The end of products with several vectors, [ROWS, 8]: store them, or look for the best.

    SQUARES: those of this program's rows are stored for a norm, [programs, 8].
    """
    before, seen, penalty = state
    tokens = tl.arange(0, 8)
    there = (rows < N)[:, None] & (tokens < TOKENS)[None, :]
    y += before
    if ARGMAX:
        y = tl.where(seen, tl.where(y < 0, y * penalty, y / penalty), y)
        key = (ordered_bits(y).to(tl.int64) << 32) | (0xFFFFFFFF - rows.to(tl.int64))[:, None]
        mine = tl.max(tl.where(there, key, -0x8000000000000000), axis=0)
        # Most programs see larger ones and leave the addresses that all share alone.
        real = tokens < TOKENS
        known = tl.load(best_ptr + tokens, mask=real, other=0, volatile=True)
        tl.atomic_max(best_ptr + tokens, mine, mask=real & (mine > known), sem="relaxed")
    else:
        y = tl.where(there, y, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + tokens[None, :] * N + rows[:, None], y, mask=there)
        if SQUARES:
            y = y.to(tl.float32)
            tl.store(sum_squares_ptr + tl.program_id(0) * 8 + tokens, tl.sum(y * y, axis=0))
