"""Attention of the vision tower: every patch of a segment sees its whole segment, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwencli.config import Attention
from qwencli.engine.layers.vision_layout import Run
from qwencli.engine.ops.flash_attention import flash_segments

Tensor = torch.Tensor
# q, k, v [segments, length, H, D] -> [segments, length, H, D]
SegmentAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Offsets:
    """Segments of which the host knows no more than that none has over `longest` patches.

    Args:
        starts: int32 [segments + 1] on the device, the last is the number of patches.
    """

    starts: Tensor
    longest: int


def attend(qkv: Tensor, segments: Sequence[Run] | Offsets, attention: SegmentAttention) -> Tensor:
    """Attend inside each segment: heads of q, k and v [N, 3 * H, D] -> [N, H * D]."""
    if isinstance(segments, Offsets):
        return flash_segments(qkv, segments.starts, segments.longest)
    return attend_runs(qkv, segments, attention)


def attend_runs(qkv: Tensor, runs: Sequence[Run], attention: SegmentAttention) -> Tensor:
    """Segments of equal length that follow each other are one batch, so one image is one call
    without a mask."""
    heads, dim = qkv.shape[1] // 3, qkv.shape[2]
    sizes = [run.count * run.length for run in runs]
    pieces = []
    for run, piece in zip(runs, qkv.split_with_sizes(sizes), strict=True):
        segments = piece.view(run.count, run.length, 3, heads, dim).unbind(2)
        pieces.append(attention(*segments).reshape(-1, heads * dim))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v in plain operators: the reference of the others."""
    scores = torch.einsum("slhd,smhd->shlm", q, k) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("shlm,smhd->slhd", weights, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, no mask."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out


SEGMENT_ATTENTION: Mapping[Attention, SegmentAttention] = {
    Attention.EAGER: eager,
    Attention.SDPA: sdpa,
    Attention.FLASH: flash_attention_2,
}
