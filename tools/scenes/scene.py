"""A scene (what is drawn where) and how one is sampled. Pure Python: no pixels, no text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from tools.scenes.words import BACKGROUNDS, COLORS, RGB, SHAPES

MIN_EDGE, MAX_EDGE = 96, 512
# Diameter as a share of the short edge. The gap between the classes keeps the words unambiguous.
SIZE_SHARES = {"small": (0.12, 0.18), "large": (0.26, 0.38)}
MIN_DIAMETER = 14.0
# A centre this near (share of the edge) to a line of the 3x3 grid would make its place arguable.
GRID_MARGIN = 0.04
# Two objects of one row closer than this in x (share of the width) have no clear order.
ORDER_GAP = 0.05
# Radius of the smallest circle around a shape of diameter 1, in any allowed rotation.
REACH = {
    "circle": 0.5,
    "ring": 0.5,
    "square": 0.64,
    "triangle": 0.69,
    "star": 0.53,
    "cross": 0.54,
}
MAX_ROTATION_DEG = 15.0
COMMON_CANVASES = (
    (256, 256),
    (512, 512),
    (512, 384),
    (400, 300),
    (320, 240),
    (384, 384),
    (200, 200),
)


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x`, `y` (centre of the bounding box) and `diameter` in pixels of the canvas.

    `detail` in [0, 1] moves the free proportion of a shape: ring thickness, star sharpness,
    arm width of a cross, height of a triangle.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    diameter: float
    rotation_deg: float
    rgb: RGB
    detail: float

    @property
    def reach(self) -> float:
        return REACH[self.shape] * self.diameter


@dataclass(frozen=True)
class PrintedNumber:
    """Up to three digits, centred on `x`, `y`; `height` is that of a digit, in pixels."""

    value: int
    x: float
    y: float
    height: float
    rgb: RGB

    @property
    def half_width(self) -> float:
        return 0.42 * self.height * len(str(self.value))


@dataclass(frozen=True)
class Scene:
    """Objects are in reading order: by row of the 3x3 grid, then by x."""

    width: int
    height: int
    background: str
    background_rgb: RGB
    objects: tuple[SceneObject, ...]
    number: PrintedNumber | None = None


def cell_of(scene: Scene, x: float, y: float) -> tuple[int, int]:
    """(row, column) of the 3x3 grid that holds a point."""
    return min(2, int(3 * y / scene.height)), min(2, int(3 * x / scene.width))


def sample_canvas(rng: Random) -> tuple[int, int]:
    """(width, height): one of the common sizes, or any with edges in [96, 512]."""
    if rng.random() < 0.2:
        return rng.choice(COMMON_CANVASES)
    low, high = math.log(MIN_EDGE), math.log(MAX_EDGE)
    width, height = (round(math.exp(rng.uniform(low, high))) for _ in range(2))
    return width, height


def sample_scene(
    rng: Random,
    canvas: tuple[int, int] | None = None,
    *,
    max_objects: int = 4,
    number_share: float = 0.35,
) -> Scene:
    """A random scene without overlaps. Where a canvas has no room, it holds fewer objects."""
    width, height = canvas or sample_canvas(rng)
    background = rng.choice(tuple(BACKGROUNDS))
    background_rgb = _jitter(rng, rng.choice(BACKGROUNDS[background]), 4)
    number = _sample_number(rng, width, height) if rng.random() < number_share else None
    placed: list[SceneObject] = []
    for _ in range(rng.randint(1, max_objects)):
        for attempt in range(30):
            candidate = _sample_object(rng, width, height, small=attempt >= 20)
            if candidate and _fits(candidate, placed, number, width, height):
                placed.append(candidate)
                break
    if not placed:
        return sample_scene(rng, canvas, max_objects=max_objects, number_share=0.0)
    placed.sort(key=lambda item: (int(3 * item.y / height), item.x))
    return Scene(width, height, background, background_rgb, tuple(placed), number)


def _sample_object(rng: Random, width: int, height: int, *, small: bool) -> SceneObject | None:
    short = min(width, height)
    shape = rng.choice(SHAPES)
    color = rng.choice(tuple(COLORS))
    size = "small" if small else rng.choice(("small", "large"))
    low, high = SIZE_SHARES[size]
    diameter = rng.uniform(max(low, MIN_DIAMETER / short), high) * short
    reach = REACH[shape] * diameter + 1.5
    x = _place(rng, width, reach)
    y = _place(rng, height, reach)
    if x is None or y is None:
        return None
    rotation = rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG) if rng.random() < 0.6 else 0.0
    rgb = _jitter(rng, rng.choice(COLORS[color]), 8)
    return SceneObject(shape, color, size, x, y, diameter, rotation, rgb, rng.random())


def _sample_number(rng: Random, width: int, height: int) -> PrintedNumber | None:
    short = min(width, height)
    digit_height = max(12.0, rng.uniform(0.10, 0.18) * short)
    value = rng.randrange(10 ** rng.randint(1, 3))
    half_width = 0.42 * digit_height * len(str(value))
    x = _place(rng, width, half_width + 2)
    y = _place(rng, height, digit_height / 2 + 2)
    if x is None or y is None:
        return None
    shade = rng.choice(((0, 0, 0), (0, 0, 0), (40, 40, 40), (30, 30, 70)))
    return PrintedNumber(value, x, y, digit_height, _jitter(rng, shade, 6))


def _place(rng: Random, edge: int, reach: float) -> float | None:
    """A coordinate inside a random third of an edge, clear of the thirds' borders."""
    third = rng.randrange(3)
    margin = GRID_MARGIN * edge
    low = max(reach, third * edge / 3 + margin)
    high = min(edge - reach, (third + 1) * edge / 3 - margin)
    return rng.uniform(low, high) if low < high else None


def _fits(
    item: SceneObject,
    placed: list[SceneObject],
    number: PrintedNumber | None,
    width: int,
    height: int,
) -> bool:
    gap = 0.03 * min(width, height) + 1
    if number:
        dx = max(0.0, abs(item.x - number.x) - number.half_width)
        dy = max(0.0, abs(item.y - number.y) - number.height / 2)
        if math.hypot(dx, dy) < item.reach + gap:
            return False
    row = int(3 * item.y / height)
    for other in placed:
        if math.hypot(item.x - other.x, item.y - other.y) < item.reach + other.reach + gap:
            return False
        if row == int(3 * other.y / height) and abs(item.x - other.x) < ORDER_GAP * width:
            return False
    return True


def _jitter(rng: Random, rgb: RGB, amount: int) -> RGB:
    """Half of all tones stay exact; the rest move by up to `amount` a channel."""
    if rng.random() < 0.5:
        return rgb
    red, green, blue = (min(255, max(0, c + rng.randint(-amount, amount))) for c in rgb)
    return red, green, blue
