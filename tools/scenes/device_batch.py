"""Moves a batch to the device and turns its pictures into pixels in -1..1."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.scenes.batches import Batch, Pictures
from tools.scenes.draw_sdf import draw_batch

TENSORS = ("ids", "positions", "image_index", "picked", "wanted")
LABELS = ("object_labels", "number_labels", "noise")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Everything the model reads; object rows stay on the CPU for the renderer."""
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in TENSORS}
    pictures = [
        replace(
            group,
            drawn=group.drawn.to(device, non_blocking=True),
            **{name: getattr(group, name).to(device, non_blocking=True) for name in LABELS},
        )
        for group in batch.pictures
    ]
    return replace(batch, pictures=pictures, **moved)


def pixels(group: Pictures, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """[B, 3, h, w] fp32: PIL's pictures first, then those drawn here; noise with a generator."""
    parts = []
    if len(group.drawn):
        parts.append(group.drawn.permute(0, 3, 1, 2).float())
    if len(group.background):
        drawn = draw_batch(
            group.canvas,
            group.background,
            group.objects,
            group.numbers,
            group.softness,
            group.digit_style,
            group.digit_weight,
            device,
        )
        size = (group.target[1], group.target[0])
        if drawn.shape[2:] != size:
            drawn = F.interpolate(drawn, size, mode="bicubic", antialias=True)
        parts.append(drawn.round_().clamp_(0, 255))
    picture = torch.cat(parts)
    if generator:
        noise = torch.randn(picture.shape, device=device, generator=generator)
        picture = (picture + noise * group.noise[:, None, None, None]).clamp_(0, 255)
    return picture / 127.5 - 1
