"""Heads of many tokens between the projection and attention: normed, rotated, stored; one kernel.

Plain operators take a launch each for the norm, its gain, two products, halves that change places,
and the cache, and round between. The heads of prompts and of vision towers are the same work, the
latter without a norm and a cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwencli.engine.cache.kv_cache import KeysValues, QuantizedKVCache, StaticKVCache
from qwencli.engine.cache.paged_kv import PagedKVCache, QuantizedPagedKVCache
from qwencli.engine.kernels.decode_attention import norm_and_rotate
from qwencli.engine.kernels.launch_cache import CachedLaunch, launch
from qwencli.engine.ops.decoder_ops import Layer, Step
from qwencli.engine.ops.rope import CosSin

Tensor = torch.Tensor

TOKENS = 32  # of one program
WARPS = 4


@triton.jit(do_not_specialize=["rows", "length", "room"])
def qk_norm_rope_kernel(
    qkv_ptr,  # [B * S, width]: ROTATED heads of D columns, then others, the first of them values
    cos_ptr,  # [B * S, ROTARY]
    sin_ptr,  # [B * S, ROTARY], signed, see ops.rope
    gain_ptr,  # [ROTATED, D], weights of the heads' norms; None = no norm
    cache_ptr,  # [B, 2 * KVH, room, D], or [slots, 2 * KVH, D]; None = everything stays
    slot_ptr,  # int64 [S] or [B * S], where each token's keys and values go; None without a cache
    rows,  # B * S
    length,  # S
    width,
    room,
    eps,
    ROTATED: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF: tl.constexpr,
    PAGED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (TOKENS tokens, head). HALF is D / 2 rounded up to a power of two. The first ROTARY
    columns rotate, in pairs ROTARY / 2 apart.

    With a cache the last KVH heads that turn are keys and go there, with the KVH values behind
    them; everything else stays in its place. PAGED: the cache is the second kind, and keys stay in
    their place too.
    """
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    column = tl.arange(0, HALF)[None, :]
    inside = (row < rows)[:, None] & (column < D // 2)
    there = row[:, None].to(tl.int64)
    # A column of each pair, and half of those that do not rotate: as `first_of_pairs`.
    turned = inside & (column < ROTARY // 2)
    low_at = tl.where(column < ROTARY // 2, column, column + ROTARY // 2)
    high_at = tl.where(column < ROTARY // 2, column + ROTARY // 2, column + D // 2)
    head_ptr = qkv_ptr + there * width + head * D
    low = tl.load(head_ptr + low_at, mask=inside, other=0.0)
    high = tl.load(head_ptr + high_at, mask=inside, other=0.0)
    if head < ROTATED:
        angle = there * ROTARY + column
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle + ROTARY // 2, mask=turned, other=0.0).to(tl.float32)
        gain_low, gain_high = cos, cos
        if gain_ptr is not None:
            gain_at = gain_ptr + head * D
            gain_low = tl.load(gain_at + low_at, mask=column < D // 2, other=0.0)
            gain_high = tl.load(gain_at + high_at, mask=column < D // 2, other=0.0)
        new_low, new_high = norm_and_rotate(
            low, high, gain_low, gain_high, cos, sin, eps, D, gain_ptr is not None
        )
        low, high = new_low.to(low.dtype), new_high.to(high.dtype)
    stays = ROTATED if PAGED else ROTATED - KVH
    if head < stays:
        tl.store(head_ptr + low_at, low, mask=inside)
        tl.store(head_ptr + high_at, high, mask=inside)
    if cache_ptr is not None and head >= ROTATED - KVH:
        own = head - (ROTATED - KVH)
        if PAGED:
            place = tl.load(slot_ptr + row, mask=row < rows, other=0) * (2 * KVH) + own
        else:
            slot = tl.load(slot_ptr + row % length, mask=row < rows, other=0)
            place = ((row // length).to(tl.int64) * (2 * KVH) + own) * room + slot
        at = cache_ptr + place[:, None] * D
        tl.store(at + low_at, low, mask=inside)
        tl.store(at + high_at, high, mask=inside)


class QkNormRope:
    """Launches for one kind of heads; those of one prompt's layers are alike but for tensors."""

    def __init__(self) -> None:
        self._latest: tuple[tuple[Any, ...], CachedLaunch] | None = None

    def __call__(
        self,
        split: Tensor,
        rope: CosSin,
        rotated: int,
        gains: Tensor | None = None,
        eps: float = 0.0,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> None:
        """Turn the first heads of `split` [B, S, heads, D] in place; or, with a cache, store.

        Args:
            rope: cosine and signed sine, [B, S, 1, D], or of the first columns alone, which then
                turn alone.
            rotated: heads that turn. gains: [rotated, D], of their norms; None = they have none.
            cache: [B, 2 * KVH, max_seq_len, D], gets the last KVH rotated heads and as many
                behind them, at `slots` [S]. Or a pool of pages [slots, 2 * KVH, D], at `slots`
                [B * S]; then all heads that turn stay in their place as well.
        """
        batch, length, _, dim = split.shape
        kv_heads = room = 0
        paged = cache is not None and cache.dim() == 3
        if cache is not None:
            kv_heads, room = cache.shape[1] // 2, 0 if paged else cache.shape[2]
        rows, width = batch * length, split.stride(1)
        arguments = (split, *rope, gains, cache, slots, rows, length, width, room, eps)
        norms, turned = gains is not None, rope[0].shape[-1]
        alike = (
            *(rows, length, width, room, dim, turned, rotated, kv_heads),
            *(norms, rope[0].dtype, paged),
        )
        if self._latest is not None and self._latest[0] == alike:
            self._latest[1](*arguments)
            return
        assert split.is_contiguous() and all(x.is_contiguous() for x in rope), "one row a token"
        constants = {
            "ROTATED": rotated,
            "KVH": kv_heads,
            "D": dim,
            "ROTARY": turned,
            "HALF": triton.next_power_of_2(dim // 2),
            "PAGED": paged,
            "TOKENS": TOKENS,
        }
        grid = (triton.cdiv(rows, TOKENS), rotated + kv_heads, 1)
        run = launch(qk_norm_rope_kernel, grid, arguments, constants, WARPS)
        self._latest = None if run is None else (alike, run)


class QkNormRopeStore:
    """`decoder_ops.qk_norm_rope_store` in one launch where the cache keeps what is computed."""

    def __init__(self) -> None:
        self._heads = QkNormRope()

    def __call__(self, split: Tensor, layer: Layer, step: Step) -> KeysValues:
        assert step.rope is not None, "prompts bring their angles"
        norm = layer.qk_norm
        gains, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        rope, rotated = step.rope[layer.index], layer.num_heads + layer.num_kv_heads
        cache, kv_len = step.cache, step.plan.kv_len
        if isinstance(cache, StaticKVCache) and not isinstance(cache, QuantizedKVCache):
            self._heads(split, rope, rotated, gains, eps, cache.layers[layer.index], step.slots)
            return cache.visible(layer.index, kv_len)
        if isinstance(cache, PagedKVCache) and not isinstance(cache, QuantizedPagedKVCache):
            self._heads(split, rope, rotated, gains, eps, cache.layers[layer.index], step.slots)
            return cache.own(split.narrow(2, layer.num_heads, 2 * layer.num_kv_heads))
        self._heads(split, rope, rotated, gains, eps)
        fresh = split.narrow(2, layer.num_heads, 2 * layer.num_kv_heads)
        return cache.write(layer.index, fresh, step.slots, kv_len)
