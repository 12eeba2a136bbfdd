"""From a video of any kind to the frames a model looks at, or to one clear error.

A video is a folder of frames, an animation that Pillow reads (GIF, WebP, APNG), or a video file,
which needs the optional package `av` (FFmpeg). Frames are taken evenly over the whole length.
"""

from __future__ import annotations

import errno
import functools
import io
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import Image

from qwencli.engine.frontend.image_decoding import DECODE_ERRORS, allow_time, decode, read_picture
from qwencli.engine.frontend.images import (
    ANIMATED,
    MAX_DECODE_BYTES,
    check_decoded_size,
    image_part,
    to_rgb,
)
from qwencli.engine.frontend.media_files import (
    PICTURE_SUFFIXES,
    open_file,
    read_error,
    video_kind,
)
from qwencli.errors import InputError, OutOfMemoryError
from qwencli.messages import ImagePart, VideoPart, VisualPart

Part = TypeVar("Part", bound=VisualPart)

# Where nobody says how many frames: as many a second as Qwen's own processors take, in bounds.
FRAMES_PER_SECOND = 2.0
FEWEST_FRAMES, MOST_FRAMES = 4, 64
# Decoded frames are held in memory, so many bytes a pixel.
_BYTES_A_PIXEL = 4
MAX_VIDEO_PIXELS = 300_000_000
# To take frames out of an animation all before them are decoded, at about 50 megapixels a second.
MAX_ANIMATION_PIXELS = 400_000_000
# Finding a frame takes the time of so many pixels, however small it is.
_PIXELS_A_FRAME = 20_000
# What a frame of an animation takes that states no time; browsers do the same.
_FRAME_S = 0.1

# A video file's frames: the largest, and bytes a pixel that FFmpeg holds of those it refers to.
MAX_FRAME_PIXELS = 36_000_000
_DECODER_BYTES_A_PIXEL = 16
_COPY_AGAIN = "copy or download the file again"


def open_visual(
    source: Path | bytes,
    frames: int | None = None,
    beside: Sequence[VisualPart] = (),
    name: str | None = None,
    max_pixels: int | None = None,
) -> VisualPart:
    """A video file as a video, with `frames` an animation or a folder of frames too, and anything
    else as a picture.

    Args:
        source: a file or folder, or the bytes of a file.
        name: what errors call it; the path by default.
        beside: what is shown in the same request: all of it is held in memory together.
        max_pixels: see `image_part`.

    Raises:
        InputError, MissingDependencyError: see `open_video` and `open_image`.
    """
    held_bytes = decoded_bytes(beside)
    if frames is not None and isinstance(source, Path) and _is_folder(source):
        return _from_folder(source, frames, held_bytes)

    def read(image: Image.Image, name: str) -> VisualPart:
        if frames is not None and _is_animation(image, name):
            return _from_animation(image, name, frames, held_bytes)
        return image_part(held_bytes, image, name, max_pixels)

    return _from_any_file(source, name or str(source), frames, held_bytes, read)


def open_video(
    path: Path, frames: int | None = None, beside: Sequence[VisualPart] = ()
) -> VideoPart:
    """Decode `frames` frames, evenly spaced from the first to the last, or all if there are fewer.

    Args:
        frames: None = `FRAMES_PER_SECOND`, but no fewer than 4 and no more than 64, nor more than
            `MAX_VIDEO_PIXELS` hold.
        beside: see `open_visual`.

    Raises:
        InputError: not there, not readable, not a video, damaged, or over `MAX_VIDEO_PIXELS`.
        MissingDependencyError: a video file, and `av` is not installed.
    """
    held_bytes = decoded_bytes(beside)
    if _is_folder(path):
        return _from_folder(path, frames, held_bytes)

    def read(image: Image.Image, name: str) -> VideoPart:
        if not _is_animation(image, name):
            raise InputError(f"{name} is a single picture, not a video", "show it as a picture")
        return _from_animation(image, name, frames, held_bytes)

    return _from_any_file(path, str(path), frames, held_bytes, read)


