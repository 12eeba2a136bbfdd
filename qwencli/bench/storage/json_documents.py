"""JSON files of campaigns and studies: what stands where, checked before anything is computed.

Rules are a table: a place, whether a value may stand there, and what it is called. What is wrong is
named with its file and key. Keys of newer versions are passed on unread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwencli.bench.storage.columns import HINT, MOST, quoted
from qwencli.errors import BenchError

PLAN, ENVIRONMENT = "plan.json", "environment.json"


def read_plan(folder: Path) -> dict[str, Any]:
    """A campaign's plan.json.

    Raises:
        BenchError: there is none, or it is broken.
    """
    path = folder / PLAN
    plan = read_json(path)
    check_document(path, plan, _PLAN_RULES)
    ids = [cell["cell_id"] for cell in plan["cells"]]
    for place, cell_id in enumerate(ids):
        if cell_id in ids[:place]:
            raise BenchError(
                f"{path} is broken: cells[{place}].cell_id: a second cell {cell_id!r}", HINT
            )
    least = (plan.get("stop") or {}).get("min_runs", 1)
    if least > plan["runs"]:
        raise BenchError(
            f"{path} is broken: stop.min_runs: {least} is above runs, {plan['runs']}", HINT
        )
    return plan


def read_environment(folder: Path) -> dict[str, Any]:
    """A campaign's environment.json.

    Raises:
        BenchError: there is none, or it is broken.
    """
    path = folder / ENVIRONMENT
    environment = read_json(path)
    check_document(path, environment, _ENVIRONMENT_RULES)
    return environment


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that every campaign has.

    Raises:
        BenchError: there is no campaign, or the file is broken.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text, parse_constant=_no_constant)
        text.encode()
        json.dumps(value, ensure_ascii=False).encode()  # \ud800 can be read, but not written
    except OSError as error:
        raise BenchError(
            f"{path.parent} holds no campaign: {path.name}: {error.strerror}", "check the folder"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path} is broken: {error}", HINT) from error
    if not isinstance(value, dict):
        raise BenchError(f"{path} is broken: not a JSON object", HINT)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Where a value stands, whether it may be there, what it is called. In a place "[]" is each item of
# a list, and "?" marks what may be missing.
Rule = tuple[str, Callable[[Any], bool], str]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_object_or_null(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def is_filled_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= MOST


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 1


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, list | dict)


_TEXT, _NUMBER = "a text", "a number from 0"
_PLAN_RULES: tuple[Rule, ...] = (
    ("runs", is_count, "a whole number from 1"),
    ("max_new_tokens", is_count, "a whole number from 1"),
    ("prompt", is_text, _TEXT),
    ("images", is_list, "a list"),
    ("images[]", is_object, "an object"),
    ("images[].name", is_text, _TEXT),
    ("device", is_text, _TEXT),
    ("dtype", is_text, _TEXT),
    ("load_format", is_text, _TEXT),
    ("stop?", _is_object_or_null, "an object"),
    ("stop?.min_runs?", is_count, "a whole number from 1"),
    ("stop?.processes?", is_count, "a whole number from 1"),
    ("stop?.max_noise_percent?", _is_number_or_null, _NUMBER),
    ("stop?.max_time_s?", _is_number_or_null, _NUMBER),
    ("cells", is_filled_list, "a list of cells"),
    ("cells[]", is_object, "an object"),
    *(
        (f"cells[].{axis}", is_name, "a name")
        for axis in ("cell_id", "model", "engine", "quantization", "attention", "cache",
                     "load_mode")
    ),
    *(
        (f"cells[].{axis}?", is_name, "a name")
        for axis in ("kernels", "kv_dtype", "speculate")
    ),
    ("cells[].skip_reason?", _is_text_or_null, "a text or null"),
)  # fmt: skip
_ENVIRONMENT_RULES: tuple[Rule, ...] = (
    ("device", is_object, "an object"),
    ("device.device", is_name, "a name"),
    ("device.name", _is_text_or_null, "a text or null"),
    ("device.driver", _is_text_or_null, "a text or null"),
    ("device.total_memory_bytes?", _is_number_or_null, _NUMBER),
    ("versions", is_object, "an object"),
    ("versions.torch", _is_scalar, _TEXT),
    ("versions.transformers", _is_scalar, "a text or null"),
    ("cpu", is_object, "an object"),
    ("cpu.model", _is_text_or_null, "a text or null"),
    ("cpu.logical_cores", lambda value: value is None or is_count(value), "a count or null"),
    ("os?", is_object, "an object"),
    ("seed", _is_scalar, "a number"),
)


def check_document(path: Path, document: Mapping[str, Any], rules: Sequence[Rule]) -> None:
    """Raise BenchError, naming file and key, unless every rule holds."""
    for place, holds, kind in rules:
        for where, value in _values(document, place.split("."), ""):
            if value is _MISSING:
                raise BenchError(f"{path} is broken: it has no {where}", HINT)
            if not holds(value):
                text = quoted(json.dumps(value, ensure_ascii=False))[1:-1]
                raise BenchError(f"{path} is broken: {where}: {text} is not {kind}", HINT)


_MISSING = object()


def _values(value: Any, keys: Sequence[str], where: str) -> Iterator[tuple[str, Any]]:
    """Every value at a place, with the place."""
    if not keys:
        yield where, value
        return
    key, rest = keys[0], keys[1:]
    name = key.removesuffix("[]").removesuffix("?")
    at = f"{where}.{name}" if where else name
    found = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    if not key.endswith("[]"):
        optional = key.endswith("?") and (found is _MISSING or (rest and found is None))
        if found is _MISSING and not optional:
            yield at, _MISSING
        elif not optional:
            yield from _values(found, rest, at)
        return
    for number, item in enumerate(found if isinstance(found, list) else ()):
        yield from _values(item, rest, f"{at}[{number}]")
