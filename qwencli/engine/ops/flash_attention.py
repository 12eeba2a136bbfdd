"""torch's own flash attention by its name: for one query over as many slots as the device says,
for prompts, and for pictures of which the device knows the sizes.

`scaled_dot_product_attention` with a mask runs kernels that do not split one query's keys among
the processors (18.8 us a layer on an H200, results/2026-11-23-h200-native-first-look). The same
library's kernel for sequences of unequal length does, and needs no mask. It runs in half precision
from compute capability 8.0 on.

Called so for a prompt it takes queries and keys as they lie and knows groups of heads: nothing is
copied, and no mask is needed behind a reused prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention

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
