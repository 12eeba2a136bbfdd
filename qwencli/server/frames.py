"""Requests and answers as bytes between a command and the resident engine.

What may travel are the frozen data of `config`, `messages` and `results`, errors and pictures; what
comes in becomes one of those and nothing else. A frame is the lengths of its parts, a JSON text,
and the pictures' pixels as they are.
"""

from __future__ import annotations

import inspect
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli import config, errors, messages, results
from qwencli.errors import InputError, QwenCliError, UnsupportedModeError

if TYPE_CHECKING:
    from PIL.Image import Image

_LENGTHS = struct.Struct("<IQ")
HEAD_BYTES = _LENGTHS.size
# Of the JSON text, and of all pictures of a frame.
MAX_TEXT_BYTES, MAX_PIXEL_BYTES = 2**27, 2**33
_KIND, _ITEMS = "~", "items"


def _classes(test: Callable[[type], bool]) -> Mapping[str, Any]:
    return {
        name: found
        for module in (config, messages, results)
        for name, found in inspect.getmembers(module, inspect.isclass)
        if found.__module__ == module.__name__ and test(found)
    }


_DATA = _classes(is_dataclass)
_MODES = _classes(lambda found: issubclass(found, StrEnum))
_ERRORS: Mapping[str, type[QwenCliError]] = {
    name: found
    for name, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, QwenCliError)
}


def encode_frame(message: Mapping[str, Any]) -> list[bytes]:
    """A message as the pieces of a frame, to be sent one after the other."""
    pixels: list[bytes] = []
    text = json.dumps(_encoded(dict(message), pixels), separators=(",", ":"))
    data = text.encode("utf-8", "surrogatepass")
    return [_LENGTHS.pack(len(data), sum(map(len, pixels))), data, *pixels]


def frame_lengths(head: bytes) -> tuple[int, int]:
    """Of the text and of the pixels that follow.

    Raises:
        InputError: more than may be.
    """
    text, pixels = _LENGTHS.unpack(head)
    if text > MAX_TEXT_BYTES or pixels > MAX_PIXEL_BYTES:
        raise InputError("a frame is too long")
    return text, pixels


def decode_frame(text: bytes, pixels: bytes) -> dict[str, Any]:
    """The message of a frame.

    Raises:
        InputError: it is none.
    """
    try:
        message = _decoded(
            json.loads(text.decode("utf-8", "surrogatepass")), _Pixels(memoryview(pixels))
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"a frame cannot be read: {error}") from error
    if not isinstance(message, dict):
        raise InputError("a frame holds no message")
    return message


def _encoded(value: Any, pixels: list[bytes]) -> Any:
    """JSON for a value; what JSON has no name for is an object that tells its kind."""
    if isinstance(value, StrEnum):
        return {_KIND: type(value).__name__, "value": value.value}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, tuple):
        return {_KIND: "tuple", _ITEMS: [_encoded(each, pixels) for each in value]}
    if isinstance(value, Mapping):
        return {
            _KIND: "dict",
            _ITEMS: {str(name): _encoded(each, pixels) for name, each in value.items()},
        }
    if isinstance(value, list):
        return [_encoded(each, pixels) for each in value]
    if isinstance(value, Path):
        return {_KIND: "Path", "value": str(value)}
    if isinstance(value, QwenCliError):
        nearest = value.nearest if isinstance(value, UnsupportedModeError) else None
        known = next(name for each in type(value).__mro__ if (name := each.__name__) in _ERRORS)
        return {
            _KIND: "error", "class": known, "message": value.message,
            "hint": value.hint, "nearest": nearest,
        }  # fmt: skip
    name = type(value).__name__
    if _DATA.get(name) is type(value):
        items = {each.name: _encoded(getattr(value, each.name), pixels) for each in fields(value)}
        return {_KIND: name, _ITEMS: items}
    image: Image = value
    pixels.append(image.convert("RGB").tobytes())
    return {_KIND: "Image", "size": list(image.size)}


class _Pixels:
    """The pixels of a frame, taken from its beginning."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, size: Sequence[int]) -> Image:
        from PIL import Image

        width, height = size
        end = self._at + 3 * width * height
        if min(width, height) < 0 or end > len(self._data):
            # Pillow takes memory for all of a picture before it looks for the pixels.
            raise ValueError("a picture's pixels are missing")
        image = Image.frombytes("RGB", (width, height), self._data[self._at : end])
        self._at = end
        return image


def _decoded(value: Any, pixels: _Pixels) -> Any:
    if isinstance(value, list):
        return [_decoded(each, pixels) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value[_KIND]
    if kind == "tuple":
        return tuple(_decoded(each, pixels) for each in value[_ITEMS])
    if kind == "dict":
        return {name: _decoded(each, pixels) for name, each in value[_ITEMS].items()}
    if kind == "Image":
        return pixels.take(value["size"])
    if kind == "Path":
        return Path(value["value"])
    if kind == "error":
        return _error(value)
    if kind in _MODES:
        return _MODES[kind](value["value"])
    return _DATA[kind](**{name: _decoded(each, pixels) for name, each in value[_ITEMS].items()})


def _error(value: Mapping[str, Any]) -> QwenCliError:
    found = _ERRORS.get(value["class"], QwenCliError)
    if issubclass(found, UnsupportedModeError):
        return found(value["message"], value["hint"], value["nearest"])
    return found(value["message"], value["hint"])
