"""Reads a JSON object of a model folder, and typed values from it.

Every refusal names the file, the key and what it held.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from qwencli.errors import ModelFileError

# The largest that models come with, weight indexes, have a few.
MOST_BYTES = 100_000_000
_DOWNLOAD_AGAIN = "download the model's files again"


def read_json_object(path: Path) -> dict[str, Any]:
    """Contents of a JSON file that holds an object.

    Raises:
        ModelFileError: it cannot be read, is not JSON (with the line), or is not an object.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ModelFileError(
                f"{path}: is {path.stat().st_size / 1e6:.0f} MB, too large for a configuration",
                _DOWNLOAD_AGAIN,
            )
        # utf-8-sig: editors on Windows put a byte order mark in front.
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror or error})"
        raise ModelFileError(reason, "check that the file is there and readable") from error
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise ModelFileError(f"{path}: {line}is not JSON", _DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: is not a JSON object", _DOWNLOAD_AGAIN)
    return value


# Far above any model, far below what would keep a check busy for minutes.
MOST = 10**7
MOST_LAYERS = 1000
LEAST_NUMBER, MOST_NUMBER = 1e-30, 1e30
MOST_SHOWN_CHARS = 60
_AGAIN = "this config.json does not describe a complete model; download it again"


def shortened(value: object) -> str:
    """A value as an error line shows it."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN_CHARS else text[:MOST_SHOWN_CHARS] + "..."


def contradiction(where: str, message: str) -> ModelFileError:
    """An error for values that exclude each other."""
    return ModelFileError(f"{where} contradicts itself: {message}", _AGAIN)


def refused(where: str, key: str, value: object, expected: str) -> ModelFileError:
    """An error for one value; `None` reads as missing."""
    said = "is missing" if value is None else f"is {shortened(value)}"
    return ModelFileError(f"{where}: {key} {said}, expected {expected}", _AGAIN)


def child(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The object under `key`."""
    found = values.get(key)
    if not isinstance(found, Mapping):
        raise ModelFileError(f"{where}: {key} is missing or not an object", _AGAIN)
    return cast("Mapping[str, Any]", found)


def positive_int(
    values: Mapping[str, Any], key: str, where: str, default: Any = None, most: int = MOST
) -> int:
    """A whole number from 1 to `most`; `default` where the key is absent or null."""
    found = values.get(key)
    return positive_int_of(default if found is None else found, key, where, most)


def positive_int_of(value: object, key: str, where: str, most: int = MOST) -> int:
    """`value` as a whole number from 1 to `most`."""
    # `type(...) is int`: True is an integer to isinstance.
    if type(value) is not int or not 1 <= value <= most:
        raise refused(where, key, value, f"a whole number from 1 to {most}")
    return value


def number(values: Mapping[str, Any], key: str, where: str, default: float) -> float:
    """A number above zero that floats can hold; `default` where the key is absent or null."""
    found = values.get(key)
    if found is None:
        return default
    if (
        isinstance(found, bool)
        or not isinstance(found, int | float)
        or not LEAST_NUMBER <= found <= MOST_NUMBER
    ):
        raise refused(where, key, found, "a number above zero")
    return float(found)


def index_list(
    values: Mapping[str, Any], key: str, where: str, depth: int, default: tuple[int, ...]
) -> tuple[int, ...]:
    """Distinct layer numbers below `depth`, in the order given; `default` where absent or null."""
    found = values.get(key)
    found = default if found is None else found
    if not isinstance(found, list | tuple) or not all(type(item) is int for item in found):
        raise refused(where, key, found, "a list of whole numbers")
    if not all(0 <= item < depth for item in found) or len(set(found)) != len(found):
        expected = f"distinct layer numbers from 0 to {depth - 1}"
        raise refused(where, key, list(found), expected)
    return tuple(found)
