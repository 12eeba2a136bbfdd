"""From a picture file of any kind to an RGB `ImagePart`, or to one clear `InputError`.

Pictures are decoded completely here, so that a damaged file is found before a model sees half
of it. Of an animation the first frame is taken (`videos` takes more). Colour profiles are not
applied: neither does the reference. One damage stays invisible: a JPEG whose data ends early but
which carries an end marker again (libjpeg fills the rest and Pillow does not pass its warning on).
This module does not know what size a model wants; `preprocess` does.
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
import math
import os
import re
import select
import stat
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from PIL import (
    ExifTags,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
)

from qwencli.config import MAX_PIXELS
from qwencli.engine.frontend.containers import video_kind
from qwencli.errors import InputError, OutOfMemoryError
from qwencli.messages import ImagePart
from qwencli.tracing import span

# Pillow's remarks on a file would reach stderr where nobody listens to its log.
_STDERR_TURN = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())

# What Pillow's decoders are known to raise on malformed files (its plug-ins parse with struct,
# zlib and plain indexing). Anything else is a bug of ours and must stay visible.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# What is opened but not decoded. Pillow runs another program or the system's renderer for the
# drawings; a caption needs neither. The pictures in an ICNS state no size before they are decoded.
_NOT_PICTURES = {"EPS": "a drawing", "WMF": "a drawing", "ICNS": "a set of icons"}

# What decoding one picture, and making it upright RGB, may take. With what a program that has
# loaded a small model holds it stays below 2 GB.
# Sides of what a JPEG is decoded to, over those of what is made of it, at least: how far what its
# blocks are scaled by differs from what resizing does.
DECODED_LARGER = 3.0
# What libjpeg decodes blocks of 8 by 8 to: 1, 2 or 4 by as many.
_JPEG_SCALES, _MIN_DECODED = (8, 4, 2), 64
MAX_DECODE_BYTES = 1_600_000_000
# Bytes a pixel takes at the most while it is decoded and made RGB (measured with Pillow 13): four
# in the decoded picture, four in the result, and what a decoder holds beside them.
_BYTES_A_PIXEL = {
    "WEBP": 24, "AVIF": 16, "JPEG2000": 32, "HEIF": 20, "JXL": 20, "ICO": 12, "PSD": 12,
}  # fmt: skip
_BYTES_A_PIXEL_ELSE, _BYTES_A_PIXEL_PROGRESSIVE = 8, 12
# First bytes -> the largest file. Some decoders hold a whole file twice; in others one piece of
# text may be as long as the file. Elsewhere pixels stand as they are and take much room.
_MAX_FILE_BYTES = (
    (re.compile(rb"RIFF....WEBP|....ftyp(avi|he|mi|ms)", re.DOTALL), 2**28),
    (re.compile(rb"\x89PNG|\xff\xd8|GIF8|8BPS|\xff\x0a|\xff\x4f\xff\x51|\0\0\0\x0c"), 2**29),
    (re.compile(rb""), 2**31),
)
# A pipe's picture is held whole. It must have begun after so many seconds, and come this fast.
_MAX_PIPE_BYTES = 2**28
_PIPE_WAIT_S, _PIPE_BYTES_PER_S = 8.0, 100_000.0
# What decoding one file may take of this thread's time: pictures of no content that stand in a
# million pieces, or are drawn over three hundred times, would go on for minutes.
_DECODE_S, _DECODE_S_PER_PIXEL = 5.0, 5e-8
# A JPEG's decoder gets its data in pieces, between which the time is looked at: of a large picture
# few bytes may draw it anew. Each piece waits for the interpreter's lock.
_JPEG_PIECE_BYTES, _JPEG_LARGEST_PIECE = 2**10, 2**16
_JPEG_PIECE_PIXELS = 2**34  # pixels of the picture times bytes of the piece
# A picture's rows are found through a pointer each, in the decoded picture and in the result.
_BYTES_A_ROW = 16
# Text and colour profiles of a PNG, decompressed; screenshots and Photoshop's carry megabytes.
_MAX_PNG_TEXT_BYTES = 2**26
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

# First bytes -> what such a file is called; asked only after Pillow could not tell.
_SIGNATURES = (
    (re.compile(rb"\x89PNG"), "a PNG with a damaged header"),
    (re.compile(rb"\xff\xd8\xff"), "a JPEG with a damaged header"),
    (re.compile(rb"GIF8"), "a GIF with a damaged header"),
    (re.compile(rb"BM"), "a BMP with a damaged header"),
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF with a damaged header"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "a WebP with a damaged header"),
    (re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "JPEG XL"),
    (re.compile(rb"%PDF"), "a PDF document"),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!"), "an archive"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer instead of the file itself"),
    (re.compile(rb"\s*<(\?xml|svg)", re.IGNORECASE), "XML or SVG text"),
    (re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE), "an HTML page"),
)
# Formats of one file with many pictures in which they are moments of one scene; and those in which
# they are pages. Elsewhere they are layers, sizes, or a photograph and what the camera made of it.
ANIMATED = frozenset({"AVIF", "FLI", "GIF", "JXL", "PNG", "WEBP"})
_PAGED = frozenset({"DCX", "TIFF"})
# Of a TIFF's picture: bit 0 is set in a smaller copy of another page.
_SUBFILE_TYPE = 254
_MOST_COPIES = 32
# Formats that a separately installed plug-in teaches to Pillow: Pillow's name for the format, the
# plug-in's module, its registering call (None: importing it is enough), the package to install.
_PLUGINS = {
    "HEIC": ("HEIF", "pillow_heif", "register_heif_opener", "pillow-heif"),
    "AVIF": ("AVIF", "pillow_avif", None, "pillow-avif-plugin"),
    "JPEG XL": ("JXL", "pillow_jxl", None, "pillow-jxl-plugin"),
}
# Names of what a folder of frames is made of. Pillow lists more: films, documents and drawings, of
# which it knows the first bytes only.
PICTURE_SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".bmp", ".dds", ".dib", ".gif", ".heic", ".heics", ".heif", ".hif",
    ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".jxl",
    ".pam", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".sgi", ".tga",
    ".tif", ".tiff", ".webp",
})  # fmt: skip
_USE_PICTURE = "give a picture file such as PNG, JPEG or WebP"
_COPY_AGAIN = "copy or download the file again"


class _StrictPillow:
    """While at least one picture is being decoded: whole files only, our pixel limit, no warnings.

    Pillow's own limits (89 megapixels to warn, 179 to refuse; one megabyte of text in a PNG) turn
    away what a phone can take, and screenshots.
    Pillow keeps these rules in module globals and Python keeps its warning filters in one, so
    they are set when the first decoder thread enters and put back when the last one leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            undo = self._undo
            for module, rule, value in (
                (Image, "MAX_IMAGE_PIXELS", MAX_PIXELS),
                (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
                (PngImagePlugin, "MAX_TEXT_CHUNK", _MAX_PNG_TEXT_BYTES),
                (PngImagePlugin, "MAX_TEXT_MEMORY", _MAX_PNG_TEXT_BYTES),
            ):
                undo.callback(setattr, module, rule, getattr(module, rule))
                setattr(module, rule, value)
            undo.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo.close()


_strict_pillow = _StrictPillow()


T = TypeVar("T")


class _TimedFile:
    """An open file that Pillow reads, until that takes longer than any that is meant well."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._end_s = time.thread_time() + _DECODE_S

    def allow(self, pixels: int) -> None:
        """Allow the time that so many pixels more may take."""
        self._end_s += pixels * _DECODE_S_PER_PIXEL

    def read(self, size: int = -1) -> bytes:
        if time.thread_time() > self._end_s:
            raise InputError(
                f"{self._name} takes far longer to decode than others of its size: it stands in "
                "too many pieces or frames",
                "save it anew with another program, or leave it out",
            )
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def allow_time(image: Image.Image, pixels: int) -> None:
    """Let an opened picture take the time of so many pixels more; frames have them, for one."""
    file = getattr(image, "fp", None)
    if isinstance(file, _TimedFile):
        file.allow(pixels)


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


def read_picture(
    source: Path | bytes, read: Callable[[Image.Image, str], T], name: str | None = None
) -> T:
    """What `read` makes of the opened, not yet decoded picture and its name.

    Raises:
        InputError, OutOfMemoryError: see `open_image`; also for what Pillow raises in `read`.
    """
    if isinstance(source, bytes):
        return decode(io.BytesIO(source), name or "the image data", read)
    name = name or str(source)
    with open_file(source, name) as file:
        return decode(file, name, read)


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
    except (*DECODE_ERRORS, *_BOMBS, InputError):
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
        raise _too_large(name, pixels, int(MAX_DECODE_BYTES / each), kind)
    if pixels * each + held_bytes > MAX_DECODE_BYTES:
        raise InputError(
            f"{name} has {pixels / 1e6:.0f} megapixels, more than the memory for the pictures of "
            f"one request has left ({MAX_DECODE_BYTES / 1e9:.1f} GB in all)",
            "give fewer pictures or frames at a time, or scale them down",
        )


def _too_large(name: str, pixels: int, most: int, kind: str = "") -> InputError:
    return InputError(
        f"{name} declares {pixels / 1e6:.0f} megapixels, the limit{kind} is {most / 1e6:.0f}",
        "scale the picture down, or leave it out if you do not know where it comes from",
    )


def open_file(path: Path, name: str) -> BinaryIO:
    """A file, or all that comes through a pipe, to be read from any place on.

    Raises:
        InputError: not there, not readable, neither a file nor a pipe, or a pipe without an end.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode):
            return io.BytesIO(_read_pipe(path, name))
        if stat.S_ISREG(mode):
            return path.open("rb")
    except (OSError, ValueError) as error:
        raise read_error(error, name) from error
    if stat.S_ISDIR(mode):
        raise InputError(
            f"{name} is a folder, not a picture", "name the picture files in it, as in photos/*.jpg"
        )
    raise InputError(f"{name} is a device, not a picture file", _USE_PICTURE)


