"""A compact Qwen3.5 for training: Gated DeltaNet and gated attention, and a head that drafts.

Beside `model.py` it has other layers, zero-centred norms and no DeepStack. Parameter names equal
those of a `qwen3_5` checkpoint, its `mtp.*` included; tests hold the outputs against transformers.

The chunked delta rule is the one of `qwencli.engine.ops.gated_delta`, for whole batches and with
gradients: all chunks of all sequences are solved for at once, by matrix products alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.scenes.model import ModelShape, Qwen3VL, TextMLP, TextModel, _rotate, scatter_pictures

CHUNK = 64
TAPS = 4
SMALLEST = 8  # triangular systems of this size are solved by a short product


@dataclass(frozen=True)
class HybridShape(ModelShape):
    """1.9 million parameters: 3.8 MB in bf16."""

    hidden: int = 128
    layers: int = 4
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    intermediate: int = 256
    mrope_section: tuple[int, int, int] = (6, 5, 5)
    vision_hidden: int = 96
    vision_depth: int = 6
    vision_heads: int = 3
    vision_intermediate: int = 320
    position_side: int = 12
    deepstack: tuple[int, ...] = ()
    interval: int = 4
    rotated: float = 0.5
    k_heads: int = 2
    v_heads: int = 4
    delta_dim: int = 32

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotated)

    @property
    def layer_types(self) -> list[str]:
        kinds = ("linear_attention", "full_attention")
        return [kinds[(layer + 1) % self.interval == 0] for layer in range(self.layers)]


class ZeroCentredNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), scale.shape, scale, 1e-6).to(x.dtype)


class GatedDeltaNet(nn.Module):
    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.shape = shape
        keys, values = shape.k_heads * shape.delta_dim, shape.v_heads * shape.delta_dim
        channels = 2 * keys + values
        self.in_proj_qkv = nn.Linear(shape.hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(shape.hidden, values, bias=False)
        self.in_proj_b = nn.Linear(shape.hidden, shape.v_heads, bias=False)
        self.in_proj_a = nn.Linear(shape.hidden, shape.v_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, TAPS, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.zeros(shape.v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(shape.v_heads))
        self.norm = nn.RMSNorm(shape.delta_dim, eps=1e-6)
        self.out_proj = nn.Linear(values, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, hidden] -> [B, L, hidden]; every sequence begins with an empty state."""
        shape, (batch, length, _) = self.shape, x.shape
        qkv = self._convolved(self.in_proj_qkv(x))
        keys = shape.k_heads * shape.delta_dim
        heads = (batch, length, -1, shape.delta_dim)
        q, k, v = (
            part.reshape(heads).transpose(1, 2).float()
            for part in qkv.split((keys, keys, qkv.shape[-1] - 2 * keys), -1)
        )
        q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
        each = shape.v_heads // shape.k_heads
        q, k = (part.repeat_interleave(each, 1) for part in (q * shape.delta_dim**-0.5, k))
        a = self.in_proj_a(x).float() + self.dt_bias.float()
        g = (-self.A_log.float().exp() * F.softplus(a)).transpose(1, 2)
        beta = self.in_proj_b(x).float().sigmoid().transpose(1, 2)
        o = chunked_delta_rule(q, k, v, g, beta).transpose(1, 2)
        z = self.in_proj_z(x).view(heads)
        weight = self.norm.weight.float()
        gated = F.rms_norm(o, weight.shape, weight, 1e-6) * F.silu(z.float())
        return self.out_proj(gated.to(x.dtype).reshape(batch, length, -1))

    def _convolved(self, x: Tensor) -> Tensor:
        """A sum of shifted products: cuDNN is slow at the gradients of depthwise kernels."""
        length, weight = x.shape[1], self.conv1d.weight.squeeze(1)
        padded = F.pad(x, (0, 0, TAPS - 1, 0))
        total = padded[:, :length] * weight[:, 0]
        for tap in range(1, TAPS):
            total = torch.addcmul(total, padded[:, tap : tap + length], weight[:, tap])
        return F.silu(total)


class _Inverse(torch.autograd.Function):
    """(I + T)^-1 of strictly lower triangular T [..., n, n]; its gradient is two products."""

    @staticmethod
    def forward(ctx: Any, strictly_lower: Tensor) -> Tensor:
        inverse = _inverse(strictly_lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ gradients[0] @ inverse.mT).tril(-1)


def _inverse(t: Tensor) -> Tensor:
    """By halves; the smallest ones as (I - T)(I + T^2)(I + T^4), exact for n = 8.

    Longer products are as exact on paper only: where keys are alike, powers of T grow.
    """
    size = t.shape[-1]
    if size == SMALLEST:
        eye = torch.eye(size, device=t.device, dtype=t.dtype)
        square = t @ t
        return (eye - t) @ (eye + square) @ (eye + square @ square)
    half = size // 2
    corners = torch.stack((t[..., :half, :half], t[..., half:, half:]), -3)
    first, second = _inverse(corners).unbind(-3)
    below = -(second @ t[..., half:, :half] @ first)
    above = torch.cat((first, torch.zeros_like(first)), -1)
    return torch.cat((above, torch.cat((below, second), -1)), -2)


