"""The closed vocabulary of drawn scenes: shapes, colours, backgrounds, places.

Knows nothing of pictures or models; every other module of this folder reads it.
RGB anchors are the tones a name stands for. The first anchor of each name is the one that CSS
and PIL give it, so that a picture drawn with `fill="orange"` is inside the training range.
"""

from __future__ import annotations

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")

COLORS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (214, 39, 40), (200, 25, 25), (230, 30, 50)),
    "orange": ((255, 165, 0), (255, 140, 0), (255, 127, 14), (240, 135, 30)),
    "yellow": ((255, 255, 0), (255, 225, 0), (250, 230, 40), (235, 220, 20)),
    "green": ((0, 128, 0), (44, 160, 44), (0, 170, 60), (0, 220, 0), (34, 110, 34)),
    "blue": ((0, 0, 255), (31, 90, 200), (20, 40, 160), (30, 119, 190)),
    "purple": ((128, 0, 128), (148, 70, 189), (140, 30, 170), (150, 40, 235)),
    "black": ((0, 0, 0), (20, 20, 20), (35, 35, 35)),
    "gray": ((128, 128, 128), (110, 110, 110), (150, 150, 150)),
}

BACKGROUNDS: dict[str, tuple[RGB, ...]] = {
    "white": ((255, 255, 255),),
    "light gray": ((211, 211, 211), (224, 224, 224), (200, 200, 200)),
    "light blue": ((173, 216, 230), (190, 215, 250), (204, 229, 255)),
    "light green": ((144, 238, 144), (190, 240, 190), (205, 245, 205)),
    "light yellow": ((255, 255, 224), (255, 250, 190), (255, 247, 205)),
    "pink": ((255, 192, 203), (255, 210, 220), (250, 200, 215)),
}

# Row, then column, of the 3x3 grid that the canvas is read in.
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the center", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)

COUNTS = ("no", "one", "two", "three", "four")

SHAPE_PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}


def with_article(phrase: str) -> str:
    """`red circle` -> `a red circle`, `orange star` -> `an orange star`."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
