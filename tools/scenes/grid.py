"""The size that the processor gives a picture (Qwen's `smart_resize`), as plain arithmetic."""

from __future__ import annotations

import math

PATCH, MERGE = 16, 2
FACTOR = PATCH * MERGE
MIN_PIXELS, MAX_PIXELS = 65536, 147456


def target_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) after the resize: multiples of 32, area within [MIN_PIXELS, MAX_PIXELS]."""
    rounded_w, rounded_h = (max(FACTOR, round(edge / FACTOR) * FACTOR) for edge in (width, height))
    if rounded_w * rounded_h > MAX_PIXELS:
        shrink = math.sqrt(width * height / MAX_PIXELS)
        return _floor(width / shrink), _floor(height / shrink)
    if rounded_w * rounded_h < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (width * height))
        return _ceil(width * grow), _ceil(height * grow)
    return rounded_w, rounded_h


def merged_grid(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of visual tokens of a picture of `target_size`."""
    return size[1] // FACTOR, size[0] // FACTOR


def _floor(edge: float) -> int:
    return max(FACTOR, math.floor(edge / FACTOR) * FACTOR)


def _ceil(edge: float) -> int:
    return math.ceil(edge / FACTOR) * FACTOR
