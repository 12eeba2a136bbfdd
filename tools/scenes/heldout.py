"""The held-out set: pictures and their exact captions by seed, with PIL alone (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from tools.scenes.captions import long_caption
from tools.scenes.draw_pil import draw, through_jpeg
from tools.scenes.scene import Scene, sample_scene

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "Describe this image."
# Every fourth picture is of one kind: (antialiased, JPEG quality or None for PNG).
MODES = ((True, None), (True, 85), (False, None), (False, 85))


@dataclass(frozen=True)
class HeldOutItem:
    """`caption` is the one right answer to `PROMPT`."""

    index: int
    image: Image.Image
    caption: str
    scene: Scene


def heldout_rng(seed: int, index: int) -> Random:
    """Seeded by a text that training never uses, so the two sets are independent draws."""
    return Random(f"heldout/{seed}/{index}")


def heldout(count: int, seed: int = 0) -> Iterator[HeldOutItem]:
    """Item `index` depends on (seed, index) alone: a longer set begins with the shorter one."""
    for index in range(count):
        scene = sample_scene(heldout_rng(seed, index))
        antialias, quality = MODES[index % len(MODES)]
        image = draw(scene, antialias=antialias)
        if quality:
            image = through_jpeg(image, quality)
        yield HeldOutItem(index, image, long_caption(scene), scene)
