"""Values as people type them, on the command line, in a chat and in nodes alike."""

from __future__ import annotations

import math
import re

from qwencli.config import SeqLen
from qwencli.errors import UsageError

# Numbers as people write them, on the command line and in a chat alike.
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


def parse_seq_len(text: str) -> SeqLen:
    """A value of `--max-seq-len`: a whole number above zero, or "auto".

    Raises:
        UsageError: anything else.
    """
    if text.strip().lower() == "auto":
        return "auto"
    length = read_whole(text)
    if length is not None and 0 < length < 2**63:
        return length
    raise UsageError(
        f"--max-seq-len {text!r} is not a length", "give a number of tokens from 1 on, or auto"
    )


def parse_max_pixels(text: str) -> int | None:
    """A value of `--max-pixels`: a whole number above zero, or "auto", which is None.

    Raises:
        UsageError: anything else.
    """
    if text.strip().lower() == "auto":
        return None
    size = read_whole(text)
    if size is not None and 0 <= size < 2**63:
        return size
    raise UsageError(
        f"--max-pixels {text!r} is not a size", "give a number of pixels (height x width), or auto"
    )


# Seconds of a unit.
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str, said_by: str) -> float:
    """Seconds of "300", "90s", "5m" or "2h".

    Args:
        said_by: the option, for the error.

    Raises:
        UsageError: it is none, or above a year.
    """
    found = re.fullmatch(r"([0-9]{1,8}(?:\.[0-9]{1,3})?)\s*([smh]?)", text.strip().lower())
    seconds = float(found[1]) * _UNITS[found[2]] if found else math.inf
    if seconds > 366 * 24 * 3600:
        raise UsageError(f"{said_by} {text!r} is not a time", "write it as 5m, 90s or 2h; 0 = off")
    return seconds
