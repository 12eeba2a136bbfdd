"""How steady one cell was: raw rows in; interval, first runs, steps and variance shares out.

The variance of token latencies is split into that within runs, between runs and between processes.
The model is a nested random-effects one, y_ijk = mu + process_i + run_ij + token_ijk. Variance
components come from the analysis of variance with unequal numbers (Searle, Casella and McCulloch
1992, "Variance Components", 3.6 and appendix F; worked in Sokal and Rohlf, "Biometry", 10.1-10.3).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qwencli.bench.statistics.robust import Interval, mad, median_interval
from qwencli.bench.statistics.stationarity import (
    MIN_EFFECT,
    FirstRun,
    Stationarity,
    first_run_effect,
    stationarity,
)

RawRow = Mapping[str, str]


@dataclass(frozen=True)
class VarianceShares:
    """Shares of the total variance, 0 to 1; those that are known sum to 1.

    None = the data cannot tell: one process shows nothing between processes (it is then left out
    of the total), one run a process nothing between runs.
    """

    within_run: float
    between_runs: float | None
    between_processes: float | None


@dataclass(frozen=True)
class Components:
    """Variances in the squared unit of the values; an estimate below zero is kept as it is."""

    within_run: float
    between_runs: float | None
    between_processes: float | None


def variance_components(processes: Sequence[Sequence[Sequence[float]]]) -> Components | None:
    """Variance of each level, by equating mean squares with their expectations.

    One process has no component between processes (None). One run a process has none between runs:
    what runs differ by is then part of what processes differ by. None where no run has two tokens.

    Args:
        processes: values of tokens by run by process, no list empty.
    """
    runs = [run for process in processes for run in process]
    tokens = [value for run in runs for value in run]
    p, r, n = len(processes), len(runs), len(tokens)
    if n == r:
        return None
    grand = statistics.fmean(tokens)
    process_means = [statistics.fmean([v for run in process for v in run]) for process in processes]
    sizes = [sum(map(len, process)) for process in processes]
    # Sum over processes of (sum of squared run sizes / process size).
    weight = sum(
        sum(len(run) ** 2 for run in process) / size
        for process, size in zip(processes, sizes, strict=True)
    )
    within = sum(_squares(run, statistics.fmean(run)) for run in runs) / (n - r)
    between_runs = None
    if r > p:
        mean_square = sum(
            len(run) * (statistics.fmean(run) - mean) ** 2
            for process, mean in zip(processes, process_means, strict=True)
            for run in process
        ) / (r - p)
        between_runs = (mean_square - within) * (r - p) / (n - weight)
    between_processes = None
    if p > 1:
        mean_square = sum(
            size * (mean - grand) ** 2 for size, mean in zip(sizes, process_means, strict=True)
        ) / (p - 1)
        run_factor = (weight - sum(len(run) ** 2 for run in runs) / n) / (p - 1)
        process_factor = (n - sum(size**2 for size in sizes) / n) / (p - 1)
        expected = within + run_factor * (between_runs or 0.0)
        between_processes = (mean_square - expected) / process_factor
    return Components(within, between_runs, between_processes)


def variance_shares(processes: Sequence[Sequence[Sequence[float]]]) -> VarianceShares | None:
    """Each level's share of the variance.

    An estimate below zero counts as none. None where nothing varies or no run has two tokens.
    With few processes or runs a share is rough: its own error falls with their number, not with
    the number of tokens.
    """
    found = variance_components(processes)
    if found is None:
        return None
    levels = (found.within_run, found.between_runs, found.between_processes)
    kept = [None if level is None else max(level, 0.0) for level in levels]
    total = sum(level for level in kept if level is not None)
    if total <= 0:
        return None
    within, runs, between = (None if level is None else level / total for level in kept)
    assert within is not None
    return VarianceShares(within, runs, between)


def _squares(values: Sequence[float], centre: float) -> float:
    return sum((value - centre) ** 2 for value in values)


@dataclass(frozen=True)
class Steadiness:
    """How steady one cell was; speeds are decode tokens per second of measured runs.

    `first_runs` and `stationarity` are of its longest process (of `longest` runs), because both
    are about the order of runs within one. `shares` are of inter-token latencies (ms) of all its
    processes.
    """

    cell_id: str
    processes: int
    longest: int
    median: float
    speed: Interval | None
    speed_mad: float
    first_runs: tuple[FirstRun, ...]
    stationarity: Stationarity
    shares: VarianceShares | None


def steadiness(runs: Iterable[RawRow], tokens: Iterable[RawRow]) -> list[Steadiness]:
    """One entry for each cell that has a measured run, in the order of the rows.

    Args:
        runs: rows of runs.csv in their order: each warm-up in it begins a process.
        tokens: rows of tokens.csv.
    """
    itl: dict[tuple[str, str], list[float]] = defaultdict(list)
    for token in tokens:
        if token["itl_ms"]:
            itl[token["cell_id"], token["run"]].append(float(token["itl_ms"]))
    return [
        _of_cell(cell_id, processes, itl)
        for cell_id, rows in _by_cell(runs).items()
        if (processes := [p for p in by_process(rows) if _speeds(p)])
    ]


def level_change(found: Steadiness) -> str | None:
    """What the speed did in the course of the longest process, where that is MIN_EFFECT or more."""
    moved = found.stationarity
    if abs(_change(found)) < MIN_EFFECT:
        return None
    if moved.kind == "step":
        largest = max(moved.steps, key=lambda step: abs((step.ratio or 1.0) - 1.0))
        return f"speed stepped by {_change(found):+.1%} at run {largest.index + 1}"
    return f"speed drifted by {_change(found):+.1%} over {found.longest} runs"


def _change(found: Steadiness) -> float:
    """The largest step, or the drift from the first run to the last, as a share of the speed."""
    moved = found.stationarity
    if moved.kind == "step":
        return max(((step.ratio or 1.0) - 1.0 for step in moved.steps), key=abs)
    if moved.kind == "drift" and moved.drift is not None and found.median:
        return moved.drift.slope * (found.longest - 1) / found.median
    return 0.0


def steadiness_columns(found: Steadiness | None) -> dict[str, float | str | None]:
    """The columns of cells.csv; all None without a measured run."""
    shares = found.shares if found else None
    speed = found.speed if found else None
    first = {run.run: run.ratio for run in found.first_runs if run.differs} if found else {}
    moved = found and found.stationarity.kind in ("step", "drift")
    return {
        "decode_tok_per_s_low": speed.low if speed else None,
        "decode_tok_per_s_high": speed.high if speed else None,
        "decode_tok_per_s_mad": found.speed_mad if found else None,
        "warm_up_ratio": first.get(0),
        "first_run_ratio": first.get(1),
        "level": found.stationarity.kind if found else None,
        "level_change_percent": 100 * _change(found) if found and moved else None,
        "variance_within_run_percent": _percent(shares.within_run if shares else None),
        "variance_between_runs_percent": _percent(shares.between_runs if shares else None),
        "variance_between_processes_percent": _percent(
            shares.between_processes if shares else None
        ),
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def by_process(rows: Iterable[RawRow]) -> list[list[RawRow]]:
    """The rows of one cell, cut before each warm-up: a resumed cell has several processes."""
    processes: list[list[RawRow]] = []
    for row in rows:
        if row["status"] == "warmup" or not processes:
            processes.append([])
        processes[-1].append(row)
    return processes


def _by_cell(runs: Iterable[RawRow]) -> dict[str, list[RawRow]]:
    cells: dict[str, list[RawRow]] = defaultdict(list)
    for row in runs:
        cells[row["cell_id"]].append(row)
    return cells


def _of_cell(
    cell_id: str,
    processes: Sequence[Sequence[RawRow]],
    itl: Mapping[tuple[str, str], Sequence[float]],
) -> Steadiness:
    speeds = [speed for process in processes for speed in _speeds(process)]
    longest = max(processes, key=lambda process: len(_speeds(process)))
    in_order = _speeds(longest)
    nested = [
        [itl[cell_id, row["run"]] for row in process if has_speed(row)] for process in processes
    ]
    return Steadiness(
        cell_id=cell_id,
        processes=len(processes),
        longest=len(in_order),
        median=statistics.median(speeds),
        speed=median_interval(speeds),
        speed_mad=mad(speeds),
        first_runs=tuple(first_run_effect(_warm_up(longest), in_order)),
        stationarity=stationarity(in_order),
        shares=variance_shares(_without_empty(nested)),
    )


def has_speed(row: RawRow) -> bool:
    """Whether it is a measured run that has a decode speed; a warm-up has none that counts."""
    return row["status"] == "ok" and bool(row["decode_tok_per_s"])


def _speeds(process: Iterable[RawRow]) -> list[float]:
    return [float(row["decode_tok_per_s"]) for row in process if has_speed(row)]


def _warm_up(process: Sequence[RawRow]) -> float | None:
    first = process[0]
    text = first["decode_tok_per_s"] if first["status"] == "warmup" else ""
    return float(text) if text else None


def _without_empty(processes: Sequence[Sequence[Sequence[float]]]) -> list[list[Sequence[float]]]:
    kept = [[run for run in process if run] for process in processes]
    return [process for process in kept if process]
