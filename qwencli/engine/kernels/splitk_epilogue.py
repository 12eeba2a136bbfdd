"""Split-K epilogue of products with 2 to 8 vectors: partial sums reduced, activations quantized.

A matrix of few rows has too few programs of 16 rows to keep the memory busy, so several programs
share its columns (split-K). And what the next product reads is quantized in chunks of more rows
than a program has (`activation_quant`). Both need what several programs computed, so each stores
its partial sums, and the last of a chunk to arrive at its semaphore adds them up, in the same order
every time, and finishes the rows of all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwencli.engine.kernels.activation_quant import FLOATS, HALVES, store_activation_chunks
from qwencli.engine.kernels.epilogue import load_tile_state, store_tile


@triton.jit
def load_epilogue_inputs(
    first, N, bias_ptr, y_ptr, seen_ptr, penalty_ptr, input_ids_ptr, TOKENS: tl.constexpr,
    ADD: tl.constexpr, ARGMAX: tl.constexpr, SPLITS: tl.constexpr, ACT_FORMAT: tl.constexpr,
):  # fmt: skip
    """What `splitk_epilogue` needs of what other kernels wrote, on its way during the products. Who
    joins others' sums reads it then, of all rows."""
    ALONE: tl.constexpr = SPLITS == 1 and ACT_FORMAT <= FLOATS
    rows = first + tl.arange(0, 16)
    return load_tile_state(
        rows, N, bias_ptr if ALONE else None, y_ptr, seen_ptr, penalty_ptr, input_ids_ptr,
        TOKENS, ADD and ALONE, ARGMAX,
    )  # fmt: skip


@triton.jit
def splitk_epilogue(
    y,  # float32 [16, 8], of this program's columns
    up_y,  # likewise, of SWIGLU, whose columns nobody shares
    state,  # see `load_epilogue_inputs`
    first,  # row
    N,
    bias_ptr,
    y_ptr,
    best_ptr,
    partial_sums_ptr,  # float32 [SPLITS, 8, N]
    semaphore_ptr,  # int32 [chunks], zero
    next_gain_ptr,  # [N], of the next norm; None = no norm
    act_values_ptr,  # what the next product reads, as in `quantize_activation_chunks_kernel`
    act_group_scales_ptr,
    act_offsets_ptr,
    sum_squares_ptr,  # float32 [chunks or programs, 8], where there is a next norm
    TOKENS: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    SPLITS: tl.constexpr,
    ACT_FORMAT: tl.constexpr,
    RUN: tl.constexpr,
):
    """Store the rows, or look for the best, and hand over what the next product wants.

    ACT_FORMAT is the next one's (`activation_quant`): with FLOATS it wants the squares alone, with
    0 nothing."""
    if SWIGLU:
        y = y * tl.sigmoid(y) * up_y
    if SPLITS == 1 and ACT_FORMAT <= FLOATS:
        store_tile(
            y, state, first + tl.arange(0, 16), N, y_ptr, best_ptr, sum_squares_ptr,
            TOKENS, ARGMAX, ACT_FORMAT == FLOATS,
        )  # fmt: skip
    else:
        CHUNK: tl.constexpr = 16 if ACT_FORMAT <= FLOATS else (128 if ACT_FORMAT == HALVES else 64)
        tokens = tl.arange(0, 8)
        mine = first + tl.arange(0, 16)
        at = (tl.program_id(0) % SPLITS * 8 + tokens)[None, :] * N + mine[:, None]
        tl.store(partial_sums_ptr + at, y, mask=(mine < N)[:, None] & (tokens < TOKENS)[None, :])
        chunk = first // CHUNK
        constants = load_chunk_inputs(
            chunk, N, bias_ptr, y_ptr, next_gain_ptr, CHUNK, TOKENS, ADD, ACT_FORMAT
        )
        # Every thread's sums are stored before one of them says so.
        tl.debug_barrier()
        programs = tl.cdiv(tl.minimum(N - chunk * CHUNK, CHUNK), 16) * SPLITS
        if tl.atomic_add(semaphore_ptr + chunk, 1, sem="acq_rel") == programs - 1:
            tl.store(semaphore_ptr + chunk, 0)  # for the next product
            reduce_chunk(
                constants, chunk, N, bias_ptr, y_ptr, partial_sums_ptr, next_gain_ptr,
                act_values_ptr, act_group_scales_ptr, act_offsets_ptr, sum_squares_ptr, CHUNK,
                TOKENS, ADD, SPLITS, ACT_FORMAT, RUN,
            )  # fmt: skip


@triton.jit
def load_chunk_inputs(
    chunk, N, bias_ptr, y_ptr, next_gain_ptr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
    ADD: tl.constexpr, ACT_FORMAT: tl.constexpr,
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
    if next_gain_ptr is not None and ACT_FORMAT > FLOATS:
        gain = tl.load(next_gain_ptr + rows, mask=inside, other=0.0)[None, :]
    return before, bias, gain


@triton.jit
def reduce_chunk(
    constants, chunk, N, bias_ptr, y_ptr, partial_sums_ptr, next_gain_ptr, act_values_ptr,
    act_group_scales_ptr, act_offsets_ptr, sum_squares_ptr, CHUNK: tl.constexpr,
    TOKENS: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr, ACT_FORMAT: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Add up the sums of CHUNK rows; reads past the first-level cache, which does not see what
    other programs wrote."""
    before, bias, gain = constants
    tokens = tl.arange(0, 8)
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    there = (tokens < TOKENS)[:, None] & (rows < N)[None, :]
    at = tokens[:, None] * N + rows[None, :]
    y = tl.load(partial_sums_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        y += tl.load(
            partial_sums_ptr + split * 8 * N + at, mask=there, other=0.0, cache_modifier=".cg"
        )
    if bias_ptr is not None:
        y += bias.to(tl.float32)
    if ADD:
        y += before.to(tl.float32)
    y = tl.where(there, y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=there)
    y = y.to(tl.float32)
    if next_gain_ptr is not None:
        tl.store(sum_squares_ptr + chunk * 8 + tokens, tl.sum(y * y, axis=1))
    if ACT_FORMAT > FLOATS:
        if next_gain_ptr is not None:
            y *= gain.to(tl.float32)
        store_activation_chunks(
            y, tl.full((8,), 0, tl.int32) + chunk, tokens, tokens < TOKENS,
            act_values_ptr, act_group_scales_ptr, act_offsets_ptr, ACT_FORMAT, RUN,
        )  # fmt: skip
