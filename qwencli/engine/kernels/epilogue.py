"""What every matrix-vector kernel does with its finished rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_bits(x):
    """int32 that sorts as the float32 `x` does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def offer_best(y, seen, rows, inside, penalty_ptr, best_ptr):
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
