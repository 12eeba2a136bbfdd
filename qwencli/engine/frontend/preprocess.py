"""From RGB pictures and frames to the patches a Qwen vision tower takes. numpy and Pillow alone.

Every engine gets its pixels from here, so equal inputs need no test between engines; that they
equal the reference processor's is tested in tests/engine/frontend/test_preprocess.py.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwencli.engine.frontend.processor_config import (
    ImageProcessorConfig,
    VideoRules,
    check_visual,
    shown_size,
    smart_resize,
)
from qwencli.messages import ImagePart, VideoPart

GridTHW = tuple[int, int, int]
# Frames of one picture or video, height and width to resize them to, and how the model wants
# them -> float32 [num_patches, C * T * P * P], an array or a tensor. Patches go through each frame
# by blocks of merge_size x merge_size, each block becoming one token.
Patchify = Callable[[Sequence[Image.Image], tuple[int, int], ImageProcessorConfig], Any]

_SLICE = 128  # patches


@dataclass(frozen=True)
class Visual:
    """One picture or video of a prompt.

    Args:
        grid: patches as (time, rows, columns), before merging.
        seconds_per_grid: seconds of video that one step of the time axis covers.
        times_s: when each step of a video's time axis is seen.
    """

    grid: GridTHW
    video: bool = False
    seconds_per_grid: float = 1.0
    times_s: tuple[float, ...] = ()

    def num_tokens(self, merge_size: int) -> int:
        t, h, w = self.grid
        return t * h * w // merge_size**2


@dataclass(frozen=True)
class VisualInputs:
    """The pictures and videos of one request, in order.

    Args:
        patches: by visual, see `Patchify`.
        num_tokens: by visual: tokens it takes in the prompt.
        frames: by visual: what it was made of, for telling it from others.
        image_sizes: by visual: (width, height) before it was resized.
    """

    visuals: tuple[Visual, ...]
    patches: tuple[Any, ...]
    num_tokens: tuple[int, ...]
    frames: tuple[tuple[Image.Image, ...], ...]
    image_sizes: tuple[tuple[int, int], ...]

    @property
    def grid_thw(self) -> tuple[GridTHW, ...]:
        return tuple(visual.grid for visual in self.visuals)


def video_size(
    frames: int, height: int, width: int, config: ImageProcessorConfig
) -> tuple[int, int]:
    """Height and width that each of the `frames` of a video is resized to.

    The rules are those of qwen_vl_utils, which transformers' video processors follow with
    `cap_pixels_per_frame`: Qwen2-VL and Qwen2.5-VL bound each frame, Qwen3-VL the whole video.
    """
    bounds, factor = config.video, config.factor
    if bounds.whole_video:
        share = min(bounds.max_tokens * factor**2, bounds.max_pixels // frames)
        most = _frame_cap(share, bounds) * frames
        return _resize_volume(frames, height, width, config, min(bounds.min_pixels, most), most)
    budget = int(bounds.max_tokens * factor**2 * 0.9)
    most = _frame_cap(min(bounds.max_pixels, budget * config.temporal_patch_size // frames), bounds)
    least = min(bounds.min_pixels, most)
    return smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)


def _frame_cap(share: int, bounds: VideoRules) -> int:
    own = max(share, int(bounds.min_pixels * 1.05))
    return own if bounds.frame_pixels is None else min(own, bounds.frame_pixels)


def _resize_volume(
    frames: int, height: int, width: int, config: ImageProcessorConfig, least: int, most: int
) -> tuple[int, int]:
    """`smart_resize` with bounds on frames x height x width (transformers' Qwen3VLVideoProcessor);
    a frame smaller than a token is enlarged to one first."""
    factor, times = config.factor, config.temporal_patch_size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    volume = round(frames / times) * times * rows * columns
    if volume > most:
        shrink = math.sqrt((frames * height * width) / most)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < least:
        grow = math.sqrt(least / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def _frames(part: ImagePart | VideoPart) -> tuple[Image.Image, ...]:
    return part.frames if isinstance(part, VideoPart) else (part.image,)


def preprocess(
    parts: Sequence[ImagePart | VideoPart],
    config: ImageProcessorConfig,
    patchify: Patchify | None = None,
) -> VisualInputs:
    """Resize (bicubic), rescale, normalise and cut into patches.

    Args:
        patchify: who does that; None = `patchify_on_host`.

    Raises:
        InputError: a picture no model takes (`check_visual`).
    """
    for part in parts:
        check_visual(part)
    cut = patchify or patchify_on_host
    frames = tuple(_whole_steps(_frames(part), part, config) for part in parts)
    sizes = [_size(part, len(shown), config) for part, shown in zip(parts, frames, strict=True)]
    visuals = tuple(
        _visual(part, len(shown), size, config)
        for part, shown, size in zip(parts, frames, sizes, strict=True)
    )
    return VisualInputs(
        visuals=visuals,
        patches=tuple(cut(shown, size, config) for shown, size in zip(frames, sizes, strict=True)),
        num_tokens=tuple(visual.num_tokens(config.merge_size) for visual in visuals),
        frames=frames,
        image_sizes=tuple(map(shown_size, parts)),
    )


def _whole_steps(
    frames: tuple[Image.Image, ...], part: ImagePart | VideoPart, config: ImageProcessorConfig
) -> tuple[Image.Image, ...]:
    """A video's last frame is repeated until the frames fill whole steps of the time axis."""
    missing = -len(frames) % config.temporal_patch_size if isinstance(part, VideoPart) else 0
    return frames + frames[-1:] * missing


def _size(
    part: ImagePart | VideoPart, frames: int, config: ImageProcessorConfig
) -> tuple[int, int]:
    width, height = shown_size(part)
    if isinstance(part, VideoPart):
        # The reference counts the frames before it repeats the last one, but needs a whole step.
        count = max(len(part.frames), config.temporal_patch_size)
        return video_size(count, height, width, config)
    bounds = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    return smart_resize(height, width, factor=config.factor, **bounds)


def _visual(
    part: ImagePart | VideoPart, frames: int, size: tuple[int, int], config: ImageProcessorConfig
) -> Visual:
    rows, columns = size[0] // config.patch_size, size[1] // config.patch_size
    if isinstance(part, ImagePart):
        return Visual((1, rows, columns))
    times = config.temporal_patch_size
    seen = part.times_s + part.times_s[-1:] * (frames - len(part.times_s))
    return Visual(
        (frames // times, rows, columns),
        video=True,
        seconds_per_grid=times * part.duration_s / len(part.frames),
        times_s=tuple((seen[i] + seen[i + times - 1]) / 2 for i in range(0, frames, times)),
    )


def scale_and_shift(config: ImageProcessorConfig) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(x * rescale - mean) / std as one multiplication and one subtraction: float32 [C, 1]."""
    std = np.array(config.image_std)[:, None]
    scale = (config.rescale_factor / std).astype(np.float32)
    return scale, (np.array(config.image_mean)[:, None] / std).astype(np.float32)


def patchify_on_host(
    frames: Sequence[Image.Image], size: tuple[int, int], config: ImageProcessorConfig
) -> npt.NDArray[np.float32]:
    """`Patchify` with Pillow and numpy: the reference of others. A single frame fills a step."""
    merge, patch, times = config.merge_size, config.patch_size, config.temporal_patch_size
    height, width = size
    rows, columns = height // config.factor, width // config.factor
    count = rows * columns * merge**2
    steps = max(1, len(frames) // times)
    # [steps, patches, C, T, P * P]: filled step by step, so nothing is concatenated.
    out = np.empty((steps, count, 3, times, patch * patch), dtype=np.float32)
    scale, shift = scale_and_shift(config)
    for step, shown in enumerate(by_step(frames, times)):
        made = [pixels_of(_resized(frame, size))[..., :3] for frame in shown]
        pixels = made[0][None] if len(made) == 1 else np.stack(made)
        # The costly reordering is done on bytes, an eighth of the size of the result.
        blocks = pixels.reshape(len(shown), rows, merge, patch, columns, merge, patch, 3)
        patches = np.ascontiguousarray(blocks.transpose(1, 4, 2, 5, 7, 0, 3, 6))
        patches = patches.reshape(count, 3, len(shown), patch * patch)
        # A slice at a time stays in the processor's cache until it is stored.
        for first in range(0, count, _SLICE):
            values = np.multiply(patches[first : first + _SLICE], scale[:, :, None])
            values -= shift[:, :, None]
            out[step, first : first + len(values)] = values
    return out.reshape(steps * count, -1)


class _ArrowArray(ctypes.Structure):
    """The head of a C structure, see Arrow's C data interface."""

    _fields_ = (
        ("length", ctypes.c_int64),
        ("null_count", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("n_buffers", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("children", ctypes.POINTER(ctypes.c_void_p)),
    )


class _PillowMemory:
    """The pixels of an RGB picture where Pillow holds them, for numpy.

    Raises:
        ValueError: Pillow holds them in several pieces, as those of large pictures.
    """

    def __init__(self, image: Image.Image) -> None:
        # While the capsule lives, Pillow keeps the memory.
        _, self._capsule = image.__arrow_c_array__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        array = _ArrowArray.from_address(pointer(self._capsule, b"arrow_array"))
        bytes_of = _ArrowArray.from_address(array.children[0])
        self.__array_interface__ = {
            "shape": (image.height, image.width, 4),
            "typestr": "|u1",
            "data": (bytes_of.buffers[1], False),
            "version": 3,
        }


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """An RGB picture as [height, width, 3 or 4], not to be written to; a fourth byte is nothing.

    Without a copy where Pillow can: its copies hold the interpreter's lock, for which the thread
    that runs the model would wait.
    """
    if image.mode == "RGB" and hasattr(image, "__arrow_c_array__"):
        try:
            return np.asarray(_PillowMemory(image))
        except ValueError:
            pass
    return np.array(image)


def by_step(frames: Sequence[Image.Image], times: int) -> Iterator[Sequence[Image.Image]]:
    """The frames of each step of the time axis; the last may have fewer."""
    for first in range(0, len(frames), times):
        yield frames[first : first + times]


def _resized(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if frame.size == (width, height):
        return frame
    return frame.resize((width, height), Image.Resampling.BICUBIC)
