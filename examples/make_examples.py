"""Draws the example pictures with plain PIL calls, the way a user would.

    python examples/make_examples.py

`expected.json` beside them holds the caption that the bundled model gives each.
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent


def star(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: str) -> None:
    points = []
    for corner in range(10):
        reach = radius if corner % 2 == 0 else radius * 0.42
        angle = math.pi * (corner / 5 - 0.5)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    pen.polygon(points, fill=fill)


def cross(pen: ImageDraw.ImageDraw, x: float, y: float, half: float, arm: float, fill: str) -> None:
    pen.rectangle((x - half, y - arm, x + half, y + arm), fill=fill)
    pen.rectangle((x - arm, y - half, x + arm, y + half), fill=fill)


def canvas(width: int, height: int, color: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), color)
    return image, ImageDraw.Draw(image)


def scene() -> Image.Image:
    image, pen = canvas(384, 288, "white")
    pen.ellipse((24, 98, 116, 190), fill="red")
    star(pen, 320, 144, 24, "blue")
    return image


def two_objects() -> Image.Image:
    image, pen = canvas(256, 256, "lightyellow")
    pen.polygon([(52, 12), (12, 92), (92, 92)], fill="green")
    cross(pen, 212, 210, 20, 6, "purple")
    return image


def four_objects() -> Image.Image:
    image, pen = canvas(400, 400, "lightblue")
    pen.rectangle((20, 20, 120, 120), fill="orange")
    pen.ellipse((310, 40, 370, 100), outline="black", width=8)
    star(pen, 200, 205, 66, "yellow")
    pen.ellipse((40, 310, 98, 368), fill="gray")
    return image


def number() -> Image.Image:
    image, pen = canvas(320, 240, "lightgreen")
    pen.polygon([(60, 70), (15, 155), (105, 155)], fill="blue")
    pen.text((265, 200), "42", fill="black", font=ImageFont.load_default(48), anchor="mm")
    return image


def wide() -> Image.Image:
    image, pen = canvas(512, 160, "pink")
    pen.ellipse((20, 54, 72, 106), outline="purple", width=7)
    pen.rectangle((244, 68, 268, 92), fill="black")
    cross(pen, 455, 80, 26, 8, "red")
    return image


PICTURES = {
    "scene.png": scene,
    "two_objects.png": two_objects,
    "four_objects.png": four_objects,
    "number.png": number,
    "wide.png": wide,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        draw().save(HERE / name)
