"""Attention of one new token of each row over pages: split-KV, lengths read on the device.

A program takes the query heads that share a key head, of one row, over a part of the row's pages;
a second kernel combines the parts (flash-decoding, Dao et al. 2023). Many rows fill the GPU by
themselves and are not split. Reference: `paged_kv.paged_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwencli.engine.cache.paged_kv import PAGE_SIZE, DecodePages

Tensor = torch.Tensor

MAX_SPLITS = 16
# Programs for each processor that a split aims at.
PROGRAMS_EACH = 2
LEAST_LANES = 16  # of an operand of a matrix unit
LOG2_E = 1.4426950408889634


@triton.jit
def paged_attention_kernel(
    q_ptr,  # [B, H, D] with `q_stride` from row to row
    pool_ptr,  # [slots, 2 * KVH, D]: keys, then values
    page_table_ptr,  # int32 [B, pages] with `table_stride` from row to row
    length_ptr,  # int32 [B], at least 1
    out_ptr,  # [B, H * D]
    acc_ptr,  # float32 [B * KVH, SPLITS, LANES, D]
    row_max_ptr,  # float32 [B * KVH, SPLITS, LANES]
    row_sum_ptr,  # float32 [B * KVH, SPLITS, LANES]
    q_stride,
    table_stride,
    scale,  # log2(e) / sqrt(D)
    KVH: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (row * KVH + key head, split). LANES: GROUP rounded up to what a matrix unit takes;
    D is a power of two. Scores are in powers of two."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    row = pair // KVH
    head = pair % KVH
    lane = tl.arange(0, LANES)
    column = tl.arange(0, D)[None, :]
    offset = tl.arange(0, PAGE)
    used = (lane < GROUP)[:, None]
    q = tl.load(
        q_ptr + row.to(tl.int64) * q_stride + (head * GROUP + lane)[:, None] * D + column,
        mask=used,
        other=0.0,
    )
    length = tl.load(length_ptr + row)
    pages = tl.cdiv(length, PAGE)
    each = tl.cdiv(pages, SPLITS)
    first = split * each
    end = tl.minimum(first + each, pages)
    row_max = tl.full((LANES,), float("-inf"), tl.float32)
    row_sum = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, D), tl.float32)
    for page in range(first, end):
        block = tl.load(page_table_ptr + row * table_stride + page).to(tl.int64)
        there = page * PAGE + offset < length
        at = pool_ptr + (block * PAGE + offset)[:, None] * (2 * KVH * D) + head * D + column
        k = tl.load(at, mask=there[:, None], other=0.0)
        v = tl.load(at + KVH * D, mask=there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        row_max = new_max
    if SPLITS == 1:
        out = acc / row_sum[:, None]
        at = out_ptr + (row.to(tl.int64) * KVH * GROUP + head * GROUP + lane)[:, None] * D + column
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=used)
    else:
        part = (pair * SPLITS + split) * LANES + lane
        tl.store(acc_ptr + part[:, None].to(tl.int64) * D + column, acc, mask=used)
        tl.store(row_max_ptr + part, row_max)
        tl.store(row_sum_ptr + part, row_sum)


@triton.jit
def combine_kernel(
    acc_ptr,
    row_max_ptr,
    row_sum_ptr,
    out_ptr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (row * KVH + key head, query head of the group). A split without pages has the sum 0
    and the maximum -inf."""
    pair = tl.program_id(0)
    lane = tl.program_id(1)
    part = (pair * SPLITS + tl.arange(0, SPLITS)) * LANES + lane
    column = tl.arange(0, D)[None, :]
    row_max = tl.load(row_max_ptr + part)
    row_sum = tl.load(row_sum_ptr + part)
    factors = tl.exp2(row_max - tl.max(row_max, axis=0))
    acc = tl.load(acc_ptr + part[:, None].to(tl.int64) * D + column)
    out = tl.sum(acc * factors[:, None], axis=0) / tl.sum(row_sum * factors, axis=0)
    at = out_ptr + (pair.to(tl.int64) * GROUP + lane) * D + tl.arange(0, D)
    tl.store(at, out.to(out_ptr.dtype.element_ty))


class PagedAttention:
    """Launches for one model on one device, and the buffers of its splits."""

    def __init__(self, num_processors: int) -> None:
        self._processors = num_processors

    def __call__(self, q: Tensor, pool: Tensor, pages: DecodePages) -> Tensor:
        """As `ops.paged_attention`; D must be a power of two of 16 or more."""
        batch, heads, dim = q.shape
        kv_heads = pool.shape[1] // 2
        group = heads // kv_heads
        lanes = max(triton.next_power_of_2(group), LEAST_LANES)
        pairs = batch * kv_heads
        splits = triton.next_power_of_2(max(1, PROGRAMS_EACH * self._processors // pairs))
        splits = min(splits, MAX_SPLITS)
        assert q.stride(2) == 1 and q.stride(1) == dim, "heads of a row side by side"
        out = q.new_empty(batch, heads * dim)
        parts = pairs * splits * lanes if splits > 1 else 1
        acc = torch.empty(parts, dim, dtype=torch.float32, device=q.device)
        row_max, row_sum = torch.empty(2, parts, dtype=torch.float32, device=q.device)
        paged_attention_kernel[pairs, splits](
            q,
            pool,
            pages.tables,
            pages.lengths,
            out,
            acc,
            row_max,
            row_sum,
            q.stride(0),
            pages.tables.stride(0),
            LOG2_E * dim**-0.5,
            KVH=kv_heads,
            GROUP=group,
            LANES=lanes,
            D=dim,
            PAGE=PAGE_SIZE,
            SPLITS=splits,
            # tl.dot would round float32 operands to TF32 otherwise.
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=3,
        )
        if splits > 1:
            combine_kernel[pairs, group](
                acc, row_max, row_sum, out, GROUP=group, LANES=lanes, D=dim, SPLITS=splits,
                num_warps=2,
            )  # fmt: skip
        return out
