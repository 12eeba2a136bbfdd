"""Numbers as people write them, on the command line and in a chat alike."""

from __future__ import annotations

import re

_WHOLE = re.compile(r"[+-]?[0-9]{1,30}")
_ANY = re.compile(r"[+-]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?")


def read_whole(text: str) -> int | None:
    """A whole number in digits; None for anything else. Blanks around it do not matter."""
    text = text.strip()
    return int(text) if _WHOLE.fullmatch(text) else None


def read_number(text: str) -> float | None:
    """A number such as 0.7, 5 or 1e-3; None for anything else."""
    text = text.strip()
    return float(text) if _ANY.fullmatch(text) else None
