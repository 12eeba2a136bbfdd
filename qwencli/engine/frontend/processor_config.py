"""How a model wants its pictures and videos: preprocessor_config.json, families, users' bounds; and
what size Qwen's rule resizes them to.

Knows no numpy: what sends pictures to a server needs the sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from qwencli.config import MAX_PIXELS
from qwencli.errors import InputError, ModelFileError, UsageError
from qwencli.messages import ImagePart, VideoPart
from qwencli.models.config_values import read_json_object, shortened

# Of max_pixels in a model's files: no picture and no video has as many.
MOST_BOUND = 2**53
# Qwen's processor refuses pictures longer than this many times their width, and the reverse.
MAX_ASPECT_RATIO = 200
Triple = tuple[float, float, float]

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VideoRules:
    """How a model wants a video's frames.

    Args:
        min_pixels, max_pixels: of one frame, or of all frames together (`whole_video`).
        max_tokens: `whole_video`: tokens that one frame may take at most. Else: tokens of the
            context of which a whole video may take nine tenths.
        timestamps: whether the prompt says before each step of the time axis when it is seen.
        frame_pixels: the user's own bound on height x width of a frame.
    """

    min_pixels: int
    max_pixels: int
    whole_video: bool
    max_tokens: int
    timestamps: bool
    frame_pixels: int | None = None


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How one model wants its pictures.

    Args:
        patch_size: side of a patch in pixels. merge_size: patches a side that become one token.
        temporal_patch_size: frames a patch spans; a still picture is repeated that often.
        min_pixels, max_pixels: bounds on height x width after resizing.
        image_mean, image_std: by channel (RGB), after multiplying by `rescale_factor`.
        video: the same for videos.
    """

    patch_size: int
    min_pixels: int
    max_pixels: int
    image_mean: Triple
    image_std: Triple
    video: VideoRules
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
        transformers put the same object. Bounds for videos are in video_preprocessor_config.json.

        Raises:
            ModelFileError: a value that cannot be, or a step this module does not do.
        """
        config = cls.for_family(family)
        path, values = _values(folder, "preprocessor_config.json", "image_processor")
        config = _parse(config, values, path)
        path, values = _values(folder, "video_preprocessor_config.json", "video_processor")
        video: dict[str, Any] = _bounds(config.video, values, path)
        return replace(config, video=replace(config.video, **video))

    def with_pixels(self, min_pixels: int | None, max_pixels: int | None) -> ImageProcessorConfig:
        """The same with the user's bounds; None keeps the model's own. The upper one also holds
        for each frame of a video.

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
        video = replace(self.video, frame_pixels=max_pixels)
        return replace(self, min_pixels=low, max_pixels=high, video=video)


def _values(folder: Path, name: str, key: str) -> tuple[Path, dict[str, Any]]:
    """What `folder` says in the file `name`, or under `key` of processor_config.json."""
    path, joint = folder / name, folder / "processor_config.json"
    if path.is_file() or not joint.is_file():
        return path, read_json_object(path) if path.is_file() else {}
    nested = read_json_object(joint).get(key)
    return joint, nested if isinstance(nested, dict) else {}


_QWEN2_VL: Mapping[str, Any] = {
    "patch_size": 14,
    "min_pixels": 56 * 56,
    "max_pixels": 14 * 14 * 4 * 16384,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
    "video": VideoRules(
        min_pixels=128 * 28 * 28,
        max_pixels=768 * 28 * 28,
        whole_video=False,
        max_tokens=128_000,
        timestamps=False,
    ),
}
_QWEN3_VL: Mapping[str, Any] = {
    "patch_size": 16,
    "min_pixels": 256 * 256,
    "max_pixels": 16 * 16 * 4 * 16384,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "video": VideoRules(
        min_pixels=128 * 32 * 32,
        max_pixels=768 * 32 * 32,
        whole_video=True,
        max_tokens=768,
        timestamps=True,
    ),
}
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_5": _QWEN3_VL,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_5_moe": _QWEN3_VL,
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
    found: dict[str, Any] = _bounds(default, values, path)
    for key, (is_valid, expected) in _CHECKS.items():
        if key in values:
            if not is_valid(values[key]):
                raise _bad_value(path, key, values[key], expected)
            found[key] = tuple(values[key]) if isinstance(values[key], list) else values[key]
    return replace(default, **found)


def _bounds(
    default: ImageProcessorConfig | VideoRules, values: Mapping[str, Any], path: Path
) -> dict[str, int]:
    """`min_pixels` and `max_pixels` of one file, in either spelling."""
    size = values.get("size") or {}
    if not isinstance(size, dict):
        raise _bad_value(path, "size", size, "an object")
    found: dict[str, int] = {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        # The older name wins where a file has both, as it does in the reference.
        stated = (values.get(key), size.get(edge), size.get(key))
        value = next((v for v in stated if v is not None), getattr(default, key))
        # A small picture is enlarged up to the lower bound.
        most = _MOST_LOWER_BOUND if key == "min_pixels" else MOST_BOUND
        if not _is_count(value, most):
            raise _bad_value(path, key, value, f"a whole number from 1 to {most}")
        found[key] = value
    if found["min_pixels"] > found["max_pixels"]:
        raise _bad_value(path, "min_pixels", found["min_pixels"], f"at most {found['max_pixels']}")
    return found


def _bad_value(path: Path, key: str, value: object, expected: str) -> ModelFileError:
    return ModelFileError(
        f"{path}: {key} is {shortened(value)}, expected {expected}",
        "download the model's files again",
    )


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_count(value: object, most: int = MOST_BOUND) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_triple(value: object, low: float, high: float) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(_is_number(each, low, high) for each in value)
    )


# Of what every picture is enlarged to: models have up to a megapixel.
_MOST_LOWER_BOUND = 2**24
# Far beyond what any model has; beyond these nothing sensible is left to compute with.
_MOST_SIDE = 1024
_COUNT = (lambda value: _is_count(value, _MOST_SIDE), f"a whole number from 1 to {_MOST_SIDE}")
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "patch_size": _COUNT,
    "temporal_patch_size": _COUNT,
    "merge_size": _COUNT,
    "image_mean": (lambda mean: _is_triple(mean, -1e4, 1e4), "three numbers"),
    "image_std": (lambda std: _is_triple(std, 1e-4, 1e4), "three numbers above 0"),
    "rescale_factor": (lambda factor: _is_number(factor, 1e-6, 1e3), "a number above 0"),
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


def check_visual(part: ImagePart | VideoPart) -> None:
    """Refuse a picture no model takes; cheap, so call it before a model is loaded.

    Raises:
        InputError: longer than `MAX_ASPECT_RATIO` times its other side.
    """
    width, height = shown_size(part)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(
            f"{part.name} is {width}x{height}: one side is more than "
            f"{MAX_ASPECT_RATIO} times the other",
            "crop it, or cut it into pieces",
        )


def shown_size(part: ImagePart | VideoPart) -> tuple[int, int]:
    """(width, height) of what is in the file."""
    return part.size if isinstance(part, ImagePart) else part.frames[0].size
