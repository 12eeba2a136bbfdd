"""Reads a campaign's files back; every value is checked before anything is computed from it.

Campaigns are copied, edited, merged by hand and cut off by full disks. What is wrong is named with
its file, line and column (or its key, in a JSON file), whoever reads it: report, compare, explain,
or a resumed campaign. Columns and keys of newer versions are passed on unread; columns that came
after a campaign was written are empty in its rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from qwencli.bench.causes import SCOPES, Cause
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import Table, read_table
from qwencli.errors import BenchError

PLAN, ENVIRONMENT = "plan.json", "environment.json"
RUNS, TOKENS, GPU, HOST = "runs.csv", "tokens.csv", "gpu.csv", "host.csv"
PROBES, ROOFLINE, QUALITY, REFERENCE = "probes.csv", "roofline.csv", "quality.csv", "reference.csv"
CELLS, CAUSES = "cells.csv", "causes.csv"

GENERATED = ("ok", "warmup")
STATUSES = (*GENERATED, "skipped", "oom", "failed", "crashed", "killed", "timeout")
HINT = "restore the file, or measure again"

RawRow = dict[str, str]


@dataclass(frozen=True)
class _File:
    """What a CSV file holds.

    Args:
        columns: all that this version writes.
        first: how many of them the first version wrote; a file that lacks one of these is broken.
        filled: columns that are never empty.
        choices: the words that a column may hold.
        check: what else must hold of its rows; raises BenchError.
    """

    columns: tuple[str, ...]
    first: int
    filled: tuple[str, ...]
    choices: Mapping[str, Collection[str]] = field(default_factory=dict)
    check: Callable[[Table], None] = lambda table: None


# Columns that hold words. All others hold a number, or nothing.
_WORDS = frozenset(
    {
        "cell_id", "model", "engine", "quantization", "attention", "cache", "load_mode", "kernels",
        "kv_dtype", "speculate", "status", "reason", "verdict", "gap_causes", "slow_run_causes",
        "stop_reason", "level", "bottleneck", "throttle_reasons", "text_sha256", "ran_attention",
        "ran_quantization", "ran_cache", "ran_kernels", "ran_kv_dtype", "ran_speculate", "event",
        "sampler", "scope", "cause", "evidence", "sample", "expected", "answer", "gpu_index",
        "condition", "observation", "value",
    }
)  # fmt: skip
# Counts, which are read as whole numbers.
_WHOLE = frozenset(
    {
        "run", "process", "token_index", "token_id", "tokens", "pair", "num_new_tokens", "exact",
        "positions", "passage", "position",
    }
)  # fmt: skip
# What others are divided by.
_ABOVE_ZERO = re.compile(r"decode_tok_per_s(_median|_min|_max)?|itl_probe_(on|off)_ms")
# Numbers that may lie below zero; prefill_s did in earlier versions (`_join_phases`).
_SIGNED = re.compile(
    r"prefill_s|temperature_c|log_prob|speculation_gain|overhead|level_change_percent"
)
# No time, rate or count lies outside; what does, overflows in a quotient.
_LEAST, _MOST = 1e-12, 1e18


def _check_runs(table: Table) -> None:
    seen: set[tuple[str, str]] = set()
    for place, row in enumerate(table.rows):
        if row["prefill_s"].startswith("-"):
            _join_phases(table, place, row)
        if row["status"] not in GENERATED:
            continue
        for name in ("run", "num_new_tokens"):
            if not row[name]:
                _refuse(table, place, name, "is empty")
        key = row["cell_id"], row["run"]
        if row["status"] == "ok" and key in seen:
            _refuse(table, place, "run", f"is a second run {row['run']} of cell {row['cell_id']}")
        seen.add(key)


def _join_phases(table: Table, place: int, row: RawRow) -> None:
    """Put right a prefill below zero, as earlier versions wrote it where the tower ran each step.

    They took all its runs off the first step's time. That time is known, its parts are not.
    """
    first_step_s = float(row["vision_encode_s"] or 0) + float(row["prefill_s"])
    if first_step_s <= 0:
        _refuse(table, place, "prefill_s", f"{row['prefill_s']} is not a number from 0")
    row["vision_encode_s"], row["prefill_s"] = "", repr(round(first_step_s, 9))


def _check_tokens(table: Table) -> None:
    """The tokens of a run stand together, in order from 0; a warm-up may come several times."""
    key, index, before = ("", ""), -1, 0.0
    for place, row in enumerate(table.rows):
        this, at, time = (row["cell_id"], row["run"]), int(row["token_index"]), float(row["t_s"])
        if at:
            if this != key or at != index + 1:
                _refuse(table, place, "token_index", f"{at} does not follow the token before")
            if not row["itl_ms"]:
                _refuse(table, place, "itl_ms", "is empty")
            if time < before:
                _refuse(table, place, "t_s", f"{row['t_s']} is earlier than the token before")
        elif row["itl_ms"]:
            _refuse(table, place, "itl_ms", "is not empty at the first token")
        key, index, before = this, at, time


def _check_quality(table: Table) -> None:
    for place, row in enumerate(table.rows):
        if row["mean_kl"] and int(row["positions"] or 0) == 0:
            _refuse(table, place, "positions", "is empty or 0 beside a mean_kl")


def _check_causes(table: Table) -> None:
    for place, row in enumerate(table.rows):
        for name in ("run", "t_s", "span_ms"):
            if row["scope"] != "cell" and not row[name]:
                _refuse(table, place, name, "is empty")


_FILES: Mapping[str, _File] = {
    RUNS: _File(columns.RUNS, 40, ("cell_id", "status"), {"status": STATUSES}, _check_runs),
    TOKENS: _File(columns.TOKENS, 7, ("cell_id", "run", "token_index", "t_s"), check=_check_tokens),
    GPU: _File(columns.GPU, 14, ("cell_id", "run", "t_s", "gpu_index")),
    HOST: _File(columns.HOST, 19, ("cell_id", "run", "t_s", "event", "span_ms")),
    PROBES: _File(
        columns.PROBES,
        6,
        ("cell_id", "run", "pair", "itl_probe_on_ms", "itl_probe_off_ms"),
        {"sampler": ("", "on", "off")},
    ),
    ROOFLINE: _File(columns.ROOFLINE, 11, ("cell_id",)),
    QUALITY: _File(columns.QUALITY, 9, ("cell_id",), check=_check_quality),
    REFERENCE: _File(columns.REFERENCE, 5, columns.REFERENCE),
    CELLS: _File(
        columns.CELLS,
        23,
        ("cell_id", "model", "status"),
        {"status": (*STATUSES, "unfinished")},
    ),
    CAUSES: _File(
        columns.CAUSES,
        11,
        ("cell_id", "scope", "lost_ms", "cause", "confidence"),
        {"cause": tuple(map(str, Cause)), "scope": SCOPES},
        _check_causes,
    ),
}


def read_file(folder: Path, name: str, cells: Collection[str] | None = None) -> list[RawRow]:
    """The rows of one of a campaign's CSV files, as strings; [] where there is none.

    Args:
        cells: the cells that there are; None = not known.

    Raises:
        BenchError: it is broken.
    """
    file = _FILES[name]
    table = read_table(folder / name)
    check_table(table, file.columns, file.first, file.filled, file.choices)
    if cells is not None and "cell_id" in file.columns:
        for place, row in enumerate(table.rows):
            if row["cell_id"] not in cells:
                _refuse(table, place, "cell_id", f"{row['cell_id']!r} is no cell of {PLAN}")
    file.check(table)
    return table.rows


def check_table(
    table: Table,
    known: Sequence[str],
    first: int,
    filled: Collection[str] = (),
    choices: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> None:
    """Check each field by its column's kind, and give rows the columns that they lack.

    Column by column, because a long campaign has millions of fields.

    Args:
        known: columns, of which the `first` must be there; `filled` and `choices` as in `_File`.

    Raises:
        BenchError: a column is missing, or a field holds what its column does not.
    """
    if not table.header:
        return
    for name in known[:first]:
        if name not in table.header:
            raise BenchError(f"{table.path} is broken: line 1 has no column {name}", HINT)
    lacking = dict.fromkeys((name for name in known if name not in table.header), "")
    for row in table.rows if lacking else ():
        row.update(lacking)
    for name in known:
        if name in lacking:
            continue
        values = [row[name] for row in table.rows]
        if name in filled and not all(values):
            _refuse(table, values.index(""), name, "is empty")
        if name in choices:
            allowed = choices[name]
            kind = f"one of {', '.join(filter(None, allowed))}"
            wrong = next((at for at, value in enumerate(values) if value not in allowed), None)
        else:
            holds = _kind_of(name)
            kind, all_hold = _KINDS[holds]
            if all_hold(values):
                continue
            wrong = next((at for at, value in enumerate(values) if not holds(value)), None)
        if wrong is not None:
            _refuse(table, wrong, name, f"{_shown(values[wrong])} is not {kind}")


def _is_word(text: str) -> bool:
    return True


def _is_whole(text: str) -> bool:
    return not text or (text.isascii() and text.isdigit() and len(text) <= 15)


def _is_amount(text: str) -> bool:
    if not text:
        return True
    try:
        value = float(text)
    except ValueError:
        return False
    return value == 0 or _LEAST <= value <= _MOST


def _is_above_zero(text: str) -> bool:
    return not text or (_is_amount(text) and float(text) > 0)


def _is_signed(text: str) -> bool:
    return text != "-" and _is_amount(text.removeprefix("-"))


def _are_whole(values: Sequence[str]) -> bool:
    text = "".join(values)
    return text.isascii() and text.isdigit() and max(map(len, values)) <= 15


def _are_amounts(values: Sequence[str]) -> bool:
    try:
        numbers = [float(value) for value in values if value]
    except ValueError:
        return False
    if not math.isfinite(sum(numbers)) or min(numbers, default=0.0) < 0:
        return False
    return max(numbers, default=0.0) <= _MOST and min(filter(None, numbers), default=1) >= _LEAST


# Whether a field is what its column holds -> what that is called, and whether all fields of a
# column surely are: several times as fast as one by one, and nearly always so.
_KINDS: Mapping[Callable[[str], bool], tuple[str, Callable[[Sequence[str]], bool]]] = {
    _is_word: ("a word", lambda values: True),
    _is_whole: ("a whole number from 0", _are_whole),
    _is_amount: ("a number from 0", _are_amounts),
    _is_above_zero: ("a number above 0", lambda values: False),
    _is_signed: ("a number", lambda values: False),
}


def _kind_of(name: str) -> Callable[[str], bool]:
    if name in _WORDS:
        return _is_word
    if name in _WHOLE:
        return _is_whole
    if _ABOVE_ZERO.fullmatch(name):
        return _is_above_zero
    return _is_signed if _SIGNED.search(name) else _is_amount


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _refuse(table: Table, place: int, column: str, why: str) -> NoReturn:
    """Raise a BenchError about a field of the row at `place`."""
    column = dict(zip(table.header, table.written, strict=True)).get(column, column)
    raise BenchError(
        f"{table.path} is broken: line {table.lines[place]}, column {column}: {why}", HINT
    )


def renamed_columns(*folders: Path) -> str | None:
    """One line on the columns that stand in these folders by their names of earlier versions."""
    found = {
        f"{old} ({columns.RENAMED[old]})"
        for folder in folders
        for path in folder.rglob("*.csv")
        for old in _header(path)
        if old in columns.RENAMED
    }
    return f"columns of an earlier version are read: {', '.join(sorted(found))}" if found else None


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline().strip().split(",")
    except OSError:  # whoever needs the file says so
        return []


class StoredCampaign:
    """The files of a finished, stopped or running campaign.

    Raises:
        BenchError: the folder holds none, or plan.json or environment.json is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = read_plan(folder)
        self.environment = read_environment(folder)
        self._cells = frozenset(cell["cell_id"] for cell in self.plan["cells"])

    def rows(self, name: str) -> list[RawRow]:
        """As `read_file`; every row belongs to a cell of the plan."""
        return read_file(self.folder, name, self._cells)


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
    raise ValueError(f"{name} is no JSON")


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
    return 0 <= value <= _MOST


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
                shown = _shown(json.dumps(value, ensure_ascii=False))[1:-1]
                raise BenchError(f"{path} is broken: {where}: {shown} is not {kind}", HINT)


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