def _from_any_file(
    source: Path | bytes,
    name: str,
    frames: int | None,
    held_bytes: int,
    read: Callable[[Image.Image, str], Part],
) -> Part | VideoPart:
    """A video file as a video, anything else as `read` makes it of the opened picture."""
    try:
        # One opening of the file: it may be gone at the next, and a pipe is read once only.
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source, name) as file:
            kind = _video_kind(file, name)
            if kind is not None:
                return _from_video_file(file, name, kind, frames, held_bytes)
            return decode(file, name, read)
    except MemoryError as error:
        raise OutOfMemoryError(
            f"not enough memory to decode {name}", "lower --frames, or free some memory"
        ) from error


def _video_kind(file: BinaryIO, name: str) -> str | None:
    try:
        kind = video_kind(file.read(512))
        file.seek(0)
    except OSError as error:
        raise read_error(error, name) from error
    return kind


def decoded_bytes(visuals: Sequence[VisualPart]) -> int:
    """What the pictures and frames of `visuals` take in memory, as Pillow holds them."""
    images = [
        image
        for part in visuals
        for image in ((part.image,) if isinstance(part, ImagePart) else part.frames)
    ]
    return sum(image.width * image.height * _BYTES_A_PIXEL for image in images)


def even_indices(total: int, count: int) -> list[int]:
    """`count` places from 0 to total - 1, evenly spaced, both ends included; all if fewer.

    The rule of transformers' Qwen3VLVideoProcessor.sample_frames.
    """
    import numpy as np  # pictures have no need of it

    return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()]


def chosen_frames(
    name: str,
    size: tuple[int, int],
    total: int,
    duration_s: float,
    wanted: int | None,
    held_bytes: int = 0,
) -> list[int]:
    """Which of `total` frames of (width, height) `size` are looked at, in order.

    Args:
        wanted, held_bytes: see `open_video`.

    Raises:
        InputError: so many frames as are wanted are more than memory is meant to hold.
    """
    most = max(_room(size, held_bytes), 1)
    chosen = even_indices(total, _count(total, duration_s, wanted, most))
    _check_size(name, size, len(chosen), held_bytes)
    return chosen


def _count(total: int, duration_s: float, wanted: int | None, most: int = MOST_FRAMES) -> int:
    own = min(max(round(duration_s * FRAMES_PER_SECOND), FEWEST_FRAMES), MOST_FRAMES, most)
    return min(total, own if wanted is None else wanted)


