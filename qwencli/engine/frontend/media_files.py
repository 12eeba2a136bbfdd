"""A media file before it is decoded: opening it, or a pipe, and what its first bytes say it is.

Knows no decoder. What cannot be read becomes an `InputError` that says why.
"""

from __future__ import annotations

import io
import os
import re
import select
import stat
import time
from pathlib import Path
from typing import BinaryIO

from qwencli.errors import InputError

# Names of what a folder of frames is made of. Pillow lists more: films, documents and drawings, of
# which it knows the first bytes only.
PICTURE_SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".bmp", ".dds", ".dib", ".gif", ".heic", ".heics", ".heif", ".hif",
    ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".jxl",
    ".pam", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".sgi", ".tga",
    ".tif", ".tiff", ".webp",
})  # fmt: skip
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
# The bytes that tell a transport stream may stand in a picture too.
_NO_PICTURE = rb"(?!GIF8|\xff\xd8|\x89PNG|BM|II|MM|RIFF)"
# First bytes -> FFmpeg's name of what reads such a file. It is told, and does not guess: among the
# others are playlists, which open further files.
_KINDS = (
    (re.compile(rb"....ftyp(?!heic|heix|heim|heis|hevc|hevx|mif1|msf1|avi[fs])", re.DOTALL), "mov"),
    (re.compile(rb"....(moov|mdat|wide|free|skip)", re.DOTALL), "mov"),
    (re.compile(rb"\x1aE\xdf\xa3"), "matroska"),
    (re.compile(rb"RIFF....AVI ", re.DOTALL), "avi"),
    (re.compile(rb"FLV\x01"), "flv"),
    (re.compile(rb"\0\0\x01\xba"), "mpeg"),
    (re.compile(rb"\0\0\x01\xb3"), "mpegvideo"),
    (re.compile(rb"OggS"), "ogg"),
    (re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), "asf"),
    (re.compile(rb"DKIF"), "ivf"),
    (re.compile(rb"\x06\x0e\x2b\x34"), "mxf"),
    # No signature but a byte that starts each packet; cameras put four bytes before each.
    (re.compile(_NO_PICTURE + rb"G(.{187}G){2}", re.DOTALL), "mpegts"),
    (re.compile(_NO_PICTURE + rb".{4}G(.{191}G){2}", re.DOTALL), "mpegts"),
)
USE_PICTURE = "give a picture file such as PNG, JPEG or WebP"
COPY_AGAIN = "copy or download the file again"


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
    raise InputError(f"{name} is a device, not a picture file", USE_PICTURE)


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


def checked_head(file: BinaryIO, name: str) -> bytes:
    """The first bytes of a file that is not empty and not too long."""
    head = file.read(512)
    if not head:
        raise InputError(f"{name} is empty (0 bytes)", COPY_AGAIN)
    size = file.seek(0, io.SEEK_END)
    most = next(most for magic, most in _MAX_FILE_BYTES if magic.match(head))
    if size > most:
        raise InputError(
            f"{name} is a file of {size / 2**20:.0f} MB, the limit for its kind is {most >> 20}",
            USE_PICTURE,
        )
    return head


def video_kind(head: bytes) -> str | None:
    """FFmpeg's name for a video file that begins with `head` (512 bytes); None for other files."""
    return next((kind for first, kind in _KINDS if first.match(head)), None)


def described(head: bytes) -> str:
    """What a file is whose first bytes these are: its format, or whether it is text or data."""
    found = next((what for magic, what in _SIGNATURES if magic.match(head)), None)
    return found or ("a video" if video_kind(head) else _text_or_data(head))


def _text_or_data(head: bytes) -> str:
    # A sample cut inside a character is still text, hence "ignore"; control bytes never are.
    text = head.decode("utf-8", errors="ignore")
    is_text = len(text.encode()) > len(head) - 4 and all(
        c.isprintable() or c.isspace() for c in text
    )
    return "text" if is_text else "data of an unknown kind"
