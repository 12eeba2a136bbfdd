"""From raw rows to one row a cell: pure functions over what the CSV files hold.

Nothing here is stored that the raw rows do not give again: cells.csv can always be rebuilt.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from qwencli.bench.attribution import whole_cell
from qwencli.bench.attribution.records import records_by_cell
from qwencli.bench.attribution.whole_cell import UNKNOWN_MACHINE, Machine
from qwencli.bench.measure.quality import quality_columns
from qwencli.bench.measure.roofline import (
    roofline_columns,
    with_best_limits,
)
from qwencli.bench.plan.matrix import AXES, NEWER_AXES
from qwencli.bench.plan.stopping import (
    Progress,
    StopReason,
    StopRule,
    noise_percent,
    progress_of,
    rule_of,
    stop_reason,
)
from qwencli.bench.report.steadiness import Steadiness, level_change, steadiness, steadiness_columns
from qwencli.bench.statistics.robust import is_unstable, run_ratio
from qwencli.bench.statistics.slow_tokens import percentile
from qwencli.config import EngineName, Speculate

# How verdicts begin whose figure is not to be quoted, although its runs did equal work.
NOT_QUOTABLE, UNSTABLE = "not quotable", "unstable"

RawRow = Mapping[str, str]
CellRow = dict[str, Any]
Row = TypeVar("Row", bound=Mapping[str, Any])

# The modes whose requested and reported names are the same words.
_SAME_NAMES = (("attention", "ran_attention"), ("cache", "ran_cache"))


@dataclass(frozen=True)
class CellData:
    """All raw rows of one cell; `stop` is the number of runs asked for, `disturbed` what
    `whole_cell` measured of it."""

    axes: Mapping[str, str]
    stop: StopRule
    rows: Sequence[RawRow]
    itl_ms: Sequence[float]
    roofline: RawRow | None = None
    steady: Steadiness | None = None
    quality: Sequence[RawRow] = ()
    as_origin: bool = False
    disturbed: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def measured(self) -> list[RawRow]:
        return [row for row in self.rows if row["status"] == "ok"]

    @property
    def generated(self) -> list[RawRow]:
        """Measured runs and warm-ups."""
        return [row for row in self.rows if row["status"] in ("ok", "warmup")]

    @cached_property
    def progress(self) -> Progress:
        return progress_of(self.rows)

    @cached_property
    def stopped(self) -> StopReason | None:
        return stop_reason(self.stop, self.progress)

    def numbers(self, column: str) -> list[float]:
        # Campaigns from before a column existed lack it.
        return [float(row[column]) for row in self.measured if row.get(column)]


@dataclass(frozen=True)
class CellRows:
    """All rows of one cell; `steady` is None where nothing was measured, `causes` is empty where
    nothing was slow or a campaign has no causes.csv."""

    cell: RawRow
    runs: Sequence[RawRow]
    tokens: Sequence[RawRow]
    gpu: Sequence[RawRow]
    steady: Steadiness | None
    causes: Sequence[RawRow] = ()

    @property
    def measured(self) -> list[RawRow]:
        return [row for row in self.runs if row["status"] == "ok"]

    def numbers(self, column: str) -> list[float]:
        """A column's figures in the measured runs; runs without one are left out."""
        return [float(row[column]) for row in self.measured if row.get(column)]

    def median(self, column: str) -> float | None:
        found = self.numbers(column)
        return statistics.median(found) if found else None


def measurable(rows: Sequence[Row]) -> list[Row]:
    """What tables show: cells that can run here. `tables.remarks` counts the others by reason."""
    return [row for row in rows if row["status"] != "skipped"]


def cell_rows(
    plan: Mapping[str, Any],
    runs: Sequence[RawRow],
    tokens: Sequence[RawRow],
    roofline: Iterable[RawRow] = (),
    quality: Iterable[RawRow] = (),
    host: Iterable[RawRow] = (),
    gpu: Iterable[RawRow] = (),
    machine: Machine = UNKNOWN_MACHINE,
) -> list[CellRow]:
    """One row for each cell of the plan (its `plan.json`), in the plan's order.

    Args:
        runs, tokens, roofline, quality, host, gpu: rows of the files of these names.

    Raises:
        BenchError: a raw row holds something else than a number where one belongs.
    """
    by_cell: dict[str, list[RawRow]] = defaultdict(list)
    for row in runs:
        by_cell[row["cell_id"]].append(row)
    measured = {
        (row["cell_id"], row["run"])
        for rows in by_cell.values()
        for row in rows
        if row["status"] == "ok"
    }
    itl: dict[str, list[float]] = defaultdict(list)
    for token in tokens:
        if token["itl_ms"] and (token["cell_id"], token["run"]) in measured:
            itl[token["cell_id"]].append(float(token["itl_ms"]))
    stop = rule_of(plan)
    limits = with_best_limits(roofline)
    answers: dict[str, list[RawRow]] = defaultdict(list)
    for row in quality:
        answers[row["cell_id"]].append(row)
    steady = {found.cell_id: found for found in steadiness(runs, tokens)}
    busy = {
        cell_id: roofline_columns(row, None, percentile(itl[cell_id], 50))["gpu_busy_percent"]
        for cell_id, row in limits.items()
    }
    records = records_by_cell(runs, (), host, gpu)
    disturbed = whole_cell.percentages(records, busy, machine)
    return [
        _cell_row(
            CellData(
                cell,
                stop,
                by_cell[cell_id],
                itl[cell_id],
                limits.get(cell_id),
                steady.get(cell_id),
                answers[cell_id],
                bool(plan.get("as_origin")),
                disturbed.get(cell_id, {}),
            )
        )
        # Campaigns from before an axis existed ran its default.
        for cell in ({**NEWER_AXES, **cell} for cell in plan["cells"])
        if (cell_id := cell["cell_id"])
    ]