def chunked_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k (normed), v [B, heads, L, dim] and g, beta [B, heads, L], float32 -> as v."""
    length = q.shape[2]
    room = -length % CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, room)).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    g, beta = (F.pad(x, (0, room)).unflatten(2, (-1, CHUNK)) for x in (g, beta))
    decay = g.cumsum(-1)  # [B, heads, chunks, CHUNK]
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()
    wide = beta.unsqueeze(-1)
    solve = _Inverse.apply((wide * (k @ k.mT) * between).tril(-1))
    values = solve @ (wide * v)
    known = solve @ (wide * decay.exp().unsqueeze(-1) * k)
    inside = (q @ k.mT) * between
    q = q * decay.exp().unsqueeze(-1)
    left = (k * (decay[..., -1:] - decay).exp().unsqueeze(-1)).mT
    kept = decay[..., -1].exp()[..., None, None]
    state = torch.zeros_like(left[:, :, 0] @ v[:, :, 0])
    out = []
    for chunk in range(q.shape[2]):
        delta = values[:, :, chunk] - known[:, :, chunk] @ state
        out.append(q[:, :, chunk] @ state + inside[:, :, chunk] @ delta)
        state = state * kept[:, :, chunk] + left[:, :, chunk] @ delta
    return torch.cat(out, 2)[:, :, :length]


class GatedAttention(nn.Module):
    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, 2 * width, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.q_norm = ZeroCentredNorm(shape.head_dim)
        self.k_norm = ZeroCentredNorm(shape.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q, gate = self.q_proj(x).view(batch, length, self.shape.heads, -1).chunk(2, -1)
        q = self._turn(self.q_norm(q).transpose(1, 2), cos, sin)
        k = self._turn(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2) * gate.sigmoid()
        return self.o_proj(out.reshape(batch, length, -1))

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
        return torch.cat((_rotate(turned, cos, sin), rest), -1)


class HybridLayer(nn.Module):
    def __init__(self, shape: HybridShape, kind: str) -> None:
        super().__init__()
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(shape)
        else:
            self.self_attn = GatedAttention(shape)
        self.kind = kind
        self.mlp = TextMLP(shape)
        self.input_layernorm = ZeroCentredNorm(shape.hidden)
        self.post_attention_layernorm = ZeroCentredNorm(shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        if self.kind == "linear_attention":
            x = x + self.linear_attn(normed)
        else:
            x = x + self.self_attn(normed, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class HybridTextModel(TextModel):
    def __init__(self, shape: HybridShape) -> None:
        super().__init__(shape)
        self.layers = nn.ModuleList(HybridLayer(shape, kind) for kind in shape.layer_types)
        self.norm = ZeroCentredNorm(shape.hidden)


class DraftHead(nn.Module):
    """`mtp.*`: from the hidden state of a token and the token after it, that of the one after.

    It shares the model's embedding and output head. Its own result may stand for the hidden state
    of the next token, so that it drafts any number of tokens.
    """

    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * shape.hidden, shape.hidden, bias=False)
        self.pre_fc_norm_embedding = ZeroCentredNorm(shape.hidden)
        self.pre_fc_norm_hidden = ZeroCentredNorm(shape.hidden)
        self.layers = nn.ModuleList([HybridLayer(shape, "full_attention")])
        self.norm = ZeroCentredNorm(shape.hidden)

    def forward(self, embedding: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        both = (self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden))
        return self.norm(self.layers[0](self.fc(torch.cat(both, -1)), cos, sin))


class Qwen35(Qwen3VL):
    def __init__(self, shape: HybridShape) -> None:
        super().__init__(shape, HybridTextModel(shape))
        self.mtp = DraftHead(shape)

    def drafts(
        self,
        hidden: Tensor,
        ids: Tensor,
        positions: Tensor,
        image_index: Tensor,
        tokens: Tensor | None,
        depth: int,
    ) -> list[Tensor]:
        """Hidden states of drafts 1 to `depth`: that of draft d at [b, t] is for token t + 1 + d.

        Gradients reach the head alone, so that it does not change what it drafts for. With
        `tokens` [B, V, hidden] it reads pictures as the layers do, without as token ids: engines
        differ in what they feed it there.
        """
        text: TextModel = self.model["language_model"]
        with torch.no_grad():
            embedded = scatter_pictures(text.embed_tokens(ids), image_index, tokens)
        hidden, made = hidden.detach(), []
        for d in range(1, depth + 1):
            # What wraps around is at the end of a row, where nothing is drafted.
            cos, sin = text.rope(positions.roll(1 - d, 1), hidden.dtype)
            hidden = self.mtp(embedded.roll(-d, 1), hidden, cos, sin)
            made.append(hidden)
        return made

    def draft_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model["language_model"].embed_tokens.weight.detach())


def initialize_delta(model: Qwen35, generator: torch.Generator) -> None:
    """Decays from 0.0005 to 0.2 a token: what a picture left is there at the answer's end."""
    for layer in model.model["language_model"].layers:
        if layer.kind == "linear_attention":
            mixer: GatedDeltaNet = layer.linear_attn
            draws = torch.rand(2, model.shape.v_heads, generator=generator)
            step = torch.exp(math.log(1e-3) + draws[0] * math.log(50))
            mixer.dt_bias.data.copy_(step + torch.log(-torch.expm1(-step)))
            mixer.A_log.data.copy_((0.5 + 3.5 * draws[1]).log())
