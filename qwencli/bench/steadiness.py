"""How steady one cell was: raw rows in; interval, first runs, steps and variance shares out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qwencli.bench.drift import FirstRun, Stationarity, first_run_effect, stationarity
from qwencli.bench.robust import Interval, mad, median_interval
from qwencli.bench.variance import VarianceShares, variance_shares

RawRow = Mapping[str, str]


@dataclass(frozen=True)
class Steadiness:
    """Of one cell; speeds are decode tokens per second of measured runs.

    `first_runs` and `stationarity` are of its longest process, because both are about the order of
    runs within one. `shares` are of inter-token latencies (ms) of all its processes.
    """

    cell_id: str
    processes: int
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
        [itl[cell_id, row["run"]] for row in process if _measured(row)] for process in processes
    ]
    return Steadiness(
        cell_id=cell_id,
        processes=len(processes),
        speed=median_interval(speeds),
        speed_mad=mad(speeds),
        first_runs=tuple(first_run_effect(_warm_up(longest), in_order)),
        stationarity=stationarity(in_order),
        shares=variance_shares(_without_empty(nested)),
    )


def _measured(row: RawRow) -> bool:
    return row["status"] == "ok" and bool(row["decode_tok_per_s"])


def _speeds(process: Iterable[RawRow]) -> list[float]:
    return [float(row["decode_tok_per_s"]) for row in process if _measured(row)]


def _warm_up(process: Sequence[RawRow]) -> float | None:
    first = process[0]
    text = first["decode_tok_per_s"] if first["status"] == "warmup" else ""
    return float(text) if text else None


def _without_empty(processes: Sequence[Sequence[Sequence[float]]]) -> list[list[Sequence[float]]]:
    kept = [[run for run in process if run] for process in processes]
    return [process for process in kept if process]
