"""Makes pictures as no camera writes them, in code: small files, for tests of what reads them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

from PIL import Image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file's bytes that Pillow writes for `image`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
