"""Whether the runs of one process are draws from one level: first runs, drift, steps.

Numbers in, verdicts out; knows no columns.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

from qwencli.bench.statistics.changepoint import Step, absolute_residual, change_points
from qwencli.bench.statistics.robust import robust_sigma

ALPHA = 0.02
# Iglewicz and Hoaglin (1993), "How to Detect and Handle Outliers": |0.6745 (x - median) / MAD|
# above 3.5 is an outlier. For few runs the MAD is itself uncertain, hence the second condition.
OUTLIER_Z = 3.5
MIN_EFFECT = 0.01
# With five values even a perfect trend has p = 0.027 in the normal approximation.
MIN_RUNS = 6


@dataclass(frozen=True)
class Drift:
    """`slope` in units a run (Theil-Sen), `p_value` of Mann-Kendall's two-sided test."""

    slope: float
    p_value: float


@dataclass(frozen=True)
class FirstRun:
    """How run `run` compares with the rest: `ratio` to their median, and whether that counts."""

    run: int
    ratio: float
    differs: bool


Kind = Literal["stationary", "step", "drift", "too few runs"]


@dataclass(frozen=True)
class Stationarity:
    """`steps` is not empty for "step" alone; `drift` is None for "too few runs" alone."""

    kind: Kind
    steps: tuple[Step, ...] = ()
    drift: Drift | None = None


def theil_sen(values: Sequence[float]) -> float:
    """Median of the slopes between all pairs (Theil 1950; Sen 1968, JASA 63), units a run.

    Needs two values.
    """
    return statistics.median(
        (values[j] - values[i]) / (j - i) for i, j in combinations(range(len(values)), 2)
    )


def mann_kendall(values: Sequence[float]) -> float:
    """Two-sided p-value of no monotonic trend (Mann 1945; Kendall 1975, "Rank Correlation
    Methods"): normal approximation with the correction for ties and for continuity.

    1.0 where all values are equal. Good from about ten values on.
    """
    n = len(values)
    score = sum((b > a) - (b < a) for a, b in combinations(values, 2))
    ties = sum(t * (t - 1) * (2 * t + 5) for t in Counter(values).values())
    variance = (n * (n - 1) * (2 * n + 5) - ties) / 18
    if variance <= 0 or score == 0:
        return 1.0
    z = (abs(score) - 1) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def drift(values: Sequence[float]) -> Drift | None:
    """Slope and significance; None for fewer than MIN_RUNS values."""
    return Drift(theil_sen(values), mann_kendall(values)) if len(values) >= MIN_RUNS else None


def first_run_effect(warm_up: float | None, values: Sequence[float]) -> list[FirstRun]:
    """Run 0 (the warm-up) and run 1 against all later ones.

    A run differs when its robust z-score exceeds OUTLIER_Z and it is MIN_EFFECT or more away.

    Args:
        warm_up: of run 0; None where there is none.
        values: of runs 1, 2, ...; with fewer than four the answer is [].
    """
    if len(values) < 4:
        return []
    rest = values[1:]
    centre, sigma = statistics.median(rest), robust_sigma(rest)
    return [
        FirstRun(run, value / centre, _differs(value, centre, sigma))
        for run, value in ((0, warm_up), (1, values[0]))
        if value is not None and centre
    ]


def _differs(value: float, centre: float, sigma: float) -> bool:
    # sigma is 1.4826 MAD: the 0.6745 of the rule is in it.
    far = abs(value - centre)
    return far > OUTLIER_Z * sigma and far >= MIN_EFFECT * abs(centre)


def stationarity(values: Sequence[float], *, seed: int = 0) -> Stationarity:
    """Whether runs (warm-up left out) keep one level.

    A step makes ranks trend and a trend makes them step, so where either test speaks the model
    that leaves the smaller absolute residuals is named. A steady series is called anything else in
    at most 4 % of cases (two tests at 2 % each).
    """
    found = drift(values)
    if found is None:
        return Stationarity("too few runs")
    steps = tuple(change_points(values, seed=seed))
    drifts = found.p_value <= ALPHA
    if steps and (not drifts or _step_residual(values, steps) <= _drift_residual(values, found)):
        return Stationarity("step", steps, found)
    return Stationarity("drift" if drifts else "stationary", (), found)


def _step_residual(values: Sequence[float], steps: Sequence[Step]) -> float:
    edges = [0, *(step.index for step in steps), len(values)]
    return sum(absolute_residual(values[a:b]) for a, b in pairwise(edges))


def _drift_residual(values: Sequence[float], found: Drift) -> float:
    return absolute_residual([value - found.slope * run for run, value in enumerate(values)])
