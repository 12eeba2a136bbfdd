"""Decoding a stranger's picture with Pillow: whole files only, within limits of time and size.

A file may be damaged, or made to take minutes and all memory. `decode` opens one under rules of our
own and makes each failure one clear `InputError`; what is made of the picture is its caller's.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from qwencli.config import MAX_PIXELS
from qwencli.engine.frontend.media_files import (
    COPY_AGAIN,
    USE_PICTURE,
    checked_head,
    described,
    open_file,
    read_error,
)
from qwencli.errors import InputError, OutOfMemoryError
from qwencli.tracing import span

T = TypeVar("T")

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
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# What is opened but not decoded. Pillow runs another program or the system's renderer for the
# drawings; a caption needs neither. The pictures in an ICNS state no size before they are decoded.
_NOT_PICTURES = {"EPS": "a drawing", "WMF": "a drawing", "ICNS": "a set of icons"}

# What decoding one file may take of this thread's time: pictures of no content that stand in a
# million pieces, or are drawn over three hundred times, would go on for minutes.
_DECODE_S, _DECODE_S_PER_PIXEL = 5.0, 5e-8
# A JPEG's decoder gets its data in pieces, between which the time is looked at: of a large picture
# few bytes may draw it anew. Each piece waits for the interpreter's lock.
_JPEG_PIECE_BYTES, _JPEG_LARGEST_PIECE = 2**10, 2**16
_JPEG_PIECE_PIXELS = 2**34  # pixels of the picture times bytes of the piece
# Text and colour profiles of a PNG, decompressed; screenshots and Photoshop's carry megabytes.
_MAX_PNG_TEXT_BYTES = 2**26
# Formats that a separately installed plug-in teaches to Pillow: Pillow's name for the format, the
# plug-in's module, its registering call (None: importing it is enough), the package to install.
_PLUGINS = {
    "HEIC": ("HEIF", "pillow_heif", "register_heif_opener", "pillow-heif"),
    "AVIF": ("AVIF", "pillow_avif", None, "pillow-avif-plugin"),
    "JPEG XL": ("JXL", "pillow_jxl", None, "pillow-jxl-plugin"),
}


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


def decode(file: BinaryIO, name: str, read: Callable[[Image.Image, str], T]) -> T:
    """What `read` makes of the picture in an open file; see `read_picture`."""
    try:
        head = checked_head(file, name)
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
                    f"{name} is {_NOT_PICTURES[kind]} ({kind}), not a picture", USE_PICTURE
                )
            with _silent_libtiff(kind), span("decode picture", name=name):
                return read(image, name)
    except BOMBS as error:
        found = re.search(r"\d+", str(error))
        assert found is not None, "Pillow says how many"
        raise too_large(name, int(found[0]), MAX_PIXELS) from error
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
        raise InputError(f"{name}: damaged {kind} file ({reason})", COPY_AGAIN) from error


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


def too_large(name: str, pixels: int, most: int, kind: str = "") -> InputError:
    """The error for a picture that would decode to more pixels than are allowed."""
    return InputError(
        f"{name} declares {pixels / 1e6:.0f} megapixels, the limit{kind} is {most / 1e6:.0f}",
        "scale the picture down, or leave it out if you do not know where it comes from",
    )


def _identify(file: _TimedFile, head: bytes, name: str) -> Image.Image:
    file.seek(0)
    try:
        return Image.open(cast("BinaryIO", file))
    except UnidentifiedImageError as error:
        found = described(head)
        if found not in _PLUGINS:
            raise InputError(f"{name} is not a picture: found {found}", USE_PICTURE) from error
        if not _learn(found, name):
            raise InputError(f"{name}: damaged {found} file", COPY_AGAIN) from error
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
