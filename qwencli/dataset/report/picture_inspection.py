"""Looks at each picture once: a thumbnail for the sheet, and what likeness is told by."""

from __future__ import annotations

import io
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwencli.dataset.report.near_duplicates import picture_hash
from qwencli.errors import MissingDependencyError, QwenCliError

if TYPE_CHECKING:
    from PIL.Image import Image

# Many thumbnails are smaller: the sheet of 10,000 pictures stays near 30 MB.
_SIDES = ((1500, 224), (4000, 176))
_SIDE_OF_MANY = 128
_QUALITY = 62
# A JPEG of more pixels is decoded at a part of its size.
_DRAFT_SIDE = 256
_AHEAD = 64


@dataclass(frozen=True)
class InspectedPicture:
    """One picture: its thumbnail as WebP, its hash, or why it cannot be opened."""

    thumbnail: bytes = b""
    picture_hash: tuple[bytes, bytes] | None = None
    unreadable: str | None = None


def thumbnail_side(count: int) -> int:
    """Pixels of the longer side of each thumbnail of so many."""
    return next((side for most, side in _SIDES if count <= most), _SIDE_OF_MANY)


def inspect_pictures(paths: Iterable[Path | None], side: int) -> Iterator[InspectedPicture]:
    """Each picture in order, several at a time; what cannot be opened says why.

    Args:
        paths: None for one that is not to be opened.
    """
    waiting = iter(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        running = deque(
            pool.submit(_inspect, path, side) for path in itertools.islice(waiting, _AHEAD)
        )
        while running:
            yield running.popleft().result()
            running.extend(
                pool.submit(_inspect, path, side) for path in itertools.islice(waiting, 1)
            )


def _inspect(path: Path | None, side: int) -> InspectedPicture:
    if path is None:
        return InspectedPicture()
    try:
        picture = _small(path)
    except MissingDependencyError:
        return InspectedPicture()  # a format that needs a package is not broken
    except QwenCliError as error:
        return InspectedPicture(unreadable=error.message)
    hashed = picture_hash(picture)
    picture.thumbnail((side, side))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=_QUALITY, method=2)
    return InspectedPicture(data.getvalue(), hashed)


def _small(path: Path) -> Image:
    """The picture upright, or a video's first frame; a large JPEG at a part of its size.

    Raises:
        QwenCliError: it cannot be opened.
    """
    from PIL import Image, ImageOps

    from qwencli.engine.frontend.image_decoding import DECODE_ERRORS
    from qwencli.engine.frontend.images import open_image
    from qwencli.engine.frontend.videos import open_visual
    from qwencli.messages import ImagePart

    if path.suffix.lower() in (".jpg", ".jpeg"):
        try:
            with Image.open(path) as opened:
                opened.draft("RGB", (_DRAFT_SIDE, _DRAFT_SIDE))
                return ImageOps.exif_transpose(opened).convert("RGB")
        except (*DECODE_ERRORS, Image.DecompressionBombError):
            pass  # what reads every picture tells what is wrong, where something is
        return open_image(path).image
    visual = open_visual(path)
    return visual.image if isinstance(visual, ImagePart) else visual.frames[0]
