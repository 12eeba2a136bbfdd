"""Joins what programs found out about parts of a sequence (flash-decoding, Dao et al. 2023)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def join_parts(
    acc_ptr,  # float32 [SPLITS, LANES, D]: weighted values
    tops_ptr,  # float32 [SPLITS, LANES]: largest scores
    totals_ptr,  # float32 [SPLITS, LANES]: sums of weights
    parts,  # how many there are, 1 to SPLITS
    D: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The softmax over all parts, [LANES, D]. AT_ONCE parts are on their way at a time."""
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, D), tl.float32)
    if AT_ONCE == SPLITS:  # without a loop the compiler leaves away what is added to zeros
        top, total, acc = add_parts(
            acc_ptr, tops_ptr, totals_ptr, 0, parts, top, total, acc, D, LANES, AT_ONCE
        )
    else:
        first = 0
        while first < parts:
            top, total, acc = add_parts(
                acc_ptr, tops_ptr, totals_ptr, first, parts, top, total, acc, D, LANES, AT_ONCE
            )
            first += AT_ONCE
    return acc / total[:, None]


@triton.jit
def add_parts(
    acc_ptr,
    tops_ptr,
    totals_ptr,
    first,
    parts,
    top,  # [LANES], of the parts before `first`
    total,  # [LANES]
    acc,  # [LANES, D]
    D: tl.constexpr,
    LANES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """`top`, `total` and `acc` with AT_ONCE more parts.

    The results of a part are read as one row: that is how the compiler deals the parts of a place
    to one thread. As axes of their own, parts are dealt to different warps, and meet through shared
    memory. Reads past the first-level cache, which does not see what other programs wrote.
    """
    part = first + tl.arange(0, AT_ONCE)[:, None]
    there = part < parts
    at = part * LANES + tl.arange(0, LANES)[None, :]
    tops = tl.load(tops_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(totals_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
    rows = tl.load(
        acc_ptr + part * LANES * D + tl.arange(0, LANES * D)[None, :],
        mask=there,
        other=0.0,
        cache_modifier=".cg",
    )
    new_top = tl.maximum(top, tl.max(tops, axis=0))
    factors = tl.exp2(tops - new_top[None, :])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(totals * factors, axis=0)
    rows = tl.reshape(rows, (AT_ONCE, LANES, D)) * factors[:, :, None]
    return new_top, total, acc * shrink[:, None] + tl.sum(rows, axis=0)
