"""Tables beside the main one: how steady each cell was, and how near it came to the limits.

One list of columns serves the terminal, the Markdown and the HTML report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwencli.bench.attribution import whole_cell

CellRow = Mapping[str, Any]
Show = Callable[[CellRow], str]

NOTHING = "-"
# Percent of decode: less than this is as good as none.
LEAST_TAKEN = 0.1


@dataclass(frozen=True)
class Detail:
    """One column; a table leaves it out where no cell has anything in it."""

    head: str
    show: Show


@dataclass(frozen=True)
class DetailTable:
    title: str
    note: str
    columns: tuple[Detail, ...]

    def shown(self, rows: Sequence[CellRow]) -> list[Detail]:
        return [c for c in self.columns if any(c.show(row) != NOTHING for row in rows)]

    def rows(self, rows: Sequence[CellRow]) -> list[CellRow]:
        """Those with anything to show."""
        return [row for row in rows if any(c.show(row) != NOTHING for c in self.columns)]


def _figure(name: str, spec: str, scale: float = 1.0, unit: str = "") -> Show:
    def show(row: CellRow) -> str:
        value = row.get(name)
        return NOTHING if value is None else format(value * scale, spec) + unit

    return show


def _taken(name: str) -> Show:
    """A percentage that is worth a place."""
    show = _figure(name, ".1f")
    return lambda row: NOTHING if (row.get(name) or 0.0) < LEAST_TAKEN else show(row)


def _share(level: str) -> Show:
    return _figure(f"variance_{level}_percent", ".0f", unit=" %")


def _first(row: CellRow) -> str:
    found = [
        f"{name} {row[column]:.2f}x"
        for name, column in (("warm-up", "warm_up_ratio"), ("run 1", "first_run_ratio"))
        if row.get(column) is not None
    ]
    return ", ".join(found) or NOTHING


def _level(row: CellRow) -> str:
    change = row.get("level_change_percent")
    if change is not None:
        return f"{row['level']} {change:+.1f} %"
    return {"stationary": "level", None: NOTHING}.get(row.get("level"), NOTHING)


def _word(name: str) -> Show:
    return lambda row: str(row.get(name) or NOTHING)


STEADINESS = DetailTable(
    "How steady",
    "±: half the 95 % interval of the median, in percent of it; within, runs, procs.: where the "
    "variance of token times lies (within runs, between runs, between processes); first: first "
    "runs that differ from the rest, and by what; speed: over the runs of a process",
    (
        Detail("±", _figure("noise_percent", ".1f", unit=" %")),
        Detail("within", _share("within_run")),
        Detail("runs", _share("between_runs")),
        Detail("procs.", _share("between_processes")),
        Detail("first", _first),
        Detail("speed", _level),
        Detail("stopped by", _word("stop_reason")),
    ),
)
LIMITS = DetailTable(
    "How near the limits, and how right",
    "MBU: share of the read bandwidth measured here (GB/s); bound: what holds the cell (rule in "
    "docs/bench.md); exact: held-out captions that are exactly right; KL: mean divergence from "
    "the unquantized reference, in nats a token",
    (
        Detail("MB/token", _figure("bytes_per_token", ",.0f", 1e-6)),
        Detail("GB/s", _figure("read_bandwidth_bytes_per_s", ".0f", 1e-9)),
        Detail("MBU", _figure("mbu_percent", ".0f", unit=" %")),
        Detail("launches", _figure("launches_per_token", ".0f")),
        Detail("busy", _figure("gpu_busy_percent", ".0f", unit=" %")),
        Detail("bound", _word("bound")),
        Detail("exact", _figure("exact_match_percent", ".0f", unit=" %")),
        Detail("KL", _figure("mean_kl", ".2g")),
    ),
)
QUIET = DetailTable(
    "What the machine took, in percent of decode",
    "beyond the limit in brackets a figure is not to be quoted; waited: for a processor; core: to "
    "one slower than the campaign's quickest; others: other programs, of all processors",
    tuple(
        Detail(f"{limit.head} ({limit.percent:g})", _taken(limit.column))
        for limit in whole_cell.LIMITS
    ),
)
DETAILS = (STEADINESS, LIMITS, QUIET)
