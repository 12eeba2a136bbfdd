"""Small tensors on their way to the device together, while the host goes on.

A copy of ordinary memory waits until the device has done all that was given to it before; for a
prompt that is its pictures' encoding, during which the host could launch the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Tensors of one type on the host -> the same on `device`, there in one copy."""
    if device.type != "cuda":
        return tuple(tensor.to(device) for tensor in tensors)
    sizes = [tensor.numel() for tensor in tensors]
    # torch keeps pinned memory until the copies from it are done.
    pinned = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=True)
    torch.cat([tensor.flatten() for tensor in tensors], out=pinned)
    sent = pinned.to(device, non_blocking=True).split_with_sizes(sizes)
    return tuple(part.view(tensor.shape) for part, tensor in zip(sent, tensors, strict=True))
