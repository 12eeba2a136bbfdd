"""Attention over pages of the KV pool in plain torch: `kernels.decode_attention` is held to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwencli.engine.cache.paged_kv import PAGE_SIZE, DecodePages, PackedPrompts, pages_for
from qwencli.engine.ops.attention import flash_varlen, prompt_plan

Tensor = torch.Tensor


def decode_slots(tables: Tensor, places: Tensor) -> Tensor:
    """The pool's slots, int64 [B, S], of the tokens at `places` (int64 [B, S]) of each row."""
    pages = tables.gather(1, places // PAGE_SIZE)
    return pages.to(torch.int64) * PAGE_SIZE + places % PAGE_SIZE


def paged_attention(
    q: Tensor, pool: Tensor, pages: DecodePages, scales: Tensor | None = None
) -> Tensor:
    """q [B, S, H, D] over the pages of `pool` [slots, 2 * KVH, D] -> [B * S, H * D].

    Gathers what every row might see up to the longest: the reference of the kernel, and what runs
    where there is none.

    Args:
        scales: float32 [slots, 2 * KVH], of a pool of int8 or fp8; None = it is not quantized.
    """
    batch, length, heads, dim = q.shape
    kv_heads = pool.shape[1] // 2
    used = pages.tables[:, : pages_for(pages.longest)].to(torch.int64)
    stored = pool.view(-1, PAGE_SIZE, 2 * kv_heads, dim)
    # Bytes are picked as bytes: indexing knows no fp8.
    seen = stored[used] if scales is None else stored.view(torch.int8)[used].view(pool.dtype)
    if scales is not None:
        scale = scales.view(-1, PAGE_SIZE, 2 * kv_heads)[used]
        seen = seen.to(q.dtype).mul_(scale.unsqueeze(-1))
    seen = seen.flatten(1, 2).transpose(1, 2)  # [B, 2 KVH, count * PAGE_SIZE, D]
    own = pages.places[:, None] + torch.arange(length, device=q.device)
    hidden = torch.arange(seen.shape[2], device=q.device) > own[:, :, None]
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(hidden, float("-inf"))[:, None]
    group = heads // kv_heads
    if length > 1:
        mask = mask.repeat_interleave(group, 2)
    # Queries of all tokens that share a key head: [B, KVH, S * group, D].
    grouped = q.view(batch, length, kv_heads, group, dim).transpose(1, 2).flatten(2, 3)
    keys, values = seen.split_with_sizes((kv_heads,) * 2, dim=1)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    out = out.view(batch, kv_heads, length, group, dim).transpose(1, 2)
    return out.reshape(batch * length, heads * dim)


def prompt_attention(q: Tensor, keys: Tensor, values: Tensor, packed: PackedPrompts) -> Tensor:
    """q [N, H, D] of packed prompts over what they see, [M, KVH, D] -> [N, H * D]."""
    whole = [n + before for n, before in zip(packed.lengths, packed.contexts, strict=True)]
    if packed.flash:
        return flash_varlen(
            q, keys, values, packed.starts, packed.context_starts, max(packed.lengths), max(whole)
        )
    parts = zip(
        q.split_with_sizes(packed.lengths),
        keys.split_with_sizes(whole),
        values.split_with_sizes(whole),
        strict=True,
    )
    return torch.cat([attend_alone(*part) for part in parts])


def attend_alone(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last tokens q [S, H, D] of a sequence with keys and values [T, KVH, D] -> [S, H * D]."""
    length, total = len(q), len(keys)
    plan = prompt_plan(total - length, length, keys.shape[1], q.dtype, q.device)
    q, keys, values = (heads.transpose(0, 1)[None] for heads in (q, keys, values))
    out = F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=plan.mask,
        is_causal=plan.mask is None and length > 1,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).flatten(1)
