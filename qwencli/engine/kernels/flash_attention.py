"""Attention of many queries: prompts, each token over itself and all before it, and pictures.

A program holds a block of queries of one head and goes over the keys that they see, block by block,
with a running softmax: scores are never written (FlashAttention-2, arXiv 2307.08691, algorithm 1).
Blocks of keys that every query of the block sees need no mask; those on the diagonal come last.
Programs of the latest queries, which see most, start first. References: `ops.paged_attention`'s
`attend_alone`, and torch's flash attention, which it replaces where it was measured to be faster.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from qwencli.engine.kernels.launch_cache import CachedLaunch, launch
from qwencli.engine.kernels.launches import gpu_of
from qwencli.engine.kernels.tiles import FlashTilesBySize, flash_tiles

Tensor = torch.Tensor
NARROWEST = 16  # that matrix units multiply
READ = tl.constexpr(8)  # values that a thread reads at once


@triton.jit(do_not_specialize=["length", "key_length"])
def flash_attention_kernel(
    q_ptr,  # [N, H, D], D next to each other
    key_ptr,  # [M, KVH, D]
    value_ptr,  # [M, KVH, D]
    out_ptr,  # [N, H * D]
    starts_ptr,  # int32 [sequences + 1], where queries of each begin
    key_starts_ptr,  # int32 [sequences + 1], where keys of each begin
    length,  # queries and keys of the only sequence; -1 = there are several, by `starts`
    key_length,
    scale,  # of scores, by log2(e)
    q_stride,
    q_head_stride,  # those of heads by READ: the compiler sees that READ divides the product
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (head, block of QUERIES, sequence). CAUSAL: the last query sees the last key, and
    each up to its own place; else all of its sequence.

    Heads are the power of two WIDTH wide, and the rest of D, if there is one, fits in REST: 72
    columns as 64 and 16 cost half of what 128 do.
    """
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(starts_ptr + sequence)
    key_start = tl.load(key_starts_ptr + sequence)
    if length < 0:
        length = tl.load(starts_ptr + sequence + 1) - start
        key_length = tl.load(key_starts_ptr + sequence + 1) - key_start
    if block * QUERIES >= length:
        return
    row = block * QUERIES + tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)
    there = (row < length)[:, None]
    q_ptr += start.to(tl.int64) * q_stride + head * (q_head_stride * READ)
    q_at = q_ptr + row[:, None] * q_stride
    q = tl.load(q_at + column[None, :], mask=there, other=0.0)
    row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    row_sum = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    q_rest, acc_rest = q, acc
    if REST:
        rest = WIDTH + tl.arange(0, REST)
        rest_there = there & (rest < D)[None, :]
        q_rest = tl.load(q_at + rest[None, :], mask=rest_there, other=0.0)
        acc_rest = tl.zeros((QUERIES, REST), tl.float32)
    kv_head = (head // GROUP).to(tl.int64)
    first_key = key_start.to(tl.int64)
    key_ptr += first_key * key_stride + kv_head * (key_head_stride * READ)
    value_ptr += first_key * value_stride + kv_head * (value_head_stride * READ)
    own = key_length - length + row  # the last key that each sees
    end = key_length
    seen_by_all = key_length
    if CAUSAL:
        end = tl.minimum(key_length - length + (block + 1) * QUERIES, key_length)
        seen_by_all = key_length - length + block * QUERIES + 1
    whole = seen_by_all // KEYS * KEYS
    row_max, row_sum, acc, acc_rest = attend_blocks(
        q, q_rest, key_ptr, value_ptr, 0, whole, own, key_length, scale, key_stride, value_stride,
        row_max, row_sum, acc, acc_rest, D, WIDTH, REST, CAUSAL, False, KEYS, STAGES,
    )  # fmt: skip
    row_max, row_sum, acc, acc_rest = attend_blocks(
        q, q_rest, key_ptr, value_ptr, whole, end, own, key_length, scale, key_stride, value_stride,
        row_max, row_sum, acc, acc_rest, D, WIDTH, REST, CAUSAL, True, KEYS, STAGES,
    )  # fmt: skip
    out_stride = tl.num_programs(0) * D
    out_at = out_ptr + start.to(tl.int64) * out_stride + head * D + row[:, None] * out_stride
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at + column[None, :], out, mask=there)
    if REST:
        out = (acc_rest / row_sum[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_at + rest[None, :], out, mask=rest_there)


@triton.jit
def attend_blocks(
    q,  # [QUERIES, WIDTH]
    q_rest,  # [QUERIES, REST], see the kernel
    key_ptr,
    value_ptr,
    first,  # keys from here
    end,  # to here
    own,  # [QUERIES], the last key that each query sees
    key_length,
    scale,
    key_stride,
    value_stride,
    row_max,  # [QUERIES], of scores so far, by `scale`
    row_sum,  # [QUERIES], of their weights
    acc,  # [QUERIES, WIDTH], of weighted values
    acc_rest,  # [QUERIES, REST]
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Maxima and sums with more keys. MASKED: not every query sees all of them."""
    key = tl.arange(0, KEYS)
    column = tl.arange(0, WIDTH)
    rest = WIDTH + tl.arange(0, REST if REST else 1)
    for at in tl.range(first, end, KEYS, num_stages=STAGES):
        place = tl.cast(at, tl.int64)
        keys_at = key_ptr + place * key_stride + key[None, :] * key_stride
        values_at = value_ptr + place * value_stride + key[:, None] * value_stride
        inside = at + key < (key_length if MASKED else at + KEYS)
        keys = load_columns(keys_at + column[:, None], inside[None, :], MASKED)
        scores = tl.dot(q, keys)
        if REST:
            rest_inside = inside[None, :] & (rest < D)[:, None]
            scores = tl.dot(
                q_rest, load_columns(keys_at + rest[:, None], rest_inside, True), scores
            )
        if MASKED:
            visible = (at + key)[None, :] <= own[:, None] if CAUSAL else inside[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        weights = weights.to(q.dtype)
        values = load_columns(values_at + column[None, :], inside[:, None], MASKED)
        acc = tl.dot(weights, values, acc * shrink[:, None])
        if REST:
            rest_inside = inside[:, None] & (rest < D)[None, :]
            values = load_columns(values_at + rest[None, :], rest_inside, True)
            acc_rest = tl.dot(weights, values, acc_rest * shrink[:, None])
        row_max = new_max
    return row_max, row_sum, acc, acc_rest


@triton.jit
def load_columns(at, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=inside, other=0.0)
    else:  # noqa: RET505 - Triton compiles one of the branches
        return tl.load(at)


class FlashAttention:
    """Launches for heads of one kind; those of one pass are alike but for tensors.

    Args:
        tiles: by queries of the longest sequence, see `tiles.flash_tiles`.
        causal: whether each query sees up to its own place, the last being that of the last key;
            else all of its sequence.
    """

    def __init__(self, device: torch.device, tiles: FlashTilesBySize, causal: bool) -> None:
        # Stands for `starts` where there is a single sequence.
        self._nothing = torch.zeros(2, dtype=torch.int32, device=device)
        self._tiles, self._causal = tiles, causal
        self._latest: tuple[tuple[Any, ...], CachedLaunch] | None = None

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        longest: int,
        starts: Tensor | None = None,
        key_starts: Tensor | None = None,
    ) -> Tensor:
        """q [N, H, D] over keys and values [M, KVH, D] of as many sequences -> [N, H * D].

        Args:
            longest: queries of the longest sequence at most.
            starts, key_starts: int32 [sequences + 1] on the device, where queries and keys of each
                begin; None = there is one.
        """
        tokens, heads, dim = q.shape
        sequences, length, key_length = 1, tokens, len(keys)
        if starts is None or key_starts is None:
            starts = key_starts = self._nothing
        else:
            sequences, length, key_length = len(starts) - 1, -1, -1
        out = q.new_empty(tokens, heads * dim)
        scale = dim**-0.5 * math.log2(math.e)
        strides = tuple(
            stride
            for heads_of in (q, keys, values)
            for stride in (heads_of.stride(0), heads_of.stride(1) // READ.value)
        )
        arguments = (q, keys, values, out, starts, key_starts, length, key_length, scale, *strides)
        tiles = next(each for most, each in self._tiles if longest <= most)
        grid = (heads, triton.cdiv(longest, tiles.queries), sequences)
        alike = (tiles, grid, strides, keys.shape[1], dim, q.dtype)
        if self._latest is not None and self._latest[0] == alike:
            self._latest[1](*arguments)
            return out
        for each in (q, keys, values):
            assert each.stride(2) == 1 and each.stride(1) % READ.value == 0, "heads are read whole"
        width = 1 << (dim.bit_length() - 1)
        constants = {
            "GROUP": heads // keys.shape[1],
            "D": dim,
            "WIDTH": width,
            "REST": triton.next_power_of_2(max(dim - width, NARROWEST)) if dim > width else 0,
            "CAUSAL": self._causal,
            "QUERIES": tiles.queries,
            "KEYS": tiles.keys,
            "STAGES": tiles.stages,
        }
        run = launch(flash_attention_kernel, grid, arguments, constants, tiles.num_warps)
        self._latest = None if run is None else (alike, run)
        return out


def flash_attention_for(
    device: torch.device, dtype: torch.dtype, dim: int, causal: bool
) -> FlashAttention | None:
    """Where it is faster than torch's own, or None."""
    gpu = gpu_of(device)
    if gpu is None or dtype is torch.float32:
        return None
    tiles = flash_tiles(gpu.capability, dim, causal)
    return None if tiles is None else FlashAttention(device, tiles, causal)
