"""Typed reads from the contents of a config.json; every refusal names the key and what it held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from qwencli.errors import ModelFileError


def contradiction(message: str) -> ModelFileError:
    """An error for values that exclude each other."""
    return ModelFileError(
        f"config.json contradicts itself: {message}", "download the model's config.json again"
    )


def child(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`."""
    found = values.get(key)
    if not isinstance(found, Mapping):
        raise ModelFileError(
            f"config.json has no object {key!r}"
            if found is None
            else f"config.json: {key!r} is not an object",
            "download the model's config.json again",
        )
    return cast("Mapping[str, Any]", found)


def positive_int(
    values: Mapping[str, Any], key: str, where: str, default: int | None = None
) -> int:
    """A whole number above zero; `default` where the key is absent or null."""
    found = values.get(key)
    if found is None:
        found = default
    if found is None:
        raise ModelFileError(f"{where} lacks {key!r}", "download the model's config.json again")
    return positive_int_of(found, f"{where}.{key}")


def positive_int_of(value: object, what: str) -> int:
    """`value` as a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelFileError(f"{what} is {value!r}", "expected a whole number above zero")
    return value


def number(values: Mapping[str, Any], key: str, where: str, default: float) -> float:
    """A finite number above zero; `default` where the key is absent or null."""
    found = values.get(key)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise ModelFileError(f"{where}.{key} is {found!r}", "expected a number above zero")
    return float(found)


def index_list(values: Mapping[str, Any], key: str, where: str, depth: int) -> tuple[int, ...]:
    """Distinct layer numbers below `depth`, in the order given."""
    found = values.get(key)
    if not isinstance(found, list | tuple):
        raise ModelFileError(f"{where}.{key} is {found!r}", "expected a list of layer numbers")
    good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < depth for i in found)
    if not good or len(set(found)) != len(found):
        raise ModelFileError(
            f"{where}.{key} is {list(found)!r}", f"expected distinct numbers from 0 to {depth - 1}"
        )
    return tuple(found)
