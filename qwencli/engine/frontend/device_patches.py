"""Resizes pictures and cuts them into patches on the device: `Patchify` for a GPU.

Equal to `preprocess.patchify_on_host` bit by bit. Pillow resamples bytes with integers (8 bits of
picture, 22 of weight), one axis after the other, rounding to bytes between; integer sums do not
depend on their order, so the same integers give the same bytes on any device. torch's own
`interpolate(antialias=True)` works in floating point and differs where a value lies near a half.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from qwencli.config import DType
from qwencli.engine.frontend.preprocess import by_step, pixels_of, scale_and_shift
from qwencli.engine.frontend.processor_config import ImageProcessorConfig

if TYPE_CHECKING:
    from torch import Tensor

# Of Pillow's Resample.c: 32 - 8 bits of a pixel - 2 for what bicubic weights add up to beyond 1.
_PRECISION = 22
_BICUBIC_SUPPORT = 2.0
_SIZES_KEPT = 64
_PATCHES = 4096  # that are scaled at a time
_PILLOW = int(PIL.__version__.partition(".")[0])


class DevicePatches:
    """Calls make tensors of `dtype` on `device`, one at a time, whichever threads they come from.

    They are done in the order of the thread's stream, and it goes on meanwhile.
    """

    def __init__(self, device: str, dtype: DType = DType.FLOAT32) -> None:
        import torch

        self._device, self._dtype = torch.device(device), getattr(torch, dtype.value)
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._scales: dict[ImageProcessorConfig, tuple[Tensor, Tensor]] = {}
        self._turn = threading.Lock()

    def __call__(
        self, frames: Sequence[Image.Image], size: tuple[int, int], config: ImageProcessorConfig
    ) -> Tensor:
        with self._turn:
            return self._patches(frames, size, config)

    def _patches(
        self, frames: Sequence[Image.Image], size: tuple[int, int], config: ImageProcessorConfig
    ) -> Tensor:
        import torch

        merge, patch, times = config.merge_size, config.patch_size, config.temporal_patch_size
        rows, columns = size[0] // config.factor, size[1] // config.factor
        count, steps = rows * columns * merge**2, max(1, len(frames) // times)
        size_of_all = (steps, count, 3, times, patch**2)
        out = torch.empty(size_of_all, dtype=self._dtype, device=self._device)
        scale, shift = self._scale_and_shift(config)
        for step, shown in enumerate(by_step(frames, times)):
            # As Pillow holds them, copied by nobody before the device: a fourth byte is left there.
            sent = [torch.from_numpy(pixels_of(frame)).to(self._device)[..., :3] for frame in shown]
            pixels = self._resized(sent[0][None] if len(sent) == 1 else torch.stack(sent), size)
            blocks = pixels.reshape(len(shown), rows, merge, patch, columns, merge, patch, 3)
            patches = blocks.permute(1, 4, 2, 5, 7, 0, 3, 6).reshape(count, 3, len(shown), -1)
            # Some at a time: in float32 a whole picture is as large as all the rest of this.
            for some, made in zip(
                torch.split(patches, _PATCHES), torch.split(out[step], _PATCHES), strict=True
            ):
                made.copy_(torch.mul(some, scale).sub_(shift))
        return out.view(steps * count, -1)

    def _scale_and_shift(self, config: ImageProcessorConfig) -> tuple[Tensor, Tensor]:
        """float32 [C, 1, 1] on the device: copied once, as the first copies after a pause are
        what takes longest about a small picture."""
        import torch

        if config not in self._scales:
            scale, shift = (
                torch.from_numpy(value)[:, :, None].to(self._device)
                for value in scale_and_shift(config)
            )
            self._settle()
            self._scales[config] = scale, shift
        return self._scales[config]

    def _resized(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 [F, H, W, C] -> the same with `size`, along the axes in Pillow's order."""
        axes = ((1, size[0]), (2, size[1]))
        vertically_first = _vertically_first(pixels.shape[1:3], size)
        for axis, length in axes if vertically_first else reversed(axes):
            if pixels.shape[axis] != length:
                pixels = self._resampled(pixels, axis, length)
        return pixels

    def _resampled(self, pixels: Tensor, axis: int, length: int) -> Tensor:
        import torch

        indices, weights = self._taps(pixels.shape[axis], length)
        shape = list(pixels.shape)
        shape[axis] = length
        total = torch.full(shape, 1 << (_PRECISION - 1), dtype=torch.int32, device=self._device)
        along = [1] * pixels.dim()
        along[axis] = length
        for index, weight in zip(indices, weights, strict=True):
            total.addcmul_(pixels.index_select(axis, index).to(torch.int32), weight.view(along))
        return (total >> _PRECISION).clamp_(0, 255).to(torch.uint8)

    def _taps(self, length: int, new_length: int) -> tuple[Tensor, Tensor]:
        """Source places (int64) and weights (int32), both [taps, new_length], on the device."""
        import torch

        key = (length, new_length)
        if key not in self._kept:
            if len(self._kept) == _SIZES_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._make_taps(length, new_length)
            self._settle()
        found = self._kept[key]
        if self._device.type == "cuda":
            for each in found:  # dropped from here, they may still be read on this stream
                each.record_stream(torch.cuda.current_stream(self._device))
        return found

    def _settle(self) -> None:
        """Wait until what was just made can be read on every stream."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _make_taps(self, length: int, new_length: int) -> tuple[Tensor, Tensor]:
        import torch

        firsts, weights = bicubic_weights(length, new_length)
        places = firsts[None] + np.arange(len(weights))[:, None]
        indices = torch.from_numpy(np.minimum(places, length - 1))
        return indices.to(self._device), torch.from_numpy(weights).to(self._device)


def _vertically_first(old: Sequence[int], new: Sequence[int]) -> bool:
    """Which axis Pillow resamples first, sizes given as (height, width).

    Along rows, until version 13 (pull request 9549) turned that round where height loses more than
    twice the pixels that width does. The rule is ours from what Pillow 13.0 does, held to it by
    the tests.
    """
    fewer_rows, fewer_columns = old[0] - new[0], old[1] - new[1]
    return _PILLOW >= 13 and fewer_rows > 0 and fewer_rows > 2 * fewer_columns


def bicubic_weights(
    length: int, new_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """The first source place [N] of each new pixel and its integer weights [taps, N], 0-filled.

    `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c: a window as wide as the
    filter, stretched by the scale where the picture shrinks, cut off at the picture's edges.
    """
    scale = length / new_length
    stretch = max(scale, 1.0)
    support = _BICUBIC_SUPPORT * stretch
    centers = (np.arange(new_length) + 0.5) * scale
    firsts = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centers + support + 0.5).astype(np.int64), length)
    taps = np.arange(math.ceil(support) * 2 + 1)[:, None]
    weights = _bicubic((taps + firsts - centers + 0.5) * (1.0 / stretch))
    weights[taps >= ends - firsts] = 0.0
    # Summed in Pillow's order: another one may round differently.
    total = np.zeros(new_length)
    for row in weights:
        total += row
    exact = weights / total * (1 << _PRECISION)
    # Away from zero on a half, as adding a half and cutting off does.
    return firsts, np.trunc(exact + np.copysign(0.5, exact)).astype(np.int32)


def _bicubic(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Keys' cubic convolution with a = -0.5 (IEEE TASSP 29, 1981)."""
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
