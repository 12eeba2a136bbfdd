"""Reads one JSON object of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwencli.errors import ModelFileError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        ModelFileError: not readable, not UTF-8 JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read: {error.strerror}", "check the folder and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path} is not valid JSON: {error}", "download the model's files again"
        ) from error
    if not isinstance(value, dict):
        raise ModelFileError(
            f"{path} holds a {type(value).__name__}, expected an object",
            "download the model's files again",
        )
    return value
