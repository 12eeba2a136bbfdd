"""Whether a video file was cut off, from its bytes alone.

FFmpeg, and Pillow of a GIF, read what is there of a file that ends early as a shorter video. Each
kind states how long its parts are, so the last one tells. Two cuts stay invisible: one that falls
between two parts of a file that does not say how many there are (a live recording in Matroska, a
transport stream).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import BinaryIO

# The end of a file that is looked at where it is not read from its beginning on.
_TAIL_BYTES = 2**20
# After so many parts a file is believed to be whole: looking at more takes seconds.
_MOST_PARTS = 10**6
# Matroska's Segment and Cluster: their size may be unknown, and what counts is in them.
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
# ASF's file properties, which state how long the file is.
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def is_cut_off(file: BinaryIO, kind: str) -> bool:
    """Whether the last part of the file is shorter than it says."""
    size = file.seek(0, io.SEEK_END)
    check = _CHECKS.get(kind)
    return check is not None and check(file, size)


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(max(start, 0))
    return file.read(length)


def _boxes(file: BinaryIO, size: int) -> bool:
    """MP4 and QuickTime: boxes of a stated length, one after the other."""
    start = 0
    for _ in range(_MOST_PARTS):
        if start >= size:
            break
        head = _read(file, start, 16)
        if len(head) < 8:
            # Some writers end a file with a few zeros.
            return any(head)
        length = struct.unpack(">I", head[:4])[0]
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length < 8:
            return False  # 0: to the end of the file; less than its own head: for FFmpeg to judge
        start += length
    return start > size


def _riff(file: BinaryIO, size: int) -> bool:
    """AVI: one RIFF list, or several where it is long."""
    start = 0
    while start < size:
        head = _read(file, start, 8)
        if not head.startswith(b"RIFF") or len(head) < 8:
            return False
        length = struct.unpack("<I", head[4:])[0]
        if length == 0:
            return False
        start += 8 + length
    return start > size


def _elements(file: BinaryIO, size: int) -> bool:
    """Matroska and WebM: elements, each with its length; some in others."""
    start = 0
    for _ in range(_MOST_PARTS):
        if start >= size:
            break
        head = _read(file, start, 12)
        id_length = _vint_length(head[0])
        if id_length > 4:
            return False
        if len(head) <= id_length or len(head) < id_length + _vint_length(head[id_length]):
            return True
        number = int.from_bytes(head[:id_length], "big")
        bits = _vint_length(head[id_length])
        body = start + id_length + bits
        if bits > 8:
            return False
        unknown = (1 << 7 * bits) - 1
        length = int.from_bytes(head[id_length : id_length + bits], "big") & unknown
        if length != unknown and body + length > size:
            return True
        inside = number == _SEGMENT or (number == _CLUSTER and length == unknown)
        start = body if inside else body + length
    return False


def _vint_length(first: int) -> int:
    return 9 - first.bit_length()


def _gif(file: BinaryIO, size: int) -> bool:
    """GIF: frames and extensions, each in blocks of a stated length, and a byte at the end."""
    flags = _read(file, 10, 1)
    start = 13 + (_gif_palette_bytes(flags[0]) if flags else 0)
    file.seek(start)
    while what := file.read(1):
        if what == b";":
            return False
        if what == b",":
            head = file.read(9)
            if len(head) < 9:
                return True
            file.seek(_gif_palette_bytes(head[8]) + 1, io.SEEK_CUR)
        elif what == b"!":
            file.read(1)
        else:
            continue  # filling, which decoders pass over
        block = file.read(1)
        while block and block[-1]:
            length = block[-1] + 1
            block = file.read(length)
            if len(block) < length:
                return True
    return True


def _gif_palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _ivf(file: BinaryIO, size: int) -> bool:
    """IVF: a header, then frames, each after its length and its time."""
    start = int.from_bytes(_read(file, 6, 2), "little")
    for _ in range(_MOST_PARTS):
        if start >= size:
            return start > size
        start += 12 + int.from_bytes(_read(file, start, 4), "little")
    return False


def _flv(file: BinaryIO, size: int) -> bool:
    """FLV: after each tag stands how long it was."""
    last = int.from_bytes(_read(file, size - 4, 4), "big")
    if last < 11 or last > size - 4:
        return size > 13
    tag = _read(file, size - 4 - last, 4)
    return int.from_bytes(tag[1:4], "big") != last - 11


def _asf(file: BinaryIO, size: int) -> bool:
    head = _read(file, 0, 2**16)
    at = head.find(_ASF_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return False
    stated, flags = struct.unpack("<Q", head[at + 40 : at + 48])[0], head[at + 88]
    return not flags & 1 and bool(stated > size)  # the flag: a broadcast, whose length is not known


def _ogg(file: BinaryIO, size: int) -> bool:
    tail = _read(file, size - _TAIL_BYTES, _TAIL_BYTES)
    at = tail.rfind(b"OggS")
    if at < 0:
        return False
    page = tail[at:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _program_stream(file: BinaryIO, size: int) -> bool:
    """MPEG-PS: packs of packets that state their length."""
    tail = _read(file, size - _TAIL_BYTES, _TAIL_BYTES)
    at = tail.rfind(b"\0\0\x01\xba")
    if at < 0:
        return False
    if len(tail) < at + 14:
        return True
    at += 14 + (tail[at + 13] & 7) if tail[at + 4] >> 6 == 1 else 12  # MPEG-2, MPEG-1
    while at < len(tail):
        code = tail[at : at + 4]
        if code[:3] != b"\0\0\x01"[: len(code)]:
            return False  # filling, or another version of packs
        if code == b"\0\0\x01\xb9":
            return False
        if len(tail) < at + 6:
            return True
        at += 6 + int.from_bytes(tail[at + 4 : at + 6], "big")
    return at > len(tail)


def _transport_stream(file: BinaryIO, size: int) -> bool:
    """MPEG-TS: packets of 188 bytes (192 with a time each), and in them parts that state theirs."""
    step, offset = (188, 0) if _read(file, 0, 1) == b"G" else (192, 4)
    if size % step:
        return True
    start = max(size - _TAIL_BYTES // step * step, 0)
    tail = _read(file, start, size - start)
    missing: dict[int, int] = {}
    for at in range(offset, len(tail), step):
        packet = tail[at : at + 188]
        if packet[0] != 0x47:
            return False
        number = (packet[1] & 0x1F) << 8 | packet[2]
        begin = 4 + (1 + packet[4] if packet[3] & 0x20 else 0)
        payload = packet[begin:] if packet[3] & 0x10 else b""
        if packet[1] & 0x40 and payload.startswith(b"\0\0\x01"):
            length = int.from_bytes(payload[4:6], "big")
            missing[number] = 6 + length if length else 0
        missing[number] = missing.get(number, 0) - len(payload)
    return any(left > 0 for left in missing.values())


_CHECKS: dict[str, Callable[[BinaryIO, int], bool]] = {
    "mov": _boxes,
    "matroska": _elements,
    "avi": _riff,
    "flv": _flv,
    "gif": _gif,
    "asf": _asf,
    "ogg": _ogg,
    "ivf": _ivf,
    "mpeg": _program_stream,
    "mpegts": _transport_stream,
}
