"""Objects in a picture: asked for as `bbox_2d` and `label`, kept in its own pixels, and drawn.

Families of models count differently: in pixels of the picture as they see it, or from 0 to 1000
across it (`models.families.Family.box_grid`). What is written is neither: x to the right, y down,
in pixels of the picture as it is shown (turned as its EXIF data says), x1 < x2 and y1 < y2.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Self

from qwencli.dataset.pipeline import Captioned, Outcome
from qwencli.dataset.sinks import write_whole
from qwencli.dataset.sources import CAPTION, Item, Slot
from qwencli.errors import OutputError, QwenCliError
from qwencli.messages import ImagePart, VisualPart
from qwencli.results import Size

if TYPE_CHECKING:
    from PIL.Image import Image

BOXES = "boxes"
PROMPT = "Locate every object in the image and report its bbox_2d and label in JSON."
# Longest side of a drawn picture: larger ones take seconds and show no more.
MAX_SIDE = 2048
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
_DRAWING_THREADS, _WAITING = 2, 16


def schema(grid: int | None = None) -> str:
    """What answers are held to.

    Args:
        grid: see `Family.box_grid`; without one no coordinate is too large.
    """
    coordinate = {"type": "integer", "minimum": 0, "maximum": grid or 99999}
    box = {
        "type": "object",
        "properties": {
            "bbox_2d": {"type": "array", "items": coordinate, "minItems": 4, "maxItems": 4},
            "label": {"type": "string", "minLength": 1, "maxLength": 200},
        },
        "required": ["bbox_2d", "label"],
        "additionalProperties": False,
    }
    return json.dumps({"type": "array", "items": box})


def in_pixels(answer: str, size: Size, resized: Size, grid: int | None) -> str:
    """An answer in the model's coordinates -> the same in pixels of a picture of `size`.

    Corners are put in order and brought into the picture; a box outside of it is left out.

    Args:
        resized: the picture as the model saw it. grid: see `Family.box_grid`.
    """
    across, down = resized if grid is None else (grid, grid)
    found = []
    for each in json.loads(answer):
        x1, y1, x2, y2 = each["bbox_2d"]
        left, right = _span(x1, x2, size[0], across)
        top, bottom = _span(y1, y2, size[1], down)
        if right > left and bottom > top:
            found.append({"bbox_2d": [left, top, right, bottom], "label": each["label"]})
    return json.dumps(found, ensure_ascii=False)


def _span(first: int, second: int, pixels: int, units: int) -> tuple[int, int]:
    """(low, high) in pixels; high is not above low for what lies outside."""
    low, high = sorted((first, second))
    start, end = round(low * pixels / units), min(round(high * pixels / units), pixels)
    if start >= pixels:
        # Thinner than a pixel, at the very edge.
        return (pixels - 1, pixels) if low == units else (pixels, pixels)
    return start, max(end, start + 1)


def draw(picture: Image, boxes: Sequence[dict[str, Any]], max_side: int | None = MAX_SIDE) -> Image:
    """A copy with boxes (as `in_pixels` writes them) and their labels, `max_side` at most."""
    from PIL import ImageDraw, ImageFont

    scale = 1.0 if max_side is None else min(1.0, max_side / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    drawn = picture.convert("RGB").resize((width, height))
    pen = ImageDraw.Draw(drawn)
    line = max(2, max(width, height) // 300)
    font = ImageFont.load_default(size=max(11, max(width, height) // 50))
    labels = list(dict.fromkeys(box["label"] for box in boxes))
    for box in boxes:
        colour = _COLOURS[labels.index(box["label"]) % len(_COLOURS)]
        left, top, right, bottom = (round(value * scale) for value in box["bbox_2d"])
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), None, colour, line)
        text = " ".join(box["label"].split())[:60]
        edges = pen.textbbox((0, 0), text, font=font)
        wide, high = edges[2] + 4, edges[3] + 4
        x, y = max(0, min(left, width - wide)), max(0, top - high)
        pen.rectangle((x, y, x + wide, y + high), fill=colour)
        pen.text((x + 2, y), text, fill="white", font=font)
    return drawn


class Overlays:
    """Pictures with their boxes drawn, as PNG files in a folder: `a/b.png` for `a/b.jpg`.

    Drawn in threads while others are captioned; a context manager that waits for the last one.

    Args:
        folder: None = draw nothing.
        open_item: the picture of an item. failed: told what could not be drawn.
    """

    def __init__(
        self,
        folder: Path | None,
        open_item: Callable[[Item], VisualPart],
        failed: Callable[[QwenCliError], None],
    ) -> None:
        self.folder, self.count, self.num_failed = folder, 0, 0
        self._open, self._failed = open_item, failed
        self._taken: dict[str, Slot] = {}
        self._threads = ThreadPoolExecutor(_DRAWING_THREADS, thread_name_prefix="draw boxes")
        self._room = threading.Semaphore(_WAITING)
        self._errors: list[QwenCliError] = []

    def add(self, outcome: Outcome) -> None:
        """Draw what was kept; waits where many are waiting."""
        if self.folder is None or not isinstance(outcome, Captioned):
            return
        self._report()
        item, slot = outcome.task.item, outcome.task.slot
        name = overlay_name(slot)
        if self._taken.setdefault(name.casefold(), slot) != slot:
            name += os.path.splitext(slot.key)[1]  # a.jpg and a.png
        self._room.acquire()
        path = self.folder / f"{name}.png"
        self._threads.submit(self._draw, item, path, outcome.caption)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown()
        self._report()

    def _draw(self, item: Item, path: Path, caption: str) -> None:
        try:
            self._write(item, path, caption)
        except QwenCliError as error:
            self._errors.append(error)
        except Exception as error:  # noqa: BLE001 - one picture that cannot be drawn is told of
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._errors.append(OutputError(f"{item.key}: its boxes cannot be drawn: {line}"))
        finally:
            self._room.release()

    def _write(self, item: Item, path: Path, caption: str) -> None:
        visual = self._open(item)
        if not isinstance(visual, ImagePart):
            return  # boxes of a video are those of its first frame
        file = io.BytesIO()
        draw(visual.image, json.loads(caption)).save(file, "PNG", compress_level=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, file.getvalue())
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror or error}",
                "free space, or name another folder with --overlay",
            ) from error
        self.count += 1

    def _report(self) -> None:
        while self._errors:
            self.num_failed += 1
            self._failed(self._errors.pop(0))


def overlay_name(slot: Slot) -> str:
    """`a/b` for `a/b.jpg`, `a/b.2` for its second sample; never outside the overlays' folder."""
    key = slot.key.partition("://")[2] or slot.key
    path = PurePath(os.path.splitext(key)[0])
    inside = [part for part in path.parts if part not in (path.anchor, "..")]
    name = "/".join(inside[-1:] if path.anchor or "://" in slot.key else inside) or "picture"
    name += f".{slot.field}" if slot.field != CAPTION else ""
    return name + (f".{slot.sample + 1}" if slot.sample else "")
