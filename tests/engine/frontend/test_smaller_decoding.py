"""JPEG files far above --max-pixels are decoded smaller; a model sees nearly the same."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.smaller_decoding import photograph
from qwencli.commands.options import RunOptions
from qwencli.config import EngineName
from qwencli.engine.frontend.images import DECODED_LARGER
from qwencli.engine.frontend.preprocess import preprocess
from qwencli.engine.frontend.processor_config import ImageProcessorConfig
from qwencli.engine.frontend.videos import open_visual

# Of 255: what `image_part` promises, of mean and of largest difference.
MEAN, LARGEST = 1.0, 24
WIDTH, HEIGHT = 1600, 1200
MAX_PIXELS = WIDTH * HEIGHT // 40


def drawn() -> Image.Image:
    """Hard edges of strong colours."""
    random = np.random.default_rng(3)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for number in range(120):
        x, y, width, height = (int(value) for value in random.integers(0, 900, 4))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        if number % 2:
            draw.line((x, y, x + width, y + height), fill=colour, width=1 + number % 12)
        else:
            draw.ellipse((x, y, x + width, y + height), fill=colour)
    return image


def like_a_photograph() -> Image.Image:
    return photograph(WIDTH, HEIGHT)


def noise() -> Image.Image:
    values = np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(values)


def file_of(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def seen(data: bytes, max_pixels: int | None, most: int = MAX_PIXELS) -> tuple[np.ndarray, object]:
    """What a model of `most` pixels is shown, in units of 1/255, and the inputs it is part of."""
    part = open_visual(data, name="picture", max_pixels=max_pixels)
    config = ImageProcessorConfig.for_family("qwen3_vl").with_pixels(1024, most)
    inputs = preprocess([part], config)
    return np.asarray(inputs.patches[0], np.float32) * 127.5, inputs


@pytest.mark.parametrize("settings", [{"quality": 90}, {"quality": 75, "progressive": True}])
@pytest.mark.parametrize("make", [drawn, like_a_photograph, noise])
def test_what_a_model_sees_differs_by_little(make, settings) -> None:
    data = file_of(make(), **settings)
    (whole, of_whole), (smaller, of_smaller) = seen(data, None), seen(data, MAX_PIXELS)
    assert of_whole.frames[0][0].size == (WIDTH, HEIGHT)
    assert of_smaller.frames[0][0].size == (WIDTH // 2, HEIGHT // 2)
    off = np.abs(whole - smaller)
    assert 0 < off.mean() < MEAN
    assert off.max() < LARGEST
    assert of_smaller.image_sizes == of_whole.image_sizes == ((WIDTH, HEIGHT),)
    assert of_smaller.visuals == of_whole.visuals


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(drawn(), exif=exif, quality=90)
    (whole, of_whole), (smaller, of_smaller) = seen(data, None), seen(data, MAX_PIXELS)
    assert of_smaller.frames[0][0].size[0] * 2 == of_whole.frames[0][0].size[0]
    assert of_smaller.image_sizes == of_whole.image_sizes
    assert np.abs(whole - smaller).mean() < MEAN


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_the_same_colours(mode: str) -> None:
    data = file_of(drawn().convert(mode), quality=90)
    (whole, _), (smaller, inputs) = seen(data, None), seen(data, MAX_PIXELS)
    assert inputs.frames[0][0].size == (WIDTH // 2, HEIGHT // 2)
    assert inputs.frames[0][0].mode == "RGB"
    assert np.abs(whole - smaller).mean() < MEAN


@pytest.mark.parametrize(("times", "scale"), [(1.9, 1), (2.1, 2), (3.9, 2), (4.1, 4), (9.0, 8)])
def test_it_stays_far_larger_than_what_is_made_of_it(times: float, scale: int) -> None:
    most = math.ceil(WIDTH * HEIGHT / (times * DECODED_LARGER) ** 2)
    part = open_visual(file_of(drawn()), name="picture", max_pixels=most)
    assert part.image.size == (WIDTH // scale, HEIGHT // scale)
    assert part.size == (WIDTH, HEIGHT)


def test_other_files_and_narrow_ones_are_decoded_whole() -> None:
    for data, size in (
        (file_of(drawn(), "PNG"), (WIDTH, HEIGHT)),
        (file_of(drawn().crop((0, 0, 1600, 100))), (1600, 100)),
    ):
        part = open_visual(data, name="picture", max_pixels=1000)
        assert part.image.size == part.size == size
        assert part.file_size is None


def test_a_picture_that_goes_elsewhere_goes_whole() -> None:
    assert RunOptions(max_pixels="1000").decoded_pixels(0.0) == 1000
    assert RunOptions(max_pixels="1000").decoded_pixels(60.0) is None
    assert RunOptions(max_pixels="auto").decoded_pixels(0.0) is None
    assert RunOptions().decoded_pixels(0.0) is None
    remote = RunOptions(
        max_pixels="1000", engine=EngineName.REMOTE, endpoint=["http://127.0.0.1:1"]
    )
    assert remote.decoded_pixels(0.0) is None
