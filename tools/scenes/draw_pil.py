"""Draws a scene with PIL, with or without antialiasing, as PNG or through a JPEG round trip."""

from __future__ import annotations

import io
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING

from tools.scenes.geometry import outline, ring_hole, rotate
from tools.scenes.scene import PrintedNumber, Scene, SceneObject

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLING = 4
# A digit's height is about 0.7 of the size that a font is asked for.
DIGIT_SHARE = 0.7


def draw(scene: Scene, *, antialias: bool, font: str = "") -> Image.Image:
    """The picture as RGB. `font` is a TrueType file; empty means the one inside PIL."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (scene.width, scene.height), scene.background_rgb)
    pen = ImageDraw.Draw(image)
    for item in scene.objects:
        if antialias:
            _paste_smooth(image, item)
        else:
            _draw_object(pen, item, 1.0, item.x, item.y, item.rgb, scene.background_rgb)
    if scene.number:
        pen.fontmode = "L" if antialias else "1"
        _draw_number(pen, scene.number, font)
    return image


def through_jpeg(image: Image.Image, quality: int, subsampling: int = 2) -> Image.Image:
    """What a viewer of the JPEG file sees. `subsampling` 0 is 4:4:4, 2 is 4:2:0."""
    from PIL import Image

    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling=subsampling)
    buffer.seek(0)
    with Image.open(buffer) as decoded:
        return decoded.convert("RGB")


def draw_at_random(rng: Random, scene: Scene, fonts: tuple[str, ...] = ("",)) -> Image.Image:
    """Any of this renderer's modes: antialiased or not, any font, half of them as JPEG."""
    image = draw(scene, antialias=rng.random() < 0.6, font=rng.choice(fonts))
    if rng.random() < 0.5:
        image = through_jpeg(image, rng.randint(70, 96), rng.choice((0, 2)))
    return image


def _draw_object(
    pen: ImageDraw.ImageDraw,
    item: SceneObject,
    scale: float,
    x: float,
    y: float,
    ink: int | tuple[int, int, int],
    hole: int | tuple[int, int, int],
) -> None:
    size = item.diameter * scale
    if item.shape in ("circle", "ring"):
        radius = size / 2
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        if item.shape == "ring":
            radius *= ring_hole(item.detail, item.diameter)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=hole)
        return
    corners = rotate(outline(item.shape, item.detail), item.rotation_deg)
    pen.polygon([(x + size * px, y + size * py) for px, py in corners], fill=ink)


def _paste_smooth(image: Image.Image, item: SceneObject) -> None:
    """Draws one object's mask at 4x, shrinks it, pastes its colour through it."""
    from PIL import Image, ImageDraw

    reach = item.reach + 2
    left, top = int(item.x - reach), int(item.y - reach)
    edge = int(2 * reach) + 2
    mask = Image.new("L", (edge * SUPERSAMPLING, edge * SUPERSAMPLING), 0)
    x, y = (item.x - left) * SUPERSAMPLING, (item.y - top) * SUPERSAMPLING
    _draw_object(ImageDraw.Draw(mask), item, SUPERSAMPLING, x - 0.5, y - 0.5, 255, 0)
    image.paste(item.rgb, (left, top), mask.reduce(SUPERSAMPLING))


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def _draw_number(pen: ImageDraw.ImageDraw, number: PrintedNumber, font: str) -> None:
    face = _font(font, round(number.height / DIGIT_SHARE))
    pen.text((number.x, number.y), str(number.value), fill=number.rgb, font=face, anchor="mm")
