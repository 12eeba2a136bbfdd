"""From a picture file of any kind to an RGB `ImagePart`, or to one clear `InputError`.

Pictures are decoded completely here, so that a damaged file is found before a model sees half
of it. Of an animation the first frame is taken (`videos` takes more). Colour profiles are not
applied: neither does the reference. One damage stays invisible: a JPEG whose data ends early but
which carries an end marker again (libjpeg fills the rest and Pillow does not pass its warning on).
This module does not know what size a model wants; `preprocess` does.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image

from qwencli.engine.frontend.image_decoding import BOMBS, DECODE_ERRORS, read_picture, too_large
from qwencli.errors import InputError
from qwencli.messages import ImagePart

# What decoding one picture, and making it upright RGB, may take. With what a program that has
# loaded a small model holds it stays below 2 GB.
MAX_DECODE_BYTES = 1_600_000_000
# Sides of what a JPEG is decoded to, over those of what is made of it, at least: how far what its
# blocks are scaled by differs from what resizing does.
DECODED_LARGER = 3.0
# What libjpeg decodes blocks of 8 by 8 to: 1, 2 or 4 by as many.
_JPEG_SCALES, _MIN_DECODED = (8, 4, 2), 64
# Bytes a pixel takes at the most while it is decoded and made RGB (measured with Pillow 13): four
# in the decoded picture, four in the result, and what a decoder holds beside them.
_BYTES_A_PIXEL = {
    "WEBP": 24, "AVIF": 16, "JPEG2000": 32, "HEIF": 20, "JXL": 20, "ICO": 12, "PSD": 12,
}  # fmt: skip
_BYTES_A_PIXEL_ELSE, _BYTES_A_PIXEL_PROGRESSIVE = 8, 12
# A picture's rows are found through a pointer each, in the decoded picture and in the result.
_BYTES_A_ROW = 16
# Rows that are converted at a time hold about so many pixels.
_BAND_PIXELS = 2**22

# EXIF orientation -> the turn that undoes it.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Turns after which the first row is the last row or column; and turns that make rows columns.
_LAST_FIRST = frozenset(
    {
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
    }
)
_SIDEWAYS = frozenset(
    {
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    }
)

# Formats of one file with many pictures in which they are moments of one scene; and those in which
# they are pages. Elsewhere they are layers, sizes, or a photograph and what the camera made of it.
ANIMATED = frozenset({"AVIF", "FLI", "GIF", "JXL", "PNG", "WEBP"})
_PAGED = frozenset({"DCX", "TIFF"})
# Of a TIFF's picture: bit 0 is set in a smaller copy of another page.
_SUBFILE_TYPE = 254
_MOST_COPIES = 32


def open_image(source: Path | bytes, name: str | None = None, held_bytes: int = 0) -> ImagePart:
    """Decode one picture.

    The result is upright (EXIF orientation applied), mode RGB, 8 bits a channel: transparency is
    flattened on white, 16-bit grey is scaled (65535 -> 255), CMYK and palettes are converted.

    Args:
        source: a file, or the bytes of one.
        name: what errors call it; the path by default.
        held_bytes: see `to_rgb`.

    Raises:
        InputError: not there, not readable, not a picture, damaged, over `MAX_PIXELS` or over
            `MAX_DECODE_BYTES`.
        OutOfMemoryError: the host cannot hold the decoded picture.
    """
    return read_picture(source, functools.partial(image_part, held_bytes), name)


def image_part(
    held_bytes: int, image: Image.Image, name: str, max_pixels: int | None = None
) -> ImagePart:
    """An opened picture as `open_image` describes it.

    Args:
        max_pixels: what it will be made smaller to. A JPEG far above that may be decoded at a half,
            a quarter or an eighth of its size, which takes half the time. The picture that a model
            sees then differs by 1 of 255 on average, and by 24 at sharp edges, at most
            (`tests/engine/frontend/test_smaller_decoding.py`).
    """
    check_decoded_size(image, name, held_bytes)
    whole = image.size
    is_smaller = max_pixels is not None and _decode_smaller(image, max_pixels)
    shown = to_rgb(image, name, held_bytes)
    if not is_smaller:
        return ImagePart(shown, name, _first_of(image))
    size = whole[::-1] if _turn(image) in _SIDEWAYS else whole
    return ImagePart(shown, name, None, size)


def _decode_smaller(image: Image.Image, max_pixels: int) -> bool:
    """Have a JPEG decoded smaller, but far larger than `max_pixels`; whether it will be."""
    width, height = image.size
    times = math.sqrt(width * height / max_pixels) / DECODED_LARGER
    scale = next((each for each in _JPEG_SCALES if each <= times), None)
    if image.format != "JPEG" or scale is None or min(width, height) < _MIN_DECODED * scale:
        return False
    image.draft(None, (width // scale, height // scale))
    return image.size != (width, height)


def _first_of(image: Image.Image) -> Literal["frames", "pages"] | None:
    """What the file of a decoded picture holds more of; damage behind the picture says nothing."""
    try:
        if not getattr(image, "is_animated", False):
            return None
        if image.format in ANIMATED:
            return "frames"
        if image.format in _PAGED and any(_is_page(image, n) for n in range(1, _MOST_COPIES)):
            return "pages"
    except (*DECODE_ERRORS, *BOMBS, InputError):
        pass
    return None


def _is_page(image: Image.Image, number: int) -> bool:
    """Raises EOFError where there is no such page."""
    image.seek(number)
    tags = getattr(image, "tag_v2", {})
    return not tags.get(_SUBFILE_TYPE, 0) & 1


def to_rgb(image: Image.Image, name: str, held_bytes: int = 0) -> Image.Image:
    """The picture, or the frame it stands at, as `open_image` describes it; always a new one.

    Args:
        held_bytes: what decoded pictures take that are kept beside this one.

    Raises:
        InputError: it would take too much memory, or its pixels are no 8 or 16 bit colours.
    """
    check_decoded_size(image, name, held_bytes)
    image.load()
    # An icon may hold a picture larger than it says.
    check_decoded_size(image, name, held_bytes)
    return _to_rgb(image, _turn(image), name)


def check_decoded_size(image: Image.Image, name: str, held_bytes: int = 0) -> None:
    """Raise InputError where decoding `image` takes more than `MAX_DECODE_BYTES` leaves."""
    each: float = _BYTES_A_PIXEL.get(image.format or "", _BYTES_A_PIXEL_ELSE)
    if image.info.get("progressive"):
        each = _BYTES_A_PIXEL_PROGRESSIVE
    each += _BYTES_A_ROW / max(image.width, 1)
    pixels = image.width * image.height
    if pixels * each > MAX_DECODE_BYTES:
        kind = f" for {image.format} of this shape"
        raise too_large(name, pixels, int(MAX_DECODE_BYTES / each), kind)
    if pixels * each + held_bytes > MAX_DECODE_BYTES:
        raise InputError(
            f"{name} has {pixels / 1e6:.0f} megapixels, more than the memory for the pictures of "
            f"one request has left ({MAX_DECODE_BYTES / 1e9:.1f} GB in all)",
            "give fewer pictures or frames at a time, or scale them down",
        )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright by its EXIF orientation; a damaged block says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DECODE_ERRORS:
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _to_rgb(image: Image.Image, turn: Image.Transpose | None, name: str) -> Image.Image:
    """A new RGB picture, made some rows at a time: no other copy of the whole is held."""
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:
        rgb = _rgb(image, name)
        return rgb if turn is None else rgb.transpose(turn)
    upright = Image.new("RGB", (height, width) if turn in _SIDEWAYS else (width, height))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first = height - bottom if turn in _LAST_FIRST else top
        # Under no name: the next rows are made without these.
        upright.paste(
            _rows_to_rgb(image, top, bottom, turn, name),
            (first, 0) if turn in _SIDEWAYS else (0, first),
        )
    return upright


def _rows_to_rgb(
    image: Image.Image, top: int, bottom: int, turn: Image.Transpose | None, name: str
) -> Image.Image:
    rgb = _rgb(image.crop((0, top, image.width, bottom)), name)
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels", "convert it to 8 bits a channel")
    if image.mode.startswith("I"):
        image = _grey_16_to_8(image, name)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey_16_to_8(image: Image.Image, name: str) -> Image.Image:
    """Scale 0..65535 to 0..255, rounded. Pillow's own conversion would clip at 255."""
    import numpy as np  # takes longer to load than most pictures

    levels = np.asarray(image)  # [H, W], uint16 or int32
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > 65535:
        raise InputError(
            f"{name} has pixel values from {low} to {high}", "convert it to 8 or 16 bits a channel"
        )
    return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
