"""The end of a greedy decode step: the token it chose, and what the next step starts from."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

# Below every key that `gemv_kernel` makes.
NOTHING_CHOSEN = -(2**63)


@triton.jit
def choose_kernel(
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