def _room(size: tuple[int, int], held_bytes: int) -> int:
    """How many frames of this size memory is meant to hold; see `_check_size`."""
    most = min(MAX_VIDEO_PIXELS, (MAX_DECODE_BYTES - held_bytes) // _BYTES_A_PIXEL)
    return most // max(size[0] * size[1], 1)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False  # opening it as a file will tell why


def _is_animation(image: Image.Image, name: str) -> bool:
    """Raises InputError for a GIF that ends early, which Pillow takes for a shorter one."""
    file = getattr(image, "fp", None)
    if image.format == "GIF" and file is not None:
        from qwencli.engine.frontend.containers import is_cut_off

        place = file.tell()
        if is_cut_off(file, "gif"):
            raise InputError(f"{name}: damaged GIF file (it ends early)", _COPY_AGAIN)
        file.seek(place)
    return image.format in ANIMATED and getattr(image, "is_animated", False)


def _check_size(name: str, size: tuple[int, int], count: int, held_bytes: int) -> None:
    """Raise InputError where `count` frames of `size` are too many beside what is held."""
    if count > (room := _room(size, held_bytes)):
        raise InputError(
            f"{name}: {count} frames of {size[0]}x{size[1]} are more than "
            f"{MAX_VIDEO_PIXELS // 10**6} megapixels"
            + (" with what else the request shows" if held_bytes else ""),
            f"give --frames {room}, or scale the video down" if room else "scale the video down",
        )


def _from_folder(folder: Path, wanted: int | None, held_bytes: int) -> VideoPart:
    try:
        files = sorted(
            # macOS leaves ._NAME beside files that it copies; they are no pictures.
            (
                path
                for path in folder.iterdir()
                if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
            ),
            key=_natural,
        )
    except OSError as error:
        raise read_error(error, str(folder)) from error
    if not files:
        raise InputError(f"{folder} holds no pictures", "give a folder with the frames of a video")
    duration_s = len(files) / FRAMES_PER_SECOND
    size = read_picture(files[0], lambda image, _: image.size)
    chosen = chosen_frames(str(folder), size, len(files), duration_s, wanted, held_bytes)
    shown: list[Image.Image] = []
    for index in chosen:
        read = functools.partial(_frame, shown, len(chosen), held_bytes)
        shown.append(read_picture(files[index], read))
    return VideoPart(
        frames=tuple(shown),
        times_s=tuple(index / FRAMES_PER_SECOND for index in chosen),
        duration_s=duration_s,
        name=str(folder),
    )


def _frame(
    before: Sequence[Image.Image], count: int, held_bytes: int, image: Image.Image, name: str
) -> Image.Image:
    """One of `count` frames of a folder, after those `before`."""
    _check_size(name, image.size, count, held_bytes)
    frame = to_rgb(image, name, held_bytes + _others_bytes(image.size, count))
    if before and frame.size != before[0].size:
        sizes = " and ".join(f"{w}x{h}" for w, h in (before[0].size, frame.size))
        raise InputError(
            f"{name}: the frames of a video are of one size, these are {sizes}",
            "give a folder with the frames of one video alone",
        )
    return frame


def _others_bytes(size: tuple[int, int], count: int) -> int:
    """What all but one of `count` frames take."""
    return (count - 1) * size[0] * size[1] * _BYTES_A_PIXEL


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _from_animation(
    image: Image.Image, name: str, wanted: int | None, held_bytes: int
) -> VideoPart:
    total: int = image.n_frames  # type: ignore[attr-defined]
    begins, now_s = [], 0.0
    _check_work(name, image.size, total)
    allow_time(image, 2 * MAX_ANIMATION_PIXELS)
    # Its times stand in the frames: one pass to read them, one for the chosen frames.
    for index in range(total):
        image.seek(index)
        # A frame may be larger than the canvas that the header states.
        _check_work(name, image.size, total)
        check_decoded_size(image, name, held_bytes + _others_bytes(image.size, 3))
        image.load()
        begins.append(now_s)
        now_s += image.info.get("duration", 0) / 1e3 or _FRAME_S
    chosen = chosen_frames(name, image.size, total, now_s, wanted, held_bytes)
    # Decoders keep the frame before, and what it covers, too.
    held_bytes += _others_bytes(image.size, len(chosen) + 2)
    frames = []
    for index in chosen:
        image.seek(index)
        frames.append(to_rgb(image, name, held_bytes))
    return VideoPart(tuple(frames), tuple(begins[index] for index in chosen), now_s, name)


def _check_work(name: str, size: tuple[int, int], total: int) -> None:
    if total * _PIXELS_A_FRAME > MAX_ANIMATION_PIXELS:
        raise InputError(
            f"{name}: an animation of {total} frames, the limit is "
            f"{MAX_ANIMATION_PIXELS // _PIXELS_A_FRAME}",
            "shorten it, or make a video file of it",
        )
    if size[0] * size[1] * total > MAX_ANIMATION_PIXELS:
        raise InputError(
            f"{name}: an animation of {total} frames of {size[0]}x{size[1]} is more than "
            f"{MAX_ANIMATION_PIXELS // 10**6} megapixels",
            "scale it down, or make a video file of it",
        )


def _from_video_file(
    file: BinaryIO, name: str, kind: str, wanted: int | None, held_bytes: int
) -> VideoPart:
    # Here and not above: a picture needs none, and Python's metadata of packages takes 15 ms.
    from qwencli.engine.machine.packages import require

    require(
        "av",
        f"{name} is a video file",
        'pip install "qwencli[video]"',
        "give an animated GIF or WebP, or a folder of frames with --frames",
    )
    import av

    from qwencli.engine.frontend.containers import is_cut_off

    watched = _WatchedFile(file)
    try:
        if is_cut_off(file, kind):
            raise _ends_early(name)
        total = _packets(watched, name, kind)
        with _container(watched, kind) as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(
                    f"{name}: there is no decoder for its pictures", "convert it to H.264 in MP4"
                )
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            size = stream.width, stream.height
            if size[0] * size[1] > MAX_FRAME_PIXELS:
                raise InputError(
                    f"{name} has frames of {size[0]}x{size[1]}, the limit is "
                    f"{MAX_FRAME_PIXELS // 10**6} megapixels",
                    "scale the video down",
                )
            if min(size) <= 0:
                raise InputError(f"{name}: damaged video file (no size is stated)", _COPY_AGAIN)
            held_bytes += size[0] * size[1] * _DECODER_BYTES_A_PIXEL
            chosen = chosen_frames(name, size, total, total / rate, wanted, held_bytes)
            # The header may state less than the frames turn out to have.
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            frames, times_s = _decoded(container.decode(stream), chosen, rate, size)
    except (av.FFmpegError, *DECODE_ERRORS) as error:
        # FFmpeg's own is raised for what a damaged header claims.
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise
        failure = watched.error
        if failure is None and isinstance(error, OSError) and not isinstance(error, av.FFmpegError):
            failure = error
        if failure is not None:
            raise read_error(failure, name) from error
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{name}: damaged video file ({reason})", _COPY_AGAIN) from error
    if watched.error is not None:
        raise read_error(watched.error, name)
    if not frames:
        raise InputError(f"{name}: no frame can be decoded", _COPY_AGAIN)
    return VideoPart(tuple(frames), tuple(times_s), total / rate, name)


class _WatchedFile:
    """An opened file for FFmpeg: in a name it would see addresses, and lists of other files.

    What reading raises does not come back through FFmpeg, so it is kept in `error`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = error
            return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (ValueError, OverflowError):
            return -1  # a place that a damaged file made up
        except OSError as error:
            if error.errno != errno.EINVAL:
                self.error = error
            return -1

    def tell(self) -> int:
        return self._file.tell()


def _container(file: _WatchedFile, kind: str) -> Any:
    import av

    file.seek(0)
    # Titles in some other encoding than UTF-8 are nothing to fail for.
    return av.open(file, format=kind, metadata_errors="replace")


def _ends_early(name: str) -> InputError:
    return InputError(
        f"{name}: damaged video file (it ends early)",
        f"{_COPY_AGAIN}, or make a whole one of what is there: ffmpeg -i FILE -c copy NEW",
    )


def _packets(file: _WatchedFile, name: str, kind: str) -> int:
    """Frames of a file, which its header need not know, counted without decoding them."""
    with _container(file, kind) as container:
        if not container.streams.video:
            raise InputError(f"{name} has no picture track", "give a video")
        shown = container.streams.video[0]
        total, end_s = 0, 0.0
        for packet in container.demux():
            total += packet.stream is shown and packet.size > 0
            if packet.pts is not None and packet.time_base:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if kind == "flv" and container.duration and total:
            # A cut between two of its parts shows in the length that the header states alone.
            stated_s = container.duration / 1e6
            if end_s < stated_s - max(0.5, stated_s / 20):
                raise _ends_early(name)
    if not total:
        raise InputError(f"{name} has no frames", _COPY_AGAIN)
    return total


def _decoded(
    decoded: Iterable[Any], chosen: Sequence[int], rate: float, size: tuple[int, int]
) -> tuple[list[Image.Image], list[float]]:
    """The chosen frames upright and of one size, and when each is seen, from the first on."""
    frames: list[Image.Image] = []
    times_s: list[float] = []
    first_s = None
    wanted = set(chosen)
    for index, frame in enumerate(decoded):
        time_s = index / rate if frame.time is None else float(frame.time)
        first_s = time_s if first_s is None else first_s
        if index in wanted:
            # A stream may change its size on the way; the first one is kept, as players do.
            image = frame.to_image(width=size[0], height=size[1])
            # Phones store a turn of the picture beside it, counterclockwise in degrees.
            frames.append(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
            times_s.append(time_s - first_s)
        if index >= chosen[-1]:
            break
    return frames, times_s
