"""The six groups of operations that a decoder layer and the head consist of, in plain torch.

They are the readable reference: a faster kernel replaces one field of `DecoderOps` and is held to
it by a parity test. Each takes tensors and plain numbers only, allocates nothing but its result,
never synchronises, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwencli.engine.native.attention import AttentionFunction, AttentionPlan
from qwencli.engine.native.kv_cache import KVCache
from qwencli.engine.native.rope import CosSin, rotate

Tensor = torch.Tensor


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, fused, and the numbers its operations need.

    Args:
        qkv: [(H + 2 KVH) * D, hidden], rows of q, then k, then v. gate_up: [2 I, hidden].
        qk_norm: [H + KVH, D], the norm of each query and key head; None = not normalised.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share.

    Args:
        rope: cosine and signed sine, [B, S, 1, D] each. slots: int64 [S], where the new keys go.
    """

    rope: CosSin
    slots: Tensor
    plan: AttentionPlan
    cache: KVCache
    attention: AttentionFunction


def norm_qkv(hidden: Tensor, layer: Layer) -> Tensor:
    """hidden [B, S, hidden] -> [B, S, (H + 2 KVH) * D]."""
    x = F.rms_norm(hidden, (hidden.shape[-1],), layer.attn_norm, layer.eps)
    return F.linear(x, layer.qkv, layer.qkv_bias)


def attend(qkv: Tensor, layer: Layer, step: Step) -> Tensor:
    """Norm and rotate queries and keys, write the cache, attend: -> [B, S, H * D]."""
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    split = qkv.view(*qkv.shape[:-1], heads + 2 * kv_heads, layer.head_dim)
    qk = split.narrow(2, 0, heads + kv_heads)
    if layer.qk_norm is not None:
        # Queries and keys in one pass; their weights differ by head, so they come after it.
        qk = F.rms_norm(qk, (layer.head_dim,), None, layer.eps) * layer.qk_norm
    qk = rotate(qk, *step.rope)
    keys, values = step.cache.write(
        layer.index,
        qk.narrow(2, heads, kv_heads),
        split.narrow(2, heads + kv_heads, kv_heads),
        step.slots,
        step.plan.kv_len,
    )
    return step.attention(qk.narrow(2, 0, heads), keys, values, step.plan)


def o_residual(attended: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
    """hidden + W_o attended, [B, S, hidden]."""
    return hidden + F.linear(attended, layer.o, layer.o_bias)


def norm_gate_up(hidden: Tensor, layer: Layer) -> Tensor:
    """SwiGLU of the normed hidden state: silu(gate) * up, [B, S, I]."""
    x = F.rms_norm(hidden, (hidden.shape[-1],), layer.mlp_norm, layer.eps)
    gate, up = F.linear(x, layer.gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def down_residual(activated: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
    """hidden + W_down activated, [B, S, hidden]."""
    return hidden + F.linear(activated, layer.down)


def norm_head(hidden: Tensor, norm: Tensor, eps: float, head: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., hidden]."""
    return F.linear(F.rms_norm(hidden, (hidden.shape[-1],), norm, eps), head)


@dataclass(frozen=True)
class DecoderOps:
    """The operations a decoder runs; every field can be replaced alone."""

    norm_qkv: Callable[[Tensor, Layer], Tensor] = norm_qkv
    attend: Callable[[Tensor, Layer, Step], Tensor] = attend
    o_residual: Callable[[Tensor, Layer, Tensor], Tensor] = o_residual
    norm_gate_up: Callable[[Tensor, Layer], Tensor] = norm_gate_up
    down_residual: Callable[[Tensor, Layer, Tensor], Tensor] = down_residual
    norm_head: Callable[[Tensor, Tensor, float, Tensor], Tensor] = norm_head


REFERENCE_OPS = DecoderOps()
