"""From a video of any kind to the frames a model looks at, or to one clear error.

A video is a folder of frames, an animation that Pillow reads (GIF, WebP, APNG), or a video file,
which needs the optional package `av` (FFmpeg). Frames are taken evenly over the whole length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwencli.engine.images import open_file, open_image, read_picture, to_rgb
from qwencli.engine.optional_packages import require
from qwencli.errors import InputError
from qwencli.messages import ImagePart, VideoPart, VisualPart

# Where nobody says how many frames: as many a second as Qwen's own processors take, in bounds.
FRAMES_PER_SECOND = 2.0
FEWEST_FRAMES, MOST_FRAMES = 4, 64
# Decoded frames are held in memory, three bytes a pixel.
MAX_VIDEO_PIXELS = 10**9
# What a frame of an animation takes that states no time; browsers do the same.
_FRAME_S = 0.1

_VIDEO_FILE = re.compile(
    rb"....ftyp(?!heic|heix|heim|heis|hevc|hevx|mif1|msf1|avi[fs])"
    rb"|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|\x00\x00\x01\xba|OggS|\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    re.DOTALL,
)


def open_visual(path: Path, frames: int | None = None) -> VisualPart:
    """A video file as a video, with `frames` an animation or a folder of frames too, and anything
    else as a picture.

    Raises:
        InputError, MissingDependencyError: see `open_video` and `open_image`.
    """
    wanted = frames is not None and (path.is_dir() or _is_animation(path))
    return open_video(path, frames) if wanted or _is_video_file(path) else open_image(path)


def open_video(path: Path, frames: int | None = None) -> VideoPart:
    """Decode `frames` frames, evenly spaced from the first to the last, or all if there are fewer.

    Args:
        frames: None = `FRAMES_PER_SECOND`, but no fewer than 4 and no more than 64.

    Raises:
        InputError: not there, not readable, not a video, damaged, or over `MAX_VIDEO_PIXELS`.
        MissingDependencyError: a video file, and `av` is not installed.
    """
    if path.is_dir():
        return _from_folder(path, frames)
    if _is_video_file(path):
        return _from_file(path, frames)
    return read_picture(path, lambda image, name: _from_animation(image, name, frames))


def even_indices(total: int, count: int) -> list[int]:
    """`count` places from 0 to total - 1, evenly spaced, both ends included; all if fewer.

    The rule of transformers' Qwen3VLVideoProcessor.sample_frames.
    """
    return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()]


def _count(total: int, duration_s: float, wanted: int | None) -> int:
    own = min(max(round(duration_s * FRAMES_PER_SECOND), FEWEST_FRAMES), MOST_FRAMES)
    return min(total, own if wanted is None else wanted)


def _is_video_file(path: Path) -> bool:
    # A pipe can be read once only; a picture may come through one, a video not.
    if not path.is_file():
        return False
    with open_file(path, str(path)) as file:
        head = file.read(512)
    # MPEG transport streams have no signature but a byte that starts each packet of 188.
    packets = len(head) > 376 and head[0] == head[188] == head[376] == 0x47
    return packets or _VIDEO_FILE.match(head) is not None


def _is_animation(path: Path) -> bool:
    return path.is_file() and read_picture(path, lambda image, _: getattr(image, "n_frames", 1) > 1)


def _check_size(name: str, size: tuple[int, int], count: int) -> None:
    if size[0] * size[1] * count > MAX_VIDEO_PIXELS:
        raise InputError(
            f"{name}: {count} frames of {size[0]}x{size[1]} are more than "
            f"{MAX_VIDEO_PIXELS // 10**6} megapixels",
            "lower --frames, or scale the video down",
        )


def _from_folder(folder: Path, wanted: int | None) -> VideoPart:
    known = Image.registered_extensions()
    files = sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in known), key=_natural
    )
    if not files:
        raise InputError(f"{folder} holds no pictures", "give a folder with the frames of a video")
    duration_s = len(files) / FRAMES_PER_SECOND
    chosen = even_indices(len(files), _count(len(files), duration_s, wanted))
    shown: list[ImagePart] = []
    for index in chosen:
        part = open_image(files[index])
        _check_size(str(folder), part.image.size, len(chosen))
        if shown and part.image.size != shown[0].image.size:
            sizes = " and ".join(f"{w}x{h}" for w, h in (shown[0].image.size, part.image.size))
            raise InputError(
                f"{part.name}: the frames of a video are of one size, these are {sizes}",
                "give a folder with the frames of one video alone",
            )
        shown.append(part)
    return VideoPart(
        frames=tuple(part.image for part in shown),
        times_s=tuple(index / FRAMES_PER_SECOND for index in chosen),
        duration_s=duration_s,
        name=str(folder),
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _from_animation(image: Image.Image, name: str, wanted: int | None) -> VideoPart:
    total = getattr(image, "n_frames", 1)
    if total < 2:
        raise InputError(f"{name} is a single picture, not a video", "show it as a picture")
    begins, now_s = [], 0.0
    # Its times stand in the frames: one pass to read them, one for the chosen frames.
    for index in range(total):
        image.seek(index)
        image.load()
        begins.append(now_s)
        now_s += image.info.get("duration", 0) / 1e3 or _FRAME_S
    chosen = even_indices(total, _count(total, now_s, wanted))
    _check_size(name, image.size, len(chosen))
    frames = []
    for index in chosen:
        image.seek(index)
        frames.append(to_rgb(image, name))
    return VideoPart(tuple(frames), tuple(begins[index] for index in chosen), now_s, name)


def _from_file(path: Path, wanted: int | None) -> VideoPart:
    require(
        "av",
        f"{path} is a video file",
        "pip install 'qwencli[video]'",
        "give an animated GIF or WebP, or a folder of frames with --frames",
    )
    import av

    try:
        total = _packets(path)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            chosen = even_indices(total, _count(total, total / rate, wanted))
            _check_size(str(path), (stream.width, stream.height), len(chosen))
            frames, times_s = _decoded(container.decode(stream), chosen, rate)
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"{path}: damaged video file ({reason})", "copy or download the file again"
        ) from error
    if not frames:
        raise InputError(f"{path}: no frame can be decoded", "copy or download the file again")
    return VideoPart(tuple(frames), tuple(times_s), total / rate, str(path))


def _packets(path: Path) -> int:
    """Frames of a file, which its header need not know, counted without decoding them."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError(f"{path} has no picture track", "give a video")
        total = sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    if not total:
        raise InputError(f"{path} has no frames", "copy or download the file again")
    return total


def _decoded(
    decoded: Iterable[Any], chosen: Sequence[int], rate: float
) -> tuple[list[Image.Image], list[float]]:
    """The chosen frames upright, and when each is seen, from the first on."""
    frames: list[Image.Image] = []
    times_s: list[float] = []
    first_s = None
    wanted = set(chosen)
    for index, frame in enumerate(decoded):
        time_s = index / rate if frame.time is None else float(frame.time)
        first_s = time_s if first_s is None else first_s
        if index in wanted:
            # Phones store a turn of the picture beside it, counterclockwise in degrees.
            image = frame.to_image()
            frames.append(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
            times_s.append(time_s - first_s)
        if index >= chosen[-1]:
            break
    return frames, times_s
