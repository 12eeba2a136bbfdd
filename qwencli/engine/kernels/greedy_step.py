"""The end of a decode step: the tokens it chose, and what the next step starts from."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.epilogue import ordered_bits

# Of `likeliest_kernel`: columns that a program reads at a time, its warps, and programs of a row.
LIKELIEST_BLOCK = 2048
LIKELIEST_WARPS = 4
MOST_PARTS = 32
# Below every key that `gemv_kernel` makes.
NOTHING_CHOSEN = -(2**63)


@triton.jit
def likeliest_kernel(
    logits_ptr,  # [R, V] with `stride` from row to row
    seen_ptr,  # bool [R, V]
    penalty_ptr,  # float32 [R], `penalty_stride` apart
    best_ptr,  # int64 [R], see `update_argmax`
    stride,
    penalty_stride,
    V,
    PENALTY: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, part): raise the row's key to the largest of a part of the vocabulary, by
    logits that a product stored. The first of equal ones wins."""
    row = tl.program_id(0)
    size = tl.cdiv(tl.cdiv(V, PARTS), BLOCK) * BLOCK
    start = tl.program_id(1) * size
    end = tl.minimum(start + size, V)
    logits_ptr += row.to(tl.int64) * stride
    seen_ptr += row.to(tl.int64) * V
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if PENALTY:
        penalty = tl.load(penalty_ptr + row * penalty_stride)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = start + tl.arange(0, BLOCK)
    for first in tl.range(start, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < end
        y = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if PENALTY:
            seen = tl.load(seen_ptr + columns, mask=inside, other=0) != 0
            y = tl.where(seen, tl.where(y < 0, y * penalty, y / penalty), y)
        better = y > largest
        largest = tl.where(better, y, largest)
        place = tl.where(better, columns, place)
    keys = (ordered_bits(largest).to(tl.int64) << 32) | (0xFFFFFFFF - place.to(tl.int64))
    keys = tl.where(place < V, keys, -0x8000000000000000)
    tl.atomic_max(best_ptr + row, tl.max(keys, axis=0), sem="relaxed")


@triton.jit
def finish_token_kernel(
    chosen_ptr,  # int64 [R]: keys of the best rows of the head, see gemv_kernel; DRAWN: tokens
    token_ptr,  # int64 [R]
    slot_ptr,  # int64 [R]
    position_ptr,  # int64 [R]
    step_ptr,  # int64 [R]
    limit_ptr,  # int64 [R], of `step`; None = the host counts
    done_ptr,  # bool [R]
    stop_ids_ptr,  # int64 [R, NUM_STOPS], -1 where unused
    seen_ptr,  # bool [R, V]
    V,
    DRAWN: tl.constexpr,
    STOPS: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Make what was chosen the new token of a row, unless its answer has ended; get ready for the
    next step. A program a row."""
    row = tl.program_id(0)
    index = tl.arange(0, STOPS)
    stop_ids_ptr += row * NUM_STOPS
    stop_ids = tl.load(stop_ids_ptr + index, mask=index < NUM_STOPS, other=-1)
    done = tl.load(done_ptr + row)
    old = tl.load(token_ptr + row)
    if PDL:
        gdc_wait()
    chosen = tl.load(chosen_ptr + row)
    if not DRAWN:
        tl.store(chosen_ptr + row, -0x8000000000000000)
        chosen = 0xFFFFFFFF - (chosen & 0xFFFFFFFF)
    token = tl.where(done, old, chosen)
    going = tl.where(done, 0, 1).to(tl.int64)
    ended = tl.max((stop_ids == token).to(tl.int32), axis=0) != 0
    step = tl.load(step_ptr + row) + going
    if limit_ptr is not None:
        ended = ended | (step >= tl.load(limit_ptr + row))
    tl.store(token_ptr + row, token)
    tl.store(seen_ptr + row.to(tl.int64) * V + token, True)
    tl.store(slot_ptr + row, tl.load(slot_ptr + row) + going)
    tl.store(position_ptr + row, tl.load(position_ptr + row) + going)
    tl.store(step_ptr + row, step)
    tl.store(done_ptr + row, done | ended)


@triton.jit(do_not_specialize=["token_ids_stride"])
def verify_drafts_kernel(
    best_ptr,  # int64 [R, SIZE], see gemm_kernel
    token_ptr,  # int64 [R]
    slot_ptr,  # int64 [R]
    position_ptr,  # int64 [R]
    step_ptr,  # int64 [R]
    done_ptr,  # bool [R]
    stop_ids_ptr,  # int64 [R, NUM_STOPS], -1 where unused
    seen_ptr,  # bool [R, V]
    input_ids_ptr,  # int64 [R, 9], see Drafts
    token_ids_ptr,  # int32 [R, token_ids_stride]
    last_slot_ptr,  # int64 [R]
    verify_output_ptr,  # int64 [R, 10]
    V,
    token_ids_stride,
    SIZE: tl.constexpr,
    STOPS: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    NGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`ngram.accept` of the likeliest tokens, and `ngram.draft` behind them. A program a row."""
    row = tl.program_id(0)
    best_ptr += row * SIZE
    token_ptr += row
    slot_ptr += row
    position_ptr += row
    step_ptr += row
    done_ptr += row
    stop_ids_ptr += row * NUM_STOPS
    seen_ptr += row.to(tl.int64) * V
    input_ids_ptr += row * 9
    token_ids_ptr += row.to(tl.int64) * token_ids_stride
    last_slot_ptr += row
    verify_output_ptr += row * 10
    index = tl.arange(0, 8)
    stop_index = tl.arange(0, STOPS)
    stop_ids = tl.load(stop_ids_ptr + stop_index, mask=stop_index < NUM_STOPS, other=-1)
    last_slot = tl.load(last_slot_ptr)
    if PDL:
        gdc_wait()
    real = index < SIZE
    best = tl.load(best_ptr + index, mask=real, other=0)
    done = tl.load(done_ptr)
    old = tl.load(token_ptr)
    slot = tl.load(slot_ptr)
    drafted = tl.load(input_ids_ptr + 1 + index)
    chosen = 0xFFFFFFFF - (best & 0xFFFFFFFF)

    CHECKED: tl.constexpr = SIZE - 1 if SIZE > 1 else 1
    wrong = (chosen != drafted) | (index >= CHECKED)
    num_matched = tl.min(tl.where(wrong, index, 8), axis=0)
    stops = tl.max((chosen[:, None] == stop_ids[None, :]).to(tl.int32), axis=1) != 0
    first_stop = tl.min(tl.where(stops & real, index, SIZE), axis=0)
    accepted = num_matched if SIZE > 1 else 0
    count = tl.minimum(tl.minimum(accepted, first_stop) + 1, last_slot - slot)
    count = tl.where(done, 0, count)
    ended = (first_stop < count) | (slot + count == last_slot)
    last_token = tl.sum(tl.where(index == count - 1, chosen, 0), axis=0)
    token = tl.where(count > 0, last_token, old)
    # Every thread has read what is overwritten now.
    tl.debug_barrier()
    tl.store(best_ptr + index, -0x8000000000000000, mask=real)
    tl.store(token_ids_ptr + slot + 1 + index, chosen.to(tl.int32), mask=index < count)
    tl.store(seen_ptr + chosen, True, mask=index < count)
    slot += count
    tl.store(token_ptr, token)
    tl.store(slot_ptr, slot)
    tl.store(position_ptr, tl.load(position_ptr) + count)
    tl.store(step_ptr, tl.load(step_ptr) + count)
    tl.store(done_ptr, done | ended)
    tl.store(verify_output_ptr, count)
    tl.store(verify_output_ptr + 1, num_matched)
    tl.store(verify_output_ptr + 2 + index, chosen, mask=real)
    tl.debug_barrier()

    # The longest match, and of those the last: a key is length << 32 | place.
    found = tl.full((BLOCK,), -1, tl.int64)
    for start in tl.range(0, slot, BLOCK, num_stages=1):
        places = start + tl.arange(0, BLOCK)
        matches = places < slot
        length = tl.zeros((BLOCK,), tl.int64)
        for back in tl.static_range(NGRAM):
            last = tl.load(token_ids_ptr + tl.maximum(slot - back, 0))
            matches &= places >= back
            ids = tl.load(token_ids_ptr + places - back, mask=matches, other=-1)
            matches &= ids == last
            length += matches.to(tl.int64)
        found = tl.maximum(found, tl.where(length > 0, (length << 32) | places.to(tl.int64), -1))
    match = tl.max(found, axis=0)
    first = tl.where(match < 0, slot, (match & 0xFFFFFFFF) + 1)
    guessed = tl.load(token_ids_ptr + first + index % (slot + 1 - first))
    tl.store(input_ids_ptr, token)
    tl.store(input_ids_ptr + 1 + index, guessed.to(tl.int64))
