"""The shipped held-out pictures, each with its one right caption.

They are files, not a renderer: exact rates of two campaigns can be compared only over equal
pictures, and every version of Pillow draws its own digits.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "assets" / "heldout"
# What the bundled model answers with the caption that the files hold.
PROMPT = "Describe this image."
# The longest caption has fewer tokens; a model that rambles is wrong either way.
MAX_NEW_TOKENS = 96


def heldout(count: int) -> list[tuple[Path, str]]:
    """The first `count` pictures and captions, or as many as there are."""
    captions: dict[str, str] = json.loads((FOLDER / "captions.json").read_text(encoding="utf-8"))
    return [(FOLDER / name, caption) for name, caption in list(captions.items())[:count]]


def count_heldout() -> int:
    return len(heldout(1 << 30))
