"""Location, spread and intervals that a few bad runs cannot spoil.

Knows no columns and no campaigns: numbers in, numbers out. Percentiles are in `slow_tokens`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Medians = NDArray[np.float64]

Statistic = Literal["median", "spread"]

# Makes the MAD of normal values an estimate of their standard deviation: 1 / Phi^-1(3/4)
# (Rousseeuw and Croux 1993, "Alternatives to the median absolute deviation", JASA 88).
MAD_TO_SIGMA = 1.482602218505602

CONFIDENCE = 0.95
RESAMPLES = 4000
# With two values the bootstrap knows three medians: that is no interval.
MIN_RUNS = 3
# Identical runs that differ by more than this in decode speed are not a measurement to quote.
UNSTABLE_RATIO = 1.1


def is_unstable(ratio: float | None) -> bool:
    """Whether the fastest over the slowest run is beyond UNSTABLE_RATIO, as two decimals show it:
    1.10 is one thing wherever it stands."""
    return ratio is not None and round(ratio, 2) > UNSTABLE_RATIO


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the true value with probability `confidence`."""

    estimate: float
    low: float
    high: float
    confidence: float = CONFIDENCE


def mad(values: Sequence[float]) -> float:
    """Median absolute deviation from the median, unscaled, in the unit of `values` (not empty)."""
    centre = statistics.median(values)
    return statistics.median(abs(value - centre) for value in values)


def robust_sigma(values: Sequence[float]) -> float:
    """The standard deviation as the MAD sees it, in the unit of `values` (not empty)."""
    return MAD_TO_SIGMA * mad(values)


def median_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval | None:
    """Interval of the median of independent runs; None for fewer than three values.

    Percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", 13.3).
    Not BCa: its acceleration comes from the jackknife, which fails for the median (Efron 1979,
    "Bootstrap methods", section 3). It can reach no further than the smallest and the largest
    value, which hold the median with probability 1 - 2^(1-n): 75 % for 3 runs, 94 % for 5.
    """
    if len(values) < MIN_RUNS:
        return None
    return _interval(statistics.median(values), _resampled(values, "median", seed, 0), confidence)


def ratio_interval(
    base: Sequence[float],
    other: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    statistic: Statistic = "median",
) -> Interval | None:
    """Interval of median(other) / median(base), resampled independently, or of their spreads.

    None where either has fewer than three values or a value that is not above zero. Percentile
    bootstrap as in `median_interval`; for 3 runs against 3 it covers 90 % at the most, whatever
    `confidence` asks for (the chance that all of one side lie above all of the other is 2 in 20).
    Runs are the unit: tokens of one run are not independent of each other. What differs between
    processes but not between the runs of one is not in it.
    """
    if min(len(base), len(other)) < MIN_RUNS or min(*base, *other) <= 0:
        return None
    below, above = (_resampled(side, statistic, seed, n) for n, side in enumerate((base, other)))
    estimate = describe(other, statistic) / describe(base, statistic)
    return _interval(estimate, above / below, confidence)


def spread_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval | None:
    """Interval of the largest over the smallest of values above zero; None for fewer than three.

    Percentile bootstrap. A resample never reaches beyond the sample, so the interval ends at the
    spread that was seen: it bounds from below how far runs can differ, never from above.
    """
    if len(values) < MIN_RUNS or min(values) <= 0:
        return None
    return _interval(describe(values, "spread"), _resampled(values, "spread", seed, 0), confidence)


def describe(values: Sequence[float], statistic: Statistic) -> float:
    """The median, or the largest over the smallest (of values above zero)."""
    return statistics.median(values) if statistic == "median" else max(values) / min(values)


def _resampled(values: Sequence[float], statistic: Statistic, seed: int, stream: int) -> Medians:
    import numpy as np

    # [RESAMPLES, n]; the stream keeps the two sides of a ratio independent.
    rng = np.random.default_rng([seed, stream])
    picks = rng.integers(0, len(values), size=(RESAMPLES, len(values)))
    samples = np.asarray(values, dtype=float)[picks]
    if statistic == "spread":
        spreads: Medians = samples.max(axis=1) / samples.min(axis=1)
        return spreads
    medians: Medians = np.median(samples, axis=1)
    return medians


def _interval(estimate: float, resampled: Medians, confidence: float) -> Interval:
    import numpy as np

    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), confidence)


def run_ratio(speeds: Sequence[float]) -> float | None:
    """Fastest over slowest run; None for fewer than two runs."""
    return max(speeds) / min(speeds) if len(speeds) > 1 and min(speeds) > 0 else None