def _cell_row(data: CellData) -> CellRow:
    status, reason = _status(data)
    speeds = data.numbers("decode_tok_per_s")
    ttft = data.numbers("ttft_s")
    median = _median(speeds)
    itl_p50_ms = percentile(data.itl_ms, 50)
    return {
        **{key: data.axes[key] for key in ("cell_id", *AXES) if key in data.axes},
        "status": status,
        "reason": reason,
        "runs": len(data.measured),
        "decode_tok_per_s_median": median,
        "decode_tok_per_s_min": min(speeds, default=None),
        "decode_tok_per_s_max": max(speeds, default=None),
        "run_ratio_max_min": run_ratio(speeds),
        "ttft_s_median": _median(ttft),
        "itl_p50_ms": itl_p50_ms,
        "itl_p90_ms": percentile(data.itl_ms, 90),
        "itl_p99_ms": percentile(data.itl_ms, 99),
        "itl_max_ms": max(data.itl_ms, default=None),
        "peak_allocated_bytes": max(map(int, data.numbers("peak_allocated_bytes")), default=None),
        "verdict": verdict(data),
        "processes": sum(runs > 0 for runs in data.progress.process_runs),
        "stop_reason": data.stopped,
        "noise_percent": noise_percent(speeds),
        "accept_percent_median": _median(data.numbers("accept_percent")),
        "speculation_gain_median": _median(data.numbers("speculation_gain")),
        "main_thread_cpu_percent_min": min(data.numbers("main_thread_cpu_percent"), default=None),
        **{column: data.disturbed.get(column) for column in whole_cell.COLUMNS},
        **(_origin_columns(data) if data.as_origin else {}),
        **steadiness_columns(data.steady),
        **quality_columns(data.quality),
        # Tokens of one step share its reading of the weights, so their rate says nothing of that.
        **(
            roofline_columns(data.roofline, median, itl_p50_ms)
            if data.axes["speculate"] == Speculate.OFF
            else roofline_columns(data.roofline, None, None)
        ),
    }


def generate_s(row: RawRow) -> float | None:
    """How long the whole `generate()` took in which a run's answer was made: all but the image
    processor, as the origin counted; None for a run without an answer."""
    if not row.get("e2e_s"):
        return None
    return float(row["e2e_s"]) - float(row["preprocess_s"] or 0.0) or None


def _origin_columns(data: CellData) -> CellRow:
    took = [(row, s) for row in data.measured if (s := generate_s(row))]
    speeds = [int(row["num_new_tokens"]) / s for row, s in took]
    return {
        "generate_tok_per_s_median": _median(speeds),
        "generate_tok_per_s_min": min(speeds, default=None),
        "generate_tok_per_s_max": max(speeds, default=None),
        "generate_s_median": _median([s for _, s in took]),
        "num_new_tokens_median": _median(data.numbers("num_new_tokens")),
        "load_s_median": _median(
            [float(row["load_s"]) for row in data.generated if row.get("load_s")]
        ),
        "stall_count_median": _median(data.numbers("stall_count")),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _status(data: CellData) -> tuple[str, str | None]:
    for row in data.rows:
        if row["status"] not in ("ok", "warmup"):
            return row["status"], row["reason"]
    if data.stopped is None:
        return "unfinished", "the campaign was interrupted; --resume goes on"
    return "ok", None


def _text_changed(data: CellData) -> str | None:
    if len({row["text_sha256"] for row in data.generated}) > 1:
        return "FAIL: text changed between greedy runs"
    return None


def _unequal_work(data: CellData) -> str | None:
    counts = sorted({int(row["num_new_tokens"]) for row in data.generated})
    return f"FAIL: unequal work ({counts[0]} to {counts[-1]} tokens)" if len(counts) > 1 else None


def _other_mode_ran(data: CellData) -> str | None:
    if data.axes["engine"] == EngineName.REMOTE:
        return None  # its modes are its own affair
    for asked, ran in _SAME_NAMES:
        others = {row[ran] for row in data.generated} - {data.axes[asked]}
        if others and data.axes[asked] != "auto":
            return f"FAIL: {asked} {min(others)} ran, not {data.axes[asked]}"
    return None


def _disturbed(data: CellData) -> str | None:
    over = whole_cell.over_limits(data.disturbed)
    return f"{NOT_QUOTABLE}: {over[0].words}" if over else None


def _unstable(data: CellData) -> str | None:
    ratio = run_ratio(data.numbers("decode_tok_per_s"))
    return f"{UNSTABLE}: runs differ {ratio:.2f}x" if is_unstable(ratio) else None


def _moved(data: CellData) -> str | None:
    moved = level_change(data.steady) if data.steady else None
    return f"{UNSTABLE}: {moved}" if moved else None


def _incomplete(data: CellData) -> str | None:
    if data.stopped is not None:
        return None
    return f"incomplete: {len(data.measured)} of {data.stop.min_runs} runs"


# In order of weight: the first that has something to say is the verdict.
VERDICTS: tuple[Callable[[CellData], str | None], ...] = (
    _text_changed,
    _unequal_work,
    _other_mode_ran,
    _disturbed,
    _unstable,
    _moved,
    _incomplete,
)


def verdict(data: CellData) -> str | None:
    """Whether the cell's figures can be quoted; None when there are none."""
    if not data.measured:
        return None
    return next((said for rule in VERDICTS if (said := rule(data))), "ok")
