"""Which phases of which runs were slow against the other runs of their cell.

The rule: the phase took longer than the median of the cell's runs by at least

- SIGMAS standard deviations, as the runs that were faster than the median show them (whatever
  disturbs a run makes it slower, so the slow side is not noise alone), a trend over the runs taken
  out first (it is what is to be found, not noise), and
- a share of the median (`PHASES`), and
- LEAST_MS.

Where a quarter of the decodes or more took RESTLESS_RATIO times as long as the quickest, the median
is of no level; the faster half stands for all then, and a decode is slow from RESTLESS_RATIO times
the median of that half on.

For marked runs (before which the model was loaded, or that waited for the device with every token)
LEAST_SHARE alone holds, where such runs are slower as a group than the others (rank-sum test at
ALPHA): each of them may be within the noise, and is slow all the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qwencli.bench.attribution.records import RESTLESS_RATIO, RunRecord, faster_half
from qwencli.bench.causes import Scope
from qwencli.bench.statistics.robust import MAD_TO_SIGMA
from qwencli.bench.statistics.stationarity import ALPHA, drift

MIN_RUNS = 4
SIGMAS = 3.5
LEAST_MS = 5.0
MIN_GROUP = 3
# Phase, column of runs.csv (s), least share. The first token's time also has the host's work on
# the prompt in it, which varies more.
LEAST_SHARE = 0.03
PHASES: tuple[tuple[Scope, str, float], ...] = (
    ("decode", "decode_s", LEAST_SHARE),
    ("prefill", "ttft_s", 0.10),
)


@dataclass(frozen=True)
class SlowPhase:
    """`lost_ms` longer than the cell's median run."""

    record: RunRecord
    scope: Scope
    lost_ms: float


def slow_phases(records: Sequence[RunRecord]) -> list[SlowPhase]:
    """The slow phases of the measured runs of one cell; [] for fewer than MIN_RUNS."""
    found = []
    for scope, column, least_share in PHASES:
        known = [record for record in records if column in record.figures]
        if len(known) < MIN_RUNS:
            continue
        times_ms = [1e3 * record.figures[column] for record in known]
        quick = faster_half(known, column) if scope == "decode" else known
        usual = statistics.median(1e3 * record.figures[column] for record in quick)
        if len(quick) < len(known):
            limit = max((RESTLESS_RATIO - 1) * usual, LEAST_MS)
        else:
            sigma = quiet_sigma(_without_trend(times_ms))
            limit = max(least_share * usual, LEAST_MS, SIGMAS * sigma)
        marked = _slow_marks(known, times_ms)
        for run, (record, time) in enumerate(zip(known, times_ms, strict=True)):
            explained = run in marked
            if time - usual >= (LEAST_SHARE * usual if explained else limit):
                found.append(SlowPhase(record, scope, time - usual))
    return found


def _slow_marks(records: Sequence[RunRecord], times_ms: Sequence[float]) -> set[int]:
    """Runs with a mark whose bearers are slower as a group."""
    found: set[int] = set()
    for mark in (_loaded, _synced):
        marked = {run for run, record in enumerate(records) if mark(record)}
        bearers = [times_ms[run] for run in marked]
        others = [time for run, time in enumerate(times_ms) if run not in marked]
        if greater_p(bearers, others) <= ALPHA:
            found |= marked
    return found


def _loaded(record: RunRecord) -> bool:
    return "load_s" in record.figures


def _synced(record: RunRecord) -> bool:
    decode = record.interval("decode")
    return decode is not None and decode.figures.get("syncs", 0.0) >= 0.5 * len(record.itl_ms) > 0


def greater_p(values: Sequence[float], others: Sequence[float]) -> float:
    """One-sided p-value of `values` being no larger than `others`: Wilcoxon's rank-sum test in the
    form of Mann and Whitney, by the normal approximation. 1.0 for fewer than MIN_GROUP of either.
    """
    if min(len(values), len(others)) < MIN_GROUP:
        return 1.0
    from scipy.stats import mannwhitneyu

    found = mannwhitneyu(values, others, alternative="greater", method="asymptotic")
    return float(found.pvalue)


def _without_trend(values: Sequence[float]) -> list[float]:
    found = drift(values)
    slope = found.slope if found and found.p_value <= ALPHA else 0.0
    return [value - slope * run for run, value in enumerate(values)]


def quiet_sigma(values: Sequence[float]) -> float:
    """The standard deviation as the values below the median show it, in their unit."""
    centre = statistics.median(values)
    below = [centre - value for value in values if value <= centre]
    return MAD_TO_SIGMA * statistics.median(below)
