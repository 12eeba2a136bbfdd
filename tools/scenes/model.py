"""A compact Qwen3-VL for training: batched at one grid a group, no cache, no padding logic.

Parameter names equal those of transformers' `Qwen3VLForConditionalGeneration`, so a state dict
moves between the two unchanged; a parity test holds the outputs together. Does not know sampling,
videos, or batches of ragged pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.scenes.grid import MERGE, PATCH

# Projections back to the residual stream.
OUTPUTS = (
    "o_proj.weight",
    "out_proj.weight",
    "down_proj.weight",
    "attn.proj.weight",
    "mlp.linear_fc2.weight",
)


@dataclass(frozen=True)
class ModelShape:
    vocab: int = 1024
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    mrope_section: tuple[int, int, int] = (12, 10, 10)
    rope_theta: float = 10000.0
    vision_hidden: int = 160
    vision_depth: int = 6
    vision_heads: int = 5
    vision_intermediate: int = 640
    position_side: int = 24
    deepstack: tuple[int, ...] = (1, 3)

    @property
    def rotary_dim(self) -> int:
        return self.head_dim


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class VisionAttention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads = shape.vision_heads
        self.qkv = nn.Linear(shape.vision_hidden, 3 * shape.vision_hidden)
        self.proj = nn.Linear(shape.vision_hidden, shape.vision_hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        qk = _rotate(qkv[:2], cos, sin)
        out = F.scaled_dot_product_attention(qk[0], qk[1], qkv[2])
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class VisionMLP(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(shape.vision_hidden, shape.vision_intermediate)
        self.linear_fc2 = nn.Linear(shape.vision_intermediate, shape.vision_hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.vision_hidden, eps=1e-6)
        self.norm2 = nn.LayerNorm(shape.vision_hidden, eps=1e-6)
        self.attn = VisionAttention(shape)
        self.mlp = VisionMLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four neighbouring patches -> one token of the text model's width."""

    def __init__(self, shape: ModelShape, *, norm_after: bool) -> None:
        super().__init__()
        self.width = shape.vision_hidden * MERGE**2
        self.norm = nn.LayerNorm(self.width if norm_after else shape.vision_hidden, eps=1e-6)
        self.norm_after = norm_after
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        if self.norm_after:
            x = self.norm(x.reshape(batch, -1, self.width))
        else:
            x = self.norm(x).reshape(batch, -1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class PatchEmbed(nn.Module):
    """A still picture is its frame twice, so the two temporal kernels add up to one."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, shape.vision_hidden, (2, PATCH, PATCH), stride=(2, PATCH, PATCH))

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.sum(2).flatten(1), self.proj.bias)


class VisionModel(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape)
        self.pos_embed = nn.Embedding(shape.position_side**2, shape.vision_hidden)
        self.blocks = nn.ModuleList(VisionBlock(shape) for _ in range(shape.vision_depth))
        self.merger = Merger(shape, norm_after=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(shape, norm_after=True) for _ in shape.deepstack
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """pixels [B, 3, H, W] in -1..1 -> tokens [B, H*W/1024, hidden] and the deepstack ones."""
        rows, columns = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        head_dim = self.shape.vision_hidden // self.shape.vision_heads
        index, weight, cos, sin = _vision_positions(
            rows, columns, self.shape.position_side, head_dim, pixels.device
        )
        x = self.patch_embed(_patchify(pixels, rows, columns))
        x = x + (self.pos_embed(index) * weight.to(x.dtype)[..., None]).sum(1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        deep = []
        for number, block in enumerate(self.blocks):
            x = block(x, cos, sin)
            if number in self.shape.deepstack:
                deep.append(self.deepstack_merger_list[len(deep)](x))
        return self.merger(x), deep


def _patchify(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """[B, 3, H, W] -> [B, patches, 3*16*16], patches in 2x2 block order."""
    batch = pixels.shape[0]
    split = pixels.reshape(batch, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    return split.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, rows * columns, 3 * PATCH**2)


@lru_cache(maxsize=512)
def _vision_positions(
    rows: int, columns: int, side: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bilinear taps [P, 4] and weights into the learned grid, and rope cos, sin [P, head_dim]."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    blocks = grid.view(rows // MERGE, MERGE, columns // MERGE, MERGE, 2)
    y, x = blocks.transpose(1, 2).reshape(-1, 2).unbind(-1)
    taps, weights = [], []
    axes = [(c * (side - 1) / max(1, n - 1)) for c, n in ((y.float(), rows), (x.float(), columns))]
    floors = [a.floor() for a in axes]
    for dy in (0, 1):
        for dx in (0, 1):
            ty, tx = ((f + d).clamp(max=side - 1) for f, d in zip(floors, (dy, dx), strict=True))
            wy, wx = (1 - (a - f - d).abs() for a, f, d in zip(axes, floors, (dy, dx), strict=True))
            taps.append((ty * side + tx).long())
            weights.append(wy * wx)
    half = head_dim // 2
    frequency = 1.0 / (10000.0 ** (torch.arange(0, half, 2).float() / half))
    angles = torch.cat((y[:, None] * frequency, x[:, None] * frequency), -1).repeat(1, 2)
    parts = (torch.stack(taps, 1), torch.stack(weights, 1), angles.cos(), angles.sin())
    index, weight, cos, sin = (part.to(device) for part in parts)
    return index, weight, cos, sin


class TextAttention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class TextMLP(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.self_attn = TextAttention(shape)
        self.mlp = TextMLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(TextLayer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B, L, 3] (t, h, w) -> cos, sin [B, 1, L, rotary_dim], axes interleaved."""
        half = self.shape.rotary_dim // 2
        steps = torch.arange(half, device=positions.device)
        frequency = self.shape.rope_theta ** (-steps.float() / half)
        axis = _rope_axes(self.shape.mrope_section, positions.device)  # [half]
        angles = positions.float()[..., axis] * frequency
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=8)
def _rope_axes(section: tuple[int, int, int], device: torch.device) -> Tensor:
    """Which of (t, h, w) each frequency takes: t h w t h w ... then t alone."""
    axes = [0] * sum(section)
    for axis in (1, 2):
        for index in range(axis, 3 * section[axis], 3):
            axes[index] = axis
    return torch.tensor(axes, device=device)


