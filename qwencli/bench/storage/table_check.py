"""What a column of a CSV file may hold, and checking a table that was read against it.

What is wrong is named with its file, line and column. Columns of newer versions are passed on
unread; columns that came after a file was written are empty in its rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from qwencli.bench.storage.row_file import Table
from qwencli.errors import BenchError

HINT = "restore the file, or measure again"

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
# Numbers that may lie below zero; prefill_s did in earlier versions (`campaign_files`).
_SIGNED = re.compile(
    r"prefill_s|temperature_c|log_prob|speculation_gain|overhead|level_change_percent"
)
# No time, rate or count lies outside; what does, overflows in a quotient.
_LEAST, MOST = 1e-12, 1e18


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
        known: columns, of which the `first` must be there; those of `filled` are never
            empty.
        choices: the words that a column may hold.

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
            refuse(table, values.index(""), name, "is empty")
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
            refuse(table, wrong, name, f"{quoted(values[wrong])} is not {kind}")


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
    return value == 0 or _LEAST <= value <= MOST


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
    return max(numbers, default=0.0) <= MOST and min(filter(None, numbers), default=1) >= _LEAST


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


def quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def refuse(table: Table, place: int, column: str, why: str) -> NoReturn:
    """Raise a BenchError about a field of the row at `place`."""
    column = dict(zip(table.header, table.written, strict=True)).get(column, column)
    raise BenchError(
        f"{table.path} is broken: line {table.lines[place]}, column {column}: {why}", HINT
    )
