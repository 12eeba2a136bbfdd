"""Sizes of pictures: which ones no model takes, and what Qwen's processor resizes the others to.

Knows no numpy: what sends pictures to a server needs no more than this.
"""

from __future__ import annotations

import math

from qwencli.errors import InputError
from qwencli.messages import ImagePart, VideoPart

# Qwen's processor refuses pictures longer than this many times their width, and the reverse.
MAX_ASPECT_RATIO = 200


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
