"""Where the variance of token latencies comes from: within runs, between runs, between processes.

The model is a nested random-effects one, y_ijk = mu + process_i + run_ij + token_ijk. Variance
components come from the analysis of variance with unequal numbers (Searle, Casella and McCulloch
1992, "Variance Components", 3.6 and appendix F; worked in Sokal and Rohlf, "Biometry", 10.1-10.3).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


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
