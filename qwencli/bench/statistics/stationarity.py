"""Whether the runs of one process are draws from one level: first runs, drift, steps.

Numbers in, verdicts out; knows no columns.

Steps are found by binary segmentation (Vostrikova 1981) on ranks. The statistic of a split after k
of n values is Pettitt's (1979, "A non-parametric approach to the change-point problem", Applied
Statistics 28) U_k = 2 * (sum of the first k ranks) - k (n + 1), divided by sqrt(k (n - k)) so that
a step near an end weighs as much as one in the middle (James, James and Siegmund 1987). Its
distribution comes from permutations of the same ranks, so neither the noise's shape nor ties
matter. Ranks say that there is a step but not well where: it is put at the split of the values
themselves that leaves the smallest absolute residuals around the medians of the two sides.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Literal

from qwencli.bench.statistics.robust import robust_sigma

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


# The share of steady series in which a step is seen all the same.
# A single slow run is an outlier, not a level.
MIN_SEGMENT = 2
PERMUTATIONS = 1999
ALPHA = 0.02
# Iglewicz and Hoaglin (1993), "How to Detect and Handle Outliers": |0.6745 (x - median) / MAD|
# above 3.5 is an outlier. For few runs the MAD is itself uncertain, hence the second condition.
OUTLIER_Z = 3.5
MIN_EFFECT = 0.01
# With five values even a perfect trend has p = 0.027 in the normal approximation.
MIN_RUNS = 6


@dataclass(frozen=True)
class Step:
    """The level changed before the value at `index`.

    `ratio` is the median from there to the next step over the median of the stretch before (None
    where that is zero); `p_value` is of the permutation test within the stretch that it splits.
    """

    index: int
    ratio: float | None
    p_value: float


def change_points(values: Sequence[float], *, alpha: float = ALPHA, seed: int = 0) -> list[Step]:
    """All steps, in order; [] for a steady series.

    A series without a step gives any at all with probability `alpha` at the most: every further
    test is made only once the first has found one. With fewer than nine values no order of ranks
    is rare enough for the default `alpha`, so nothing can be found.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    found: dict[int, float] = {}
    open_stretches = [(0, len(values))]
    while open_stretches:
        start, end = open_stretches.pop()
        if end - start < 2 * MIN_SEGMENT:
            continue
        p_value = _p_value(_ranks(values[start:end]), rng)
        if p_value <= alpha:
            split = _best_split(values[start:end])
            found[start + split] = p_value
            open_stretches += [(start, start + split), (start + split, end)]
    if not found:
        return []
    edges = [0, *sorted(found), len(values)]
    levels = [statistics.median(values[a:b]) for a, b in pairwise(edges)]
    return [
        Step(index, after / before if before else None, found[index])
        for index, (before, after) in zip(sorted(found), pairwise(levels), strict=True)
    ]


def _ranks(values: Sequence[float]) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Array = (last - (counts - 1) / 2)[inverse]
    return mean_rank


def _p_value(ranks: Array, rng: np.random.Generator) -> float:
    """Chance of a split as good as the best one among equal levels.

    p = (1 + as large by chance) / (1 + permutations), which never understates the true one
    (Davison and Hinkley 1997, "Bootstrap Methods and their Application", 4.2.5).
    """
    import numpy as np

    observed = _statistics(ranks[np.newaxis]).max()
    shuffled = rng.permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1)
    by_chance = _statistics(shuffled).max(axis=1)
    # Sums of halves are exact, their quotients are not.
    as_large = int((by_chance >= observed * (1 - 1e-12)).sum())
    return (1 + as_large) / (1 + PERMUTATIONS)


def _best_split(values: Sequence[float]) -> int:
    splits = range(MIN_SEGMENT, len(values) - MIN_SEGMENT + 1)
    return min(splits, key=lambda k: absolute_residual(values[:k]) + absolute_residual(values[k:]))


def absolute_residual(values: Sequence[float]) -> float:
    """Sum of the distances from the median, in the unit of `values` (not empty)."""
    centre = statistics.median(values)
    return math.fsum(abs(value - centre) for value in values)


def _statistics(ranks: Array) -> Array:
    """|U_k| / sqrt(k (n - k)) for each row and each split that is allowed."""
    import numpy as np

    n = ranks.shape[1]
    k = np.arange(MIN_SEGMENT, n - MIN_SEGMENT + 1)
    first = np.cumsum(ranks, axis=1)[:, k - 1]
    scaled: Array = np.abs(2 * first - k * (n + 1)) / np.sqrt(k * (n - k))
    return scaled


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