class Qwen3VL(nn.Module):
    """`model.visual`, `model.language_model`; the output head is the tied embedding."""

    def __init__(self, shape: ModelShape, text: TextModel | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {"visual": VisionModel(shape), "language_model": text or TextModel(shape)}
        )

    def see(self, pictures: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Visual tokens of a request's pictures in order [B, V, hidden], and deepstack ones."""
        if not pictures:
            return None, []
        seen = [self.model["visual"](pixels) for pixels in pictures]
        deep = [torch.cat(parts, 1) for parts in zip(*(d for _, d in seen), strict=True)]
        return torch.cat([tokens for tokens, _ in seen], 1), deep

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        image_index: Tensor,
        tokens: Tensor | None,
        deep: list[Tensor],
    ) -> Tensor:
        """ids [B, L], positions [B, L, 3], image_index [B, V] -> hidden states [B, L, hidden]."""
        text: TextModel = self.model["language_model"]
        x = scatter_pictures(text.embed_tokens(ids), image_index, tokens)
        where = image_index[..., None].expand(-1, -1, x.shape[-1])
        cos, sin = text.rope(positions, x.dtype)
        for number, layer in enumerate(text.layers):
            x = layer(x, cos, sin)
            if number < len(deep):
                x = x.scatter_add(1, where, deep[number])
        return text.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model["language_model"].embed_tokens.weight)


def scatter_pictures(embedded: Tensor, image_index: Tensor, tokens: Tensor | None) -> Tensor:
    """Embeddings [B, L, hidden], with the visual tokens [B, V, hidden] at [B, V] of each row."""
    if tokens is None:
        return embedded
    return embedded.scatter(1, image_index[..., None].expand_as(tokens), tokens)


def initialize(model: Qwen3VL, seed: int) -> None:
    """Normal weights of deviation 1/sqrt(fan_in); outputs of residual branches smaller."""
    generator = torch.Generator().manual_seed(seed)
    shape = model.shape
    for name, parameter in model.named_parameters():
        depth = shape.vision_depth if ".visual." in name else shape.layers
        if name.endswith(("bias", "A_log")):
            parameter.data.zero_()
        elif "norm" not in name:  # those begin as they should
            embedding = "embed_tokens" in name or "pos_embed" in name
            deviation = 0.02 if embedding else 1 / math.sqrt(parameter[0].numel())
            if name.endswith(OUTPUTS):
                deviation /= math.sqrt(2 * depth)
            parameter.data.normal_(0.0, deviation, generator=generator)
