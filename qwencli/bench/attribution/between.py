"""Which phases of which runs were slow against the other runs of their cell.

The rule: the phase took longer than the median of the cell's runs by at least

- SIGMAS standard deviations, as the runs that were faster than the median show them (whatever
  disturbs a run makes it slower, so the slow side is not noise alone), a trend over the runs taken
  out first (it is what is to be found, not noise), and
- a share of the median (LEAST_SHARE), and
- LEAST_MS.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qwencli.bench.attribution.causes import Scope
from qwencli.bench.attribution.records import RunRecord
from qwencli.bench.drift import ALPHA, drift
from qwencli.bench.robust import MAD_TO_SIGMA

MIN_RUNS = 4
SIGMAS = 3.5
LEAST_MS = 5.0
# Phase, column of runs.csv (s), least share. The first token's time also has the host's work on
# the prompt in it, which varies more.
PHASES: tuple[tuple[Scope, str, float], ...] = (
    ("decode", "decode_s", 0.03),
    ("prefill", "ttft_s", 0.10),
)


@dataclass(frozen=True)
class SlowPhase:
    """`lost_ms` longer than the cell's median run."""

    record: RunRecord
    scope: Scope
    lost_ms: float


def slow_phases(records: Sequence[RunRecord]) -> list[SlowPhase]:
    """Of the measured runs of one cell; [] for fewer than MIN_RUNS."""
    found = []
    for scope, column, least_share in PHASES:
        known = [record for record in records if column in record.figures]
        if len(known) < MIN_RUNS:
            continue
        times_ms = [1e3 * record.figures[column] for record in known]
        usual = statistics.median(times_ms)
        sigma = quiet_sigma(_without_trend(times_ms))
        limit = usual + max(SIGMAS * sigma, least_share * usual, LEAST_MS)
        found += [
            SlowPhase(record, scope, time - usual)
            for record, time in zip(known, times_ms, strict=True)
            if time >= limit
        ]
    return found


def _without_trend(values: Sequence[float]) -> list[float]:
    found = drift(values)
    slope = found.slope if found and found.p_value <= ALPHA else 0.0
    return [value - slope * run for run, value in enumerate(values)]


def quiet_sigma(values: Sequence[float]) -> float:
    """The standard deviation as the values below the median show it, in their unit."""
    centre = statistics.median(values)
    below = [centre - value for value in values if value <= centre]
    return MAD_TO_SIGMA * statistics.median(below)
