"""The ten digits as line segments, for the renderer that uses no font.

Two styles: rounded strokes and seven segments. Coordinates: x in [0, 0.6], y in [0, 1], y down.
"""

from __future__ import annotations

import itertools
import math

from tools.scenes.geometry import Point

Segment = tuple[float, float, float, float]
DIGIT_WIDTH = 0.6
MAX_SEGMENTS = 20


def _arc(
    cx: float, cy: float, rx: float, ry: float, start: float, end: float, steps: int
) -> list[Point]:
    """Points on an ellipse; angles in degrees, 0 is right, 90 is down."""
    turns = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in turns]


_ROUNDED: tuple[tuple[list[Point], ...], ...] = (
    (_arc(0.3, 0.5, 0.26, 0.46, 0, 360, 16),),
    ([(0.12, 0.22), (0.34, 0.04), (0.34, 0.96)],),
    ([*_arc(0.3, 0.29, 0.24, 0.25, 190, 390, 9), (0.06, 0.96), (0.56, 0.96)],),
    (
        _arc(0.28, 0.27, 0.22, 0.23, 200, 440, 8),
        _arc(0.28, 0.72, 0.26, 0.24, -80, 160, 9),
    ),
    ([(0.42, 0.96), (0.42, 0.04), (0.03, 0.70), (0.57, 0.70)],),
    ([(0.52, 0.04), (0.12, 0.04), (0.08, 0.46), *_arc(0.29, 0.66, 0.26, 0.3, 225, 510, 10)],),
    (
        _arc(0.30, 0.67, 0.24, 0.29, 0, 360, 12),
        _arc(0.42, 0.62, 0.36, 0.58, 185, 265, 5),
    ),
    ([(0.05, 0.04), (0.55, 0.04), (0.22, 0.96)],),
    (_arc(0.3, 0.27, 0.21, 0.23, 0, 360, 10), _arc(0.3, 0.73, 0.25, 0.23, 0, 360, 10)),
    (
        _arc(0.30, 0.33, 0.24, 0.29, 0, 360, 12),
        _arc(0.18, 0.38, 0.36, 0.58, 5, 85, 5),
    ),
)

_BARS: dict[str, tuple[Point, Point]] = {
    "a": ((0.08, 0.05), (0.52, 0.05)),
    "b": ((0.52, 0.05), (0.52, 0.5)),
    "c": ((0.52, 0.5), (0.52, 0.95)),
    "d": ((0.08, 0.95), (0.52, 0.95)),
    "e": ((0.08, 0.5), (0.08, 0.95)),
    "f": ((0.08, 0.05), (0.08, 0.5)),
    "g": ((0.08, 0.5), (0.52, 0.5)),
}
_LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


def _segments(lines: tuple[list[Point], ...]) -> list[Segment]:
    return [(*a, *b) for line in lines for a, b in itertools.pairwise(line)]


# STROKES[style][digit]: segments (x0, y0, x1, y1)
STROKES: tuple[tuple[list[Segment], ...], ...] = (
    tuple(_segments(lines) for lines in _ROUNDED),
    tuple(_segments(tuple(list(_BARS[bar]) for bar in lit)) for lit in _LIT),
)
