"""Attention over the cache: what a step may see (`AttentionPlan`) and the implementations.

A plan is built once per step and shared by all layers. Grouped-query attention never expands the
keys and values: a decode step treats the heads of a group as rows of one query matrix, a prompt
passes them as a batch over keys with stride 0, or to a kernel that knows groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwencli.config import Attention
from qwencli.engine.ops.flash_attention import Spans, flash_decode, flash_prompt


@dataclass(frozen=True)
class AttentionPlan:
    """What the queries of one step may see.

    Args:
        kv_len: slots that attention reads; those at its end may be hidden by the mask.
        mask: added to the scores: [B, 1, 1, kv_len] where the step has one query a row, else
            [1, B * KVH, S, kv_len] (or 1 for the heads). None: each query sees its own slot and all
            before it, the queries being the last S slots; implementations other than
            flash_attention_2 need S == kv_len or S == 1 for that, or `flash`.
        lengths: slots in use after this step, int32 [B] on the device.
        left_pads: slots of padding at the front, int32 [B] on the device; None = none.
        spans: a single query and what it sees, for torch's flash attention; no mask is needed.
        flash: whether sdpa is torch's flash attention; with no mask.
    """

    kv_len: int
    mask: torch.Tensor | None
    lengths: torch.Tensor | None = None
    left_pads: torch.Tensor | None = None
    spans: Spans | None = None
    flash: bool = False


# q [B, S, H, D], keys and values [B, KVH, kv_len, D], plan -> [B, S, H * D]
AttentionFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor
]


def hidden_score(dtype: torch.dtype) -> float:
    """What is added to a score to hide it.

    Half the type's lowest value: exp() of it is 0 beside any real score, the sum with a score
    stays finite in float16, and a row that is hidden entirely (a padding query) stays free of NaN.
    """
    return torch.finfo(dtype).min / 2


def prompt_plan(
    start: int,
    length: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    left_pads: torch.Tensor | None = None,
    flash: bool = False,
) -> AttentionPlan:
    """Plan of `length` queries at the slots from `start` on, everything before them in the cache.

    Args:
        left_pads: int32 [B] on the device: slots of padding at the front of each row.
        flash: whether torch's flash attention runs here, see `can_flash_decode`.
    """
    kv_len = start + length
    if left_pads is None and (start == 0 or length == 1 or flash):
        return AttentionPlan(kv_len, None, flash=flash)
    slots = torch.arange(kv_len, device=device)
    if left_pads is None:
        visible = (slots <= slots[start:, None])[None, None]  # [1, 1, S, kv_len]
    else:
        visible = (slots <= slots[start:, None]) & (slots >= left_pads[:, None, None])
        visible = visible.unsqueeze(1)  # [B, 1, S, kv_len]
        if length > 1:
            visible = visible.repeat_interleave(num_kv_heads, dim=0).transpose(0, 1)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(
        ~visible, hidden_score(dtype)
    )
    return AttentionPlan(kv_len, mask, left_pads=left_pads)


def decode_mask(
    slots: torch.Tensor, slot: torch.Tensor, left_pads: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Mask [1, 1, S, kv_len] of S queries, or [B, 1, 1, kv_len] of one query in each of B padded
    rows, from positions on the device alone.

    Args:
        slots: 0, 1, ... kv_len - 1 (int64 [kv_len]), made once; its length is the bucket.
        slot: the queries' own slots, int64 [S]; the slots after each are hidden from it.
        left_pads: int32 [B], with one query; or None.
    """
    hidden = slots > slot[:, None]
    mask = hidden if left_pads is None else hidden | (slots < left_pads[:, None])
    mask = mask.to(dtype) * hidden_score(dtype)
    return mask[None, None] if left_pads is None else mask[:, None, None]


def eager(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Softmax(q k^T / sqrt(D) + mask) v in plain operators: the reference of the others."""
    batch, length, heads, dim = q.shape
    kv_heads = keys.shape[1]
    if length == 1:
        grouped = q.view(batch, kv_heads, -1, dim)
        scores = torch.matmul(grouped, keys.transpose(-1, -2))
        if plan.mask is None:
            scores.mul_(dim**-0.5)
        else:
            scores = torch.add(plan.mask, scores, alpha=dim**-0.5)
        # The kernel sums in float32 whatever it reads and writes, so this is what a softmax in
        # float32 rounded back would give, in one launch.
        weights = torch.softmax(scores, dim=-1)
        return torch.matmul(weights, values).view(batch, 1, heads * dim)
    rows, k, v = _heads_over_shared_keys(q, keys, values)
    scores = torch.matmul(rows, k.transpose(-1, -2)) * dim**-0.5
    mask = plan.mask if plan.mask is not None else _causal(length, q)
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return _join_heads(torch.matmul(weights, v), batch)


def sdpa(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, or its flash kernel where the plan is made for that."""
    if plan.spans is not None:
        return flash_decode(q, keys, values, plan.spans)
    if plan.flash:
        return flash_prompt(q, keys, values)
    batch, length, heads, dim = q.shape
    if length == 1:
        grouped = q.view(batch, keys.shape[1], -1, dim)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=plan.mask)
        return out.reshape(batch, 1, heads * dim)
    rows, k, v = _heads_over_shared_keys(q, keys, values)
    out = F.scaled_dot_product_attention(
        rows, k, v, attn_mask=plan.mask, is_causal=plan.mask is None
    )
    return _join_heads(out, batch)


def flash_attention_2(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """The flash-attn package. Its causal rule aligns the last query with the last key."""
    from flash_attn import flash_attn_with_kvcache

    # It wants positions before heads; the strides of the cache are fine as they are.
    out: torch.Tensor = flash_attn_with_kvcache(
        q,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        cache_seqlens=plan.kv_len if plan.lengths is None else plan.lengths,
        cache_leftpad=plan.left_pads,
        causal=True,
    )
    return out.flatten(2)


ATTENTION: Mapping[Attention, AttentionFunction] = {
    Attention.EAGER: eager,
    Attention.SDPA: sdpa,
    Attention.FLASH: flash_attention_2,
}


def _heads_over_shared_keys(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [G, B * KVH, S, D] over keys and values [G (stride 0), B * KVH, kv_len, D].

    The group comes first, as a batch: torch's memory-efficient kernel takes keys with stride 0
    between heads for a sign that a single query is left, and gives the last one the mask of the
    first where only one is left of its last block (`num_queries == 1 && k_strideH == 0` in
    mem_eff_attention/kernel_forward.h).
    """
    batch, length, heads, dim = q.shape
    kv_heads, kv_len = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    rows = q.view(batch, length, kv_heads, group, dim).permute(3, 0, 2, 1, 4)
    rows = rows.reshape(group, batch * kv_heads, length, dim)
    size = (group, batch * kv_heads, kv_len, dim)
    return rows, keys.flatten(0, 1).expand(size), values.flatten(0, 1).expand(size)


def _join_heads(out: torch.Tensor, batch: int) -> torch.Tensor:
    """[G, B * KVH, S, D] -> [B, S, H * D]."""
    group, _, length, dim = out.shape
    out = out.reshape(group, batch, -1, length, dim)  # [G, B, KVH, S, D]
    return out.permute(1, 3, 2, 0, 4).reshape(batch, length, -1)


def _causal(length: int, like: torch.Tensor) -> torch.Tensor:
    mask = torch.full((length, length), -math.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(1)