def read_error(error: OSError | ValueError, name: str) -> InputError:
    """What the system says about a file that cannot be opened or read, for the user."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{name}: no such file", "check the path")
    if isinstance(error, PermissionError):
        return InputError(
            f"{name} cannot be read: permission denied", "change the file's permissions"
        )
    reason = getattr(error, "strerror", None) or error
    return InputError(
        f"{name} cannot be read: {reason}", "check the path and the disk or network it is on"
    )


def _read_pipe(path: Path, name: str) -> bytes:
    """All that comes through a pipe, which must not take for ever.

    A pipe that nobody writes to, or that gives a byte now and then, would never let go.
    """
    started_s = time.monotonic()
    data = bytearray()
    # Without this flag opening it would wait for a writer.
    pipe = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        while len(data) <= _MAX_PIPE_BYTES:
            until_s = started_s + _PIPE_WAIT_S + len(data) / _PIPE_BYTES_PER_S
            left_s = max(until_s - time.monotonic(), 0)
            if left_s == 0 or not select.select([pipe], [], [], left_s)[0]:
                raise InputError(
                    f"{name}: nothing more comes through this pipe, and it does not end",
                    "write the picture to a file first",
                )
            piece = os.read(pipe, 2**20)
            if not piece:
                return bytes(data)
            data += piece
    finally:
        os.close(pipe)
    raise InputError(
        f"{name}: more than {_MAX_PIPE_BYTES >> 20} MB come through this pipe",
        "write the picture to a file first",
    )


def decode(file: BinaryIO, name: str, read: Callable[[Image.Image, str], T]) -> T:
    """What `read` makes of the picture in an open file; see `read_picture`."""
    try:
        head = _checked_head(file, name)
    except OSError as error:
        raise read_error(error, name) from error
    kind = "picture"
    timed = _TimedFile(file, name)
    try:
        with _strict_pillow, _identify(timed, head, name) as image:
            timed.allow(image.width * image.height)
            if isinstance(image, JpegImagePlugin.JpegImageFile):
                piece = _JPEG_PIECE_PIXELS // max(image.width * image.height, 1)
                image.decodermaxblock = min(max(piece, _JPEG_PIECE_BYTES), _JPEG_LARGEST_PIECE)
            kind = image.format or kind
            if kind in _NOT_PICTURES:
                raise InputError(
                    f"{name} is {_NOT_PICTURES[kind]} ({kind}), not a picture", _USE_PICTURE
                )
            with _silent_libtiff(kind), span("decode picture", name=name):
                return read(image, name)
    except _BOMBS as error:
        found = re.search(r"\d+", str(error))
        assert found is not None, "Pillow says how many"
        raise _too_large(name, int(found[0]), MAX_PIXELS) from error
    except MemoryError as error:
        raise OutOfMemoryError(
            f"not enough memory to decode {name}", "scale the picture down or free some memory"
        ) from error
    except DECODE_ERRORS as error:
        # Pillow's own errors have no number; those of the system do.
        if isinstance(error, OSError) and error.errno is not None:
            raise read_error(error, name) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "MAX_TEXT" in reason:
            raise InputError(
                f"{name} carries more than {_MAX_PNG_TEXT_BYTES >> 20} MB of text or profile",
                "save the picture without its metadata",
            ) from error
        raise InputError(f"{name}: damaged {kind} file ({reason})", _COPY_AGAIN) from error


@contextmanager
def _silent_libtiff(kind: str) -> Iterator[None]:
    """While a TIFF is decoded: what libtiff writes to stderr itself is dropped.

    A line for each thing that it finds wrong; what matters Pillow raises too.
    """
    if kind != "TIFF":
        yield
        return
    # One at a time: a second thread would take the first one's nothing for stderr, and restore it.
    with _STDERR_TURN:
        try:
            stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        except OSError:  # no stderr, no lines
            yield
            return
        try:
            os.dup2(nothing, 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(nothing)


def _checked_head(file: BinaryIO, name: str) -> bytes:
    """The first bytes of a file that is not empty and not too long."""
    head = file.read(512)
    if not head:
        raise InputError(f"{name} is empty (0 bytes)", _COPY_AGAIN)
    size = file.seek(0, io.SEEK_END)
    most = next(most for magic, most in _MAX_FILE_BYTES if magic.match(head))
    if size > most:
        raise InputError(
            f"{name} is a file of {size / 2**20:.0f} MB, the limit for its kind is {most >> 20}",
            _USE_PICTURE,
        )
    return head


def _identify(file: _TimedFile, head: bytes, name: str) -> Image.Image:
    file.seek(0)
    try:
        return Image.open(cast("BinaryIO", file))
    except UnidentifiedImageError as error:
        found = next((what for magic, what in _SIGNATURES if magic.match(head)), None)
        found = found or ("a video" if video_kind(head) else None)
        if found not in _PLUGINS:
            raise InputError(
                f"{name} is not a picture: found {found or _text_or_data(head)}", _USE_PICTURE
            ) from error
        if not _learn(found, name):
            raise InputError(f"{name}: damaged {found} file", _COPY_AGAIN) from error
    return _identify(file, head, name)


def _learn(kind: str, name: str) -> bool:
    """Teach Pillow a format through its plug-in; False where Pillow knows it already."""
    format_name, module_name, register, package = _PLUGINS[kind]
    if format_name in Image.OPEN:
        return False
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{name} is {kind}, which this installation cannot decode",
            f"pip install {package}, or convert the picture to PNG or JPEG",
        ) from error
    if register:
        getattr(module, register)()
    return format_name in Image.OPEN


def _text_or_data(head: bytes) -> str:
    # A sample cut inside a character is still text, hence "ignore"; control bytes never are.
    text = head.decode("utf-8", errors="ignore")
    is_text = len(text.encode()) > len(head) - 4 and all(
        c.isprintable() or c.isspace() for c in text
    )
    return "text" if is_text else "data of an unknown kind"


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
        band = _rgb(image.crop((0, top, width, bottom)), name)
        if turn is not None:
            band = band.transpose(turn)
        first = height - bottom if turn in _LAST_FIRST else top
        upright.paste(band, (first, 0) if turn in _SIDEWAYS else (0, first))
    return upright


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels", "convert it to 8 bits a channel")
    if image.mode.startswith("I"):
        image = _grey_16_to_8(image, name)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
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
