"""From RGB pictures to the patches a Qwen vision tower takes. numpy and Pillow alone.

Every engine gets its pixels from here, so equal inputs need no test between engines; that they
equal the reference processor's is tested in tests/engine/test_preprocess.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwencli.config import MAX_PIXELS
from qwencli.engine.json_file import read_json_object
from qwencli.errors import InputError, ModelFileError, UsageError
from qwencli.messages import ImagePart

GridTHW = tuple[int, int, int]
Triple = tuple[float, float, float]

# Qwen's processor refuses pictures longer than this many times their width, and the reverse.
MAX_ASPECT_RATIO = 200

_SLICE = 128  # patches

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How one model wants its pictures.

    Args:
        patch_size: side of a patch in pixels. merge_size: patches a side that become one token.
        temporal_patch_size: frames a patch spans; a still picture is repeated that often.
        min_pixels, max_pixels: bounds on height x width after resizing.
        image_mean, image_std: by channel (RGB), after multiplying by `rescale_factor`.
    """

    patch_size: int
    min_pixels: int
    max_pixels: int
    image_mean: Triple
    image_std: Triple
    temporal_patch_size: int = 2
    merge_size: int = 2
    rescale_factor: float = 1 / 255

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @classmethod
    def for_family(cls, family: str) -> ImageProcessorConfig:
        """The values every published checkpoint of `family` (config.json's model_type) has."""
        return cls(**_FAMILIES[family])

    @classmethod
    def from_files(cls, folder: Path, family: str) -> ImageProcessorConfig:
        """Read `folder`'s preprocessor_config.json; what it leaves out is the family's own value.

        Both layouts of the hub are read: `min_pixels`/`max_pixels` and
        `size: {shortest_edge, longest_edge}`; and processor_config.json, where newer
        transformers put the same object.

        Raises:
            ModelFileError: a value that cannot be, or a step this module does not do.
        """
        path = folder / "preprocessor_config.json"
        values: dict[str, Any] = {}
        if path.is_file():
            values = read_json_object(path)
        elif (folder / "processor_config.json").is_file():
            path = folder / "processor_config.json"
            nested = read_json_object(path).get("image_processor")
            values = nested if isinstance(nested, dict) else {}
        return _parse(cls.for_family(family), values, path)

    def with_pixels(self, min_pixels: int | None, max_pixels: int | None) -> ImageProcessorConfig:
        """The same with the user's bounds; None keeps the model's own.

        Raises:
            UsageError: a bound that no picture can meet.
        """
        smallest = self.factor**2
        for flag, value in (("--min-pixels", min_pixels), ("--max-pixels", max_pixels)):
            if value is not None and not smallest <= value <= MAX_PIXELS:
                raise UsageError(
                    f"{flag} {value} is out of range",
                    f"give a value from {smallest} (one token of this model) to {MAX_PIXELS}",
                )
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if low > high:
            own = " (the model's own)"
            raise UsageError(
                f"--min-pixels {low}{own if min_pixels is None else ''} is more than "
                f"--max-pixels {high}{own if max_pixels is None else ''}",
                "give both, the smaller one as --min-pixels",
            )
        return replace(self, min_pixels=low, max_pixels=high)


_QWEN2_VL: Mapping[str, Any] = {
    "patch_size": 14,
    "min_pixels": 56 * 56,
    "max_pixels": 14 * 14 * 4 * 16384,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
_QWEN3_VL: Mapping[str, Any] = {
    "patch_size": 16,
    "min_pixels": 256 * 256,
    "max_pixels": 16 * 16 * 4 * 16384,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
}
VISION_FAMILIES = frozenset(_FAMILIES)

_BICUBIC = int(Image.Resampling.BICUBIC)
# Steps that are always done here: a file that asks for something else would be disobeyed.
_FIXED_STEPS: Mapping[str, object] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": _BICUBIC,
}


def _parse(
    default: ImageProcessorConfig, values: Mapping[str, Any], path: Path
) -> ImageProcessorConfig:
    values = {key: value for key, value in values.items() if value is not None}
    for key, wanted in _FIXED_STEPS.items():
        if values.get(key, wanted) != wanted:
            raise _bad_value(path, key, values[key], repr(wanted))
    size = values.get("size", {})
    if not isinstance(size, dict):
        raise _bad_value(path, "size", size, "an object")
    # The older name wins where a file has both, as it does in the reference.
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        values.setdefault(key, size.get(edge, size.get(key, getattr(default, key))))
    found: dict[str, Any] = {}
    for key, (is_valid, expected) in _CHECKS.items():
        if key in values:
            if not is_valid(values[key]):
                raise _bad_value(path, key, values[key], expected)
            found[key] = tuple(values[key]) if isinstance(values[key], list) else values[key]
    config = replace(default, **found)
    if config.min_pixels > config.max_pixels:
        raise _bad_value(path, "min_pixels", config.min_pixels, f"at most {config.max_pixels}")
    return config


