"""Combines the softmax of KV splits (flash-decoding, Dao et al. 2023)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def flash_decode_combine(
    acc_ptr,  # float32 [SPLITS, LANES, D]: weighted values
    row_max_ptr,  # float32 [SPLITS, LANES]: largest scores
    row_sum_ptr,  # float32 [SPLITS, LANES]: sums of weights
    kv_splits,  # how many there are, 1 to SPLITS
    D: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The softmax over all parts, [LANES, D]. AT_ONCE parts are on their way at a time."""
    running_max = tl.full((LANES,), float("-inf"), tl.float32)
    running_sum = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, D), tl.float32)
    if AT_ONCE == SPLITS:  # without a loop the compiler leaves away what is added to zeros
        running_max, running_sum, acc = add_splits(
            acc_ptr,
            row_max_ptr,
            row_sum_ptr,
            0,
            kv_splits,
            running_max,
            running_sum,
            acc,
            D,
            LANES,
            AT_ONCE,
        )
    else:
        first = 0
        while first < kv_splits:
            running_max, running_sum, acc = add_splits(
                acc_ptr,
                row_max_ptr,
                row_sum_ptr,
                first,
                kv_splits,
                running_max,
                running_sum,
                acc,
                D,
                LANES,
                AT_ONCE,
            )
            first += AT_ONCE
    return acc / running_sum[:, None]


@triton.jit
def add_splits(
    acc_ptr,
    row_max_ptr,
    row_sum_ptr,
    first,
    kv_splits,
    running_max,  # [LANES], of the parts before `first`
    running_sum,  # [LANES]
    acc,  # [LANES, D]
    D: tl.constexpr,
    LANES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """`running_max`, `running_sum` and `acc` with AT_ONCE more parts.

    The results of a part are read as one row: that is how the compiler deals the parts of a place
    to one thread. As axes of their own, parts are dealt to different warps, and meet through shared
    memory. Reads past the first-level cache, which does not see what other programs wrote.
    """
    part = first + tl.arange(0, AT_ONCE)[:, None]
    there = part < kv_splits
    at = part * LANES + tl.arange(0, LANES)[None, :]
    row_max = tl.load(row_max_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    row_sum = tl.load(row_sum_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
    rows = tl.load(
        acc_ptr + part * LANES * D + tl.arange(0, LANES * D)[None, :],
        mask=there,
        other=0.0,
        cache_modifier=".cg",
    )
    new_max = tl.maximum(running_max, tl.max(row_max, axis=0))
    factors = tl.exp2(row_max - new_max[None, :])
    shrink = tl.exp2(running_max - new_max)
    running_sum = running_sum * shrink + tl.sum(row_sum * factors, axis=0)
    rows = tl.reshape(rows, (AT_ONCE, LANES, D)) * factors[:, :, None]
    return new_max, running_sum, acc * shrink[:, None] + tl.sum(rows, axis=0)
