"""Reads one JSON object of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwencli.errors import ModelFileError

# The largest that models come with, weight indexes, have a few.
MOST_BYTES = 100_000_000
_AGAIN = "download the model's files again"


def read_json_object(path: Path) -> dict[str, Any]:
    """Contents of a JSON file that holds an object.

    Raises:
        ModelFileError: it cannot be read, is not JSON (with the line), or is not an object.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ModelFileError(
                f"{path}: is {path.stat().st_size / 1e6:.0f} MB, too large for a configuration",
                _AGAIN,
            )
        # utf-8-sig: editors on Windows put a byte order mark in front.
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror or error})"
        raise ModelFileError(reason, "check that the file is there and readable") from error
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise ModelFileError(f"{path}: {line}is not JSON", _AGAIN) from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: is not a JSON object", _AGAIN)
    return value
