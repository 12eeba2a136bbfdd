"""Inter-token latency in numbers, and which tokens are slow; knows neither pandas nor numpy.

One rule says which token is slow, whether it is counted (`stall_count`), marked in the report or
given a cause (`attribution.gaps`): it took at least

- FACTOR times the usual token, and
- SIGMAS robust standard deviations more than that, and
- LEAST_MS more than that.

The first condition is what a user notices, the second keeps a run that is restless all the time
from being all stalls, the third keeps timer noise of very short tokens out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qwencli.bench.statistics.robust import robust_sigma

FACTOR = 2.0
SIGMAS = 8.0
LEAST_MS = 1.5


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the closest ranks (numpy's default); None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100.0
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def run_latency(itl_ms: Sequence[float]) -> dict[str, float | int | None]:
    """The ITL columns of runs.csv; all None for fewer than two tokens."""
    return {
        "itl_p50_ms": percentile(itl_ms, 50),
        "itl_p99_ms": percentile(itl_ms, 99),
        "itl_max_ms": max(itl_ms, default=None),
        "stall_count": stall_count(itl_ms),
    }


def stall_count(itl_ms: Sequence[float]) -> int | None:
    """Tokens that are slow against the others of the run; None for no values."""
    if not itl_ms:
        return None
    limit = run_limit_ms(itl_ms)
    return sum(value >= limit for value in itl_ms)


def run_limit_ms(itl_ms: Sequence[float]) -> float:
    """From what time on a token of this run (not empty) is slow."""
    return slow_limit_ms(statistics.median(itl_ms), robust_sigma(itl_ms))


def slow_limit_ms(usual_ms: float, sigma_ms: float) -> float:
    """From what time on a token is slow, by the rule of this module."""
    return max(FACTOR * usual_ms, usual_ms + SIGMAS * sigma_ms, usual_ms + LEAST_MS)
