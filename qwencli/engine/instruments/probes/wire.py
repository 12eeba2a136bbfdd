"""Plain dataclasses as JSON and back: how probes, engine settings and readings travel."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints


def dumps(value: Any) -> str:
    """One line of JSON. Dataclasses become objects, paths strings."""
    return json.dumps(value, default=plain)


def plain(value: Any) -> Any:
    """What `json` cannot write by itself, as what it can."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):  # dict itself never gets here, read-only views do
        return dict(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}


def decode(kind: Any, value: Any) -> Any:
    """`value` (as `json.loads` gives it) as an instance of `kind`, nested dataclasses included.

    A key that `kind` does not have is ignored and a missing one takes its default, so that
    answers recorded by another version can still be read.

    Raises:
        TypeError: a field without a default is missing.
    """
    if value is None:
        return None
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {f.name for f in fields(kind)}
        return kind(**{name: decode(hints[name], value[name]) for name in known & value.keys()})
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return decode(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        kinds = (args[0],) * len(value) if args[1:] == (...,) else args
        return tuple(decode(inner, item) for inner, item in zip(kinds, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: decode(args[1], item) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum | Path):
        return kind(value)
    return value