def _bad_value(path: Path, key: str, value: object, expected: str) -> ModelFileError:
    return ModelFileError(
        f"{path}: {key} is {value!r}, expected {expected}", "download the model's files again"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_triple(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


_COUNT = (_is_count, "a whole number above 0")
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "patch_size": _COUNT,
    "temporal_patch_size": _COUNT,
    "merge_size": _COUNT,
    "min_pixels": _COUNT,
    "max_pixels": _COUNT,
    "image_mean": (_is_triple, "three numbers"),
    "image_std": (lambda std: _is_triple(std) and min(std) > 0, "three numbers above 0"),
    "rescale_factor": (_is_number, "a number"),
}


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width a picture is resized to.

    Both are multiples of `factor`, height x width is within the bounds where that is possible,
    the aspect ratio is kept as closely as multiples allow. The rule is Qwen's own
    (qwen_vl_utils.smart_resize, also transformers' Qwen2VLImageProcessor); a half rounds to even.
    """
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def check_image(part: ImagePart) -> None:
    """Refuse a picture no model takes; cheap, so call it before a model is loaded.

    Raises:
        InputError: longer than `MAX_ASPECT_RATIO` times its other side.
    """
    width, height = part.image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(
            f"{part.name} is {width}x{height}: one side is more than "
            f"{MAX_ASPECT_RATIO} times the other",
            "crop it, or cut it into pieces",
        )


@dataclass(frozen=True)
class ImageInputs:
    """The pictures of one request, one after the other.

    Args:
        pixel_values: float32 [num_patches, C * T * P * P]; patches go through each picture by
            blocks of merge_size x merge_size, each block becoming one token.
        grid_thw: by picture: frames, rows and columns of patches.
        num_tokens: by picture: tokens it takes in the prompt.
    """

    pixel_values: npt.NDArray[np.float32]
    grid_thw: tuple[GridTHW, ...]
    num_tokens: tuple[int, ...]


def preprocess_images(parts: Sequence[ImagePart], config: ImageProcessorConfig) -> ImageInputs:
    """Resize (bicubic), rescale, normalise and cut into patches.

    Raises:
        InputError: a picture no model takes (`check_image`).
    """
    merge, patch, times = config.merge_size, config.patch_size, config.temporal_patch_size
    sizes = []
    for part in parts:
        check_image(part)
        width, height = part.image.size
        bounds = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
        sizes.append(smart_resize(height, width, factor=config.factor, **bounds))
    grids = tuple((1, height // patch, width // patch) for height, width in sizes)
    counts = [rows * columns for _, rows, columns in grids]

    # [patches, C, T, P * P]: filled picture by picture, so nothing is concatenated.
    out = np.empty((sum(counts), 3, times, patch * patch), dtype=np.float32)
    # (x * rescale - mean) / std with one multiplication and one subtraction for each value.
    std = np.array(config.image_std)[:, None]
    scale = (config.rescale_factor / std).astype(np.float32)  # [C, 1]
    shift = (np.array(config.image_mean)[:, None] / std).astype(np.float32)
    start = 0
    for part, (height, width), count in zip(parts, sizes, counts, strict=True):
        image = part.image
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        # The costly reordering is done on bytes, an eighth of the size of the result.
        blocks = np.asarray(image).reshape(
            height // config.factor, merge, patch, width // config.factor, merge, patch, 3
        )
        patches = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5))
        patches = patches.reshape(count, 3, patch * patch)
        # A slice at a time stays in the processor's cache until it is stored `times` times.
        for first in range(0, count, _SLICE):
            values = np.multiply(patches[first : first + _SLICE], scale)
            values -= shift
            out[start + first : start + first + len(values)] = values[:, :, None]
        start += count
    return ImageInputs(
        pixel_values=out.reshape(len(out), -1),
        grid_thw=grids,
        num_tokens=tuple(count // merge**2 for count in counts),
    )
