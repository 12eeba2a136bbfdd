"""Attention over the cache: what a step may see (`AttentionPlan`) and the implementations.

A plan is built once per step and shared by all layers. Grouped-query attention never expands the
keys and values: a decode step treats the heads of a group as rows of one query matrix, a prompt
passes them as a batch over keys with stride 0, or to a kernel that knows groups.

torch's own flash attention is called by its name: for one query over as many slots as the device
says (flash-decoding), for prompts, and for pictures of which the device knows the sizes.

`scaled_dot_product_attention` with a mask runs kernels that do not split one query's keys among
the processors (18.8 us a layer on an H200, results/2026-11-23-h200-native-first-look). The same
library's kernel for sequences of unequal length does, and needs no mask. It runs in half precision
from compute capability 8.0 on.

Called so for a prompt it takes queries and keys as they lie and knows groups of heads: nothing is
copied, and no mask is needed behind a reused prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from qwencli.config import Attention

forward = torch.ops.aten._flash_attention_forward


@dataclass(frozen=True)
class Spans:
    """Where a single query and the slots that it sees begin and end: int32 [2] each, on the device.

    Args:
        query: 0 and 1. slots: 0 and the number of slots in use after this step.
    """

    query: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def on(cls, device: torch.device) -> Spans:
        query = torch.tensor([0, 1], dtype=torch.int32, device=device)
        return cls(query, torch.zeros_like(query))


def can_flash_decode(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether torch has that kernel for this device, type and shape of heads."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    q = torch.empty(1, num_heads, 1, head_dim, dtype=dtype, device=device)
    k = torch.empty(1, num_kv_heads, 1, head_dim, dtype=dtype, device=device)
    # The kernel pads no heads; what calls it in torch does.
    whole = head_dim % 8 == 0
    return whole and can_use_flash_attention(SDPAParams(q, k, k, None, 0.0, False, True))


def flash_decode(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans
) -> torch.Tensor:
    """q [1, 1, H, D] over keys and values [1, KVH, kv_len, D] -> [1, 1, H * D].

    The keys are split by kv_len, as that is what the host knows: the nearer it is to the slots in
    use, the more of the device works.
    """
    out: torch.Tensor = forward(
        q[0],
        keys[0].transpose(0, 1),
        values[0].transpose(0, 1),
        spans.query,
        spans.slots,
        1,
        keys.shape[2],
        0.0,
        False,
        False,
    )[0]
    return out.view(1, 1, -1)


def flash_prompt(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q [B, S, H, D] in the last S of the slots of keys and values [B, KVH, kv_len, D], each seeing
    its own slot and all before it -> [B, S, H * D]."""
    # Its causal rule aligns the last query with the last key.
    out: torch.Tensor = forward(
        q,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        None,
        None,
        q.shape[1],
        keys.shape[2],
        0.0,
        True,
        False,
    )[0]
    return out.flatten(2)


def flash_segments(qkv: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
    """Heads of q, k and v [N, 3 * H, D], each patch over the whole of its segment -> [N, H * D].

    Args:
        offsets: int32 [segments + 1] on the device, where each begins; the last is N.
        longest: patches of the longest segment at most.
    """
    q, k, v = qkv.view(len(qkv), 3, -1, qkv.shape[2]).unbind(1)
    out: torch.Tensor = forward(q, k, v, offsets, offsets, longest, longest, 0.0, False, False)[0]
    return out.flatten(1)


def flash_varlen(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    longest_keys: int,
) -> torch.Tensor:
    """q [N, H, D] of several sequences side by side over their keys and values [M, KVH, D], each
    query seeing its own slot and all before it -> [N, H * D].

    Args:
        starts, key_starts: int32 [sequences + 1] on the device, where each begins.
        longest, longest_keys: tokens of the longest sequence at most.
    """
    out: torch.Tensor = forward(
        q, keys, values, starts, key_starts, longest, longest_keys, 0.0, True, False
    )[0]
    return out.flatten(1)


@dataclass(frozen=True)
class AttentionPlan:
    """What the queries of one step may see.

    Args:
        kv_len: slots that attention reads; those at its end may be hidden by the mask.
        mask: added to the scores: [B, 1, 1, kv_len] where the step has one query a row, else
            [1, B * KVH, S, kv_len] (or 1 for the heads). None: each query sees its own slot and all
            before it, the queries being the last S of `lengths`, or of all slots; implementations
            other than flash_attention_2 need S == kv_len or S == 1 for that, or `flash`.
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
        flash: whether torch's flash attention runs here, see `can_flash_decode`; or the package's.
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
    lengths = plan.lengths
    if lengths is None and plan.left_pads is not None:
        # Without lengths it may take a kernel that expects whole blocks, and padding leaves none.
        lengths = torch.full_like(plan.left_pads, plan.kv_len)
    # It wants positions before heads; the strides of the cache are fine as they are.
    cache = keys.transpose(1, 2), values.transpose(1, 2)
    # torch.compile cannot look into the package, and would stop at each layer.
    call = torch.ops.qwencli.flash_attn if torch.compiler.is_compiling() else _flash_attn
    out: torch.Tensor = call(q, *cache, lengths, plan.left_pads)
    return out.flatten(2)


def _flash_attn(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    left_pads: torch.Tensor | None,
) -> torch.Tensor:
    """q [B, S, H, D] over a cache [B, slots, KVH, D] -> as q.

    Args:
        lengths: slots in use, int32 [B]; None = all.
    """
    from flash_attn import flash_attn_with_kvcache

    out: torch.Tensor = flash_attn_with_kvcache(
        q, keys, values, cache_seqlens=lengths, cache_leftpad=left_pads, causal=True
    )
    return out.contiguous()


def _like_its_queries(q: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


torch.library.define(
    "qwencli::flash_attn",
    "(Tensor q, Tensor keys, Tensor values, Tensor? lengths, Tensor? left_pads) -> Tensor",
)
torch.library.impl("qwencli::flash_attn", "CompositeExplicitAutograd", _flash_attn)
torch.library.register_fake("qwencli::flash_attn", _like_its_queries)


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
