"""How products with 2 to 8 vectors end: shares of the columns joined, vectors handed on.

A matrix of few rows has too few programs of 16 rows to keep the memory busy, so several programs
share its columns. And what the next product reads is rounded in chunks of more rows than a program
has (`rounding`). Both need what several programs found out, so each leaves its sums in memory, and
the last of a chunk to arrive adds them up, in the same order every time, and ends the rows of all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwencli.engine.kernels.activation_quant import FLOATS, HALVES
from qwencli.engine.kernels.epilogue import state_of_several, store_several
from qwencli.engine.kernels.rounding import round_chunks


@triton.jit
def begin_several(
    first, N, bias_ptr, y_ptr, seen_ptr, penalty_ptr, fed_ptr, TOKENS: tl.constexpr,
    ADD: tl.constexpr, ARGMAX: tl.constexpr, SPLITS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """What `finish_several` needs of what other kernels wrote, on its way during the products. Who
    joins others' sums reads it then, of all rows."""
    ALONE: tl.constexpr = SPLITS == 1 and FORM <= FLOATS
    rows = first + tl.arange(0, 16)
    return state_of_several(
        rows, N, bias_ptr if ALONE else None, y_ptr, seen_ptr, penalty_ptr, fed_ptr,
        TOKENS, ADD and ALONE, ARGMAX,
    )  # fmt: skip


@triton.jit
def finish_several(
    y,  # float32 [16, 8], of this program's columns
    up_y,  # likewise, of SWIGLU, whose columns nobody shares
    state,  # see `begin_several`
    first,  # row
    N,
    bias_ptr,
    y_ptr,
    best_ptr,
    sums_ptr,  # float32 [SPLITS, 8, N]
    arrived_ptr,  # int32 [chunks], zero
    next_gain_ptr,  # [N], of the next norm; None = no norm
    values_ptr,  # what the next product reads, as in `round_kernel`
    units_ptr,
    starts_ptr,
    squares_ptr,  # float32 [chunks or programs, 8], where there is a next norm
    TOKENS: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    SPLITS: tl.constexpr,
    FORM: tl.constexpr,
    RUN: tl.constexpr,
):
    """Store the rows, or look for the best, and hand over what the next product wants.

    FORM is the next one's (`handover`): with FLOATS it wants the squares alone, with 0 nothing.
    """
    if SWIGLU:
        y = y * tl.sigmoid(y) * up_y
    if SPLITS == 1 and FORM <= FLOATS:
        store_several(
            y, state, first + tl.arange(0, 16), N, y_ptr, best_ptr, squares_ptr,
            TOKENS, ARGMAX, FORM == FLOATS,
        )  # fmt: skip
    else:
        CHUNK: tl.constexpr = 16 if FORM <= FLOATS else (128 if FORM == HALVES else 64)
        tokens = tl.arange(0, 8)
        mine = first + tl.arange(0, 16)
        at = (tl.program_id(0) % SPLITS * 8 + tokens)[None, :] * N + mine[:, None]
        tl.store(sums_ptr + at, y, mask=(mine < N)[:, None] & (tokens < TOKENS)[None, :])
        chunk = first // CHUNK
        constants = ends_of_chunk(
            chunk, N, bias_ptr, y_ptr, next_gain_ptr, CHUNK, TOKENS, ADD, FORM
        )
        # Every thread's sums are stored before one of them says so.
        tl.debug_barrier()
        programs = tl.cdiv(tl.minimum(N - chunk * CHUNK, CHUNK), 16) * SPLITS
        if tl.atomic_add(arrived_ptr + chunk, 1, sem="acq_rel") == programs - 1:
            tl.store(arrived_ptr + chunk, 0)  # for the next product
            end_chunk(
                constants, chunk, N, bias_ptr, y_ptr, sums_ptr, next_gain_ptr, values_ptr,
                units_ptr, starts_ptr, squares_ptr, CHUNK, TOKENS, ADD, SPLITS, FORM, RUN,
            )  # fmt: skip


@triton.jit
def ends_of_chunk(
    chunk, N, bias_ptr, y_ptr, next_gain_ptr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
    ADD: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Residual, bias and the next norm's gain, [8, CHUNK] (if any): every program reads them while
    it waits for its sums to be stored, though only the last will need them."""
    tokens = tl.arange(0, 8)
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = rows < N
    before, bias, gain = 0.0, 0.0, 1.0
    if ADD:
        there = (tokens < TOKENS)[:, None] & inside[None, :]
        at = tokens[:, None] * N + rows[None, :]
        before = tl.load(y_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, mask=inside, other=0.0)[None, :]
    if next_gain_ptr is not None and FORM > FLOATS:
        gain = tl.load(next_gain_ptr + rows, mask=inside, other=0.0)[None, :]
    return before, bias, gain


@triton.jit
def end_chunk(
    constants, chunk, N, bias_ptr, y_ptr, sums_ptr, next_gain_ptr, values_ptr, units_ptr,
    starts_ptr, squares_ptr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, ADD: tl.constexpr,
    SPLITS: tl.constexpr, FORM: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Add up the sums of CHUNK rows; reads past the first-level cache, which does not see what
    other programs wrote."""
    before, bias, gain = constants
    tokens = tl.arange(0, 8)
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    there = (tokens < TOKENS)[:, None] & (rows < N)[None, :]
    at = tokens[:, None] * N + rows[None, :]
    y = tl.load(sums_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        y += tl.load(sums_ptr + split * 8 * N + at, mask=there, other=0.0, cache_modifier=".cg")
    if bias_ptr is not None:
        y += bias.to(tl.float32)
    if ADD:
        y += before.to(tl.float32)
    y = tl.where(there, y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=there)
    y = y.to(tl.float32)
    if next_gain_ptr is not None:
        tl.store(squares_ptr + chunk * 8 + tokens, tl.sum(y * y, axis=1))
    if FORM > FLOATS:
        if next_gain_ptr is not None:
            y *= gain.to(tl.float32)
        round_chunks(
            y, tl.full((8,), 0, tl.int32) + chunk, tokens, tokens < TOKENS,
            values_ptr, units_ptr, starts_ptr, FORM, RUN,
        )  # fmt: skip
