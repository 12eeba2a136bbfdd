"""Opens the pictures and videos that a command was given: paths, addresses, stdin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwencli.dataset.named_inputs import StdinPart, local_path, url_part
from qwencli.errors import InputError, MissingDependencyError, OutOfMemoryError
from qwencli.messages import ImagePart, VideoPart, VisualPart

# What opening a picture or video may raise: it costs that one, and the others are done.
OPENING_ERRORS = (InputError, MissingDependencyError, OutOfMemoryError)

Named = str | StdinPart


def open_picture(path: Path, beside: Sequence[VisualPart] = ()) -> ImagePart:
    """Raises InputError naming the file when it is not a usable picture.

    Args:
        beside: see `open_visual`.
    """
    from qwencli.engine.frontend.images import open_image
    from qwencli.engine.frontend.videos import decoded_bytes

    return open_image(local_path(path), held_bytes=decoded_bytes(beside))


def open_named(
    named: Named,
    frames: int | None,
    beside: Sequence[VisualPart] = (),
    max_pixels: int | None = None,
) -> VisualPart:
    """The picture or video at a path or an address of the web, or what came on stdin; see
    `engine.frontend.videos.open_visual`."""
    from qwencli.engine.frontend import videos

    part = named if isinstance(named, StdinPart) else url_part(named)
    if part is None:
        path = local_path(Path(str(named)))
        return videos.open_visual(path, frames, beside, max_pixels=max_pixels)
    return videos.open_visual(part.read(str(named)), frames, beside, str(named), max_pixels)


def open_visual(path: Path, frames: int | None, beside: Sequence[VisualPart] = ()) -> VisualPart:
    """A picture, or a video; see `engine.frontend.videos.open_visual`.

    Args:
        beside: what the same request shows already; memory is bounded for all of it together.
    """
    from qwencli.engine.frontend import videos

    return videos.open_visual(local_path(path), frames, beside)


def open_video(path: Path, frames: int | None, beside: Sequence[VisualPart] = ()) -> VideoPart:
    """A video, an animation or a folder of frames; see `engine.frontend.videos.open_video`.

    Args:
        beside: see `open_visual`.
    """
    from qwencli.engine.frontend import videos

    return videos.open_video(local_path(path), frames, beside)
