"""The end of a greedy decode step: the token it chose, and what the next step starts from."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

# Below every key that `gemv_kernel` makes.
NOTHING_CHOSEN = -(2**63)


@triton.jit
def finish_token_kernel(
    best_ptr,  # int64 [1], see gemv_kernel
    token_ptr,  # int64 [1]
    slot_ptr,  # int64 [1]
    position_ptr,  # int64 [1]
    step_ptr,  # int64 [1]
    done_ptr,  # bool [1]
    stop_ids_ptr,  # int64 [NUM_STOPS], -1 where unused
    seen_ptr,  # bool [V]
    STOPS: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Make the best row the new token, unless the answer has ended; get ready for the next step."""
    index = tl.arange(0, STOPS)
    stop_ids = tl.load(stop_ids_ptr + index, mask=index < NUM_STOPS, other=-1)
    done = tl.load(done_ptr)
    old = tl.load(token_ptr)
    if PDL:
        gdc_wait()
    best = tl.load(best_ptr)
    tl.store(best_ptr, -0x8000000000000000)
    token = tl.where(done, old, 0xFFFFFFFF - (best & 0xFFFFFFFF))
    going = tl.where(done, 0, 1).to(tl.int64)
    ended = tl.max((stop_ids == token).to(tl.int32), axis=0) != 0
    tl.store(token_ptr, token)
    tl.store(seen_ptr + token, True)
    tl.store(slot_ptr, tl.load(slot_ptr) + going)
    tl.store(position_ptr, tl.load(position_ptr) + going)
    tl.store(step_ptr, tl.load(step_ptr) + going)
    tl.store(done_ptr, done | ended)


@triton.jit
def verify_drafts_kernel(
    best_ptr,  # int64 [SIZE], see gemm_kernel
    token_ptr,  # int64 [1]
    slot_ptr,  # int64 [1]
    position_ptr,  # int64 [1]
    step_ptr,  # int64 [1]
    done_ptr,  # bool [1]
    stop_ids_ptr,  # int64 [NUM_STOPS], -1 where unused
    seen_ptr,  # bool [V]
    input_ids_ptr,  # int64 [9], see Drafts
    token_ids_ptr,  # int32 [max_seq_len]
    last_slot_ptr,  # int64 [1]
    verify_output_ptr,  # int64 [10]
    SIZE: tl.constexpr,
    STOPS: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    NGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`ngram.accept` of the best rows, and `ngram.draft` behind them. One program."""
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
