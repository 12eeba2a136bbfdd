"""Inter-token latency of one run in numbers; knows neither pandas nor numpy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# A token this many times slower than the run's median is a stall. The origin's runs had 12 to
# 62 of them; a steady run has none.
STALL_FACTOR = 3.0


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
    """Tokens that took more than STALL_FACTOR times the median; None for no values."""
    if not itl_ms:
        return None
    limit = STALL_FACTOR * statistics.median(itl_ms)
    return sum(value > limit for value in itl_ms)
