"""The patch embedding as the convolution that checkpoints describe, and as a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwencli.engine.instruments.device_work import device_work
from qwencli.engine.instruments.probes.answers import PatchEmbedding, Work
from qwencli.engine.instruments.probes.measure.kernel_names import short
from qwencli.engine.instruments.timing import compute_dtype, seconds_per_call

# A picture of 448 x 448. A slow convolution takes 10 to 100 ms for that, which is long enough.
PATCHES = 784


def patch_embedding(device: str, work: Work) -> PatchEmbedding:
    """Times both; they are the same arithmetic, as the kernel's stride is its size.

    Raises:
        RuntimeError: the model has no vision tower, or the device cannot run one of the two.
    """
    if not (
        work.vision_hidden and work.in_channels and work.temporal_patch_size and work.patch_size
    ):
        raise RuntimeError("a text model has no patch embedding")
    size = (work.in_channels, work.temporal_patch_size, work.patch_size, work.patch_size)
    dtype = compute_dtype(device)
    with torch.inference_mode():
        patches = torch.randn(PATCHES, *size, dtype=dtype, device=device)
        weight = torch.randn(work.vision_hidden, *size, dtype=dtype, device=device)
        flat, matrix = patches.flatten(1), weight.flatten(1)

        def convolve() -> torch.Tensor:
            return F.conv3d(patches, weight, stride=size[1:])

        conv3d_s = seconds_per_call(device, convolve, samples=3)
        linear_s = seconds_per_call(device, lambda: F.linear(flat, matrix), samples=3)
        seen = device_work(device, convolve)
    names = tuple(short(name) for name in seen.names) if seen else ()
    return PatchEmbedding(PATCHES, conv3d_s * 1e3, linear_s * 1e3, names)
