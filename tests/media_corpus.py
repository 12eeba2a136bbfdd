"""Makes pictures and films in code, also as no camera writes them, for tests of what reads them."""

from __future__ import annotations

import errno
import io
import struct
import tempfile
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file's bytes that Pillow writes for `image`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class _FailingDisk(io.RawIOBase):
    def __init__(self, data: bytes, left: int) -> None:
        self._file, self._left = io.BytesIO(data), left

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._left -= 1
        if self._left < 0:
            raise OSError(errno.EIO, "Input/output error")
        return self._file.readinto(buffer)


def failing_file(data: bytes, readings: int) -> BinaryIO:
    """A file on a disk that fails after so many readings of a few bytes each."""
    return io.BufferedReader(_FailingDisk(data, readings), 64)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, raw: bytes, *, bits: int = 8, colour: int = 0, extra: bytes = b""
) -> bytes:
    """A PNG with any header and, before filtering, any pixels; `extra` chunks stand before them."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), extra, png_chunk(b"IDAT", zlib.compress(raw))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


def gif(canvas: tuple[int, int], frames: Sequence[tuple[int, int]]) -> bytes:
    """An animation whose header states `canvas` and whose frames state sizes of their own.

    Pixels of frames larger than 100 x 100 are not there: whoever decodes one finds that out.
    """
    screen = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    timed = b"!\xf9\x04\x00\x0a\x00\x00\x00"
    shown = [
        timed + b"," + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x02" + _gif_pixels(*size)
        for size in frames
    ]
    return screen + b"".join(shown) + b";"


def _gif_pixels(width: int, height: int) -> bytes:
    """LZW codes of three bits in blocks: forget (4), two black pixels (0, 0), ..., end (5)."""
    groups = min(width * height, 10_000) // 2
    codes = [4, 0, 0] * groups + [5]
    bits = sum(code << 3 * index for index, code in enumerate(codes))
    data = bits.to_bytes(len(codes) * 3 // 8 + 1, "little")
    blocks = [data[start : start + 255] for start in range(0, len(data), 255)]
    return b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def psd(image: Image.Image) -> bytes:
    """A Photoshop file of the picture and two empty layers of its size."""
    width, height = image.size
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3) + bytes(8)
    channels = b"".join(struct.pack(">HI", number, 2) for number in range(3))
    record = (
        struct.pack(">4IH", 0, 0, height, width, 3) + channels + b"8BIMnorm\xff\0\0\0"
        + struct.pack(">I", 12) + bytes(8) + b"\3abc"
    )  # fmt: skip
    layers = struct.pack(">h", 2) + record * 2 + bytes(2 * 3 * 2)
    section = struct.pack(">I", len(layers)) + layers
    pixels = b"".join(band.tobytes() for band in image.split())
    return head + struct.pack(">I", len(section)) + section + bytes(2) + pixels


# What FFmpeg is asked to write, by a file's name: container, codec and settings.
FILMS: dict[str, tuple[str, str, dict[str, str]]] = {
    "film.mp4": ("mp4", "mpeg4", {}),
    "web.mp4": ("mp4", "mpeg4", {"movflags": "faststart"}),
    "parts.mp4": ("mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
    "film.mov": ("mov", "mpeg4", {}),
    "film.mkv": ("matroska", "mpeg4", {}),
    "live.mkv": ("matroska", "mpeg4", {"live": "1"}),
    "film.webm": ("webm", "libvpx", {}),
    "film.avi": ("avi", "mpeg4", {}),
    "film.flv": ("flv", "flv", {}),
    "film.ts": ("mpegts", "mpeg2video", {}),
    "film.mpg": ("mpeg", "mpeg2video", {}),
    "film.wmv": ("asf", "wmv2", {}),
    "film.ivf": ("ivf", "libvpx", {}),
}


def film(name: str, count: int = 12, rate: int = 25, size: tuple[int, int] = (48, 32)) -> bytes:
    """A film of noise, which compresses badly: no part of it is short. See `FILMS`."""
    import av

    container_kind, codec, options = FILMS[name]
    noise = np.random.default_rng(0)
    # A file, because FFmpeg reads again what it wrote of some.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        with av.open(str(path), "w", format=container_kind, options=options) as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.bit_rate = 400_000
            for index in range(count):
                pixels = noise.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
                shown = av.VideoFrame.from_ndarray(pixels)
                shown.pts, shown.time_base = index, Fraction(1, rate)
                container.mux(stream.encode(shown))
            container.mux(stream.encode())
        return path.read_bytes()
