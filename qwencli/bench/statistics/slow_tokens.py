"""Inter-token latency in numbers: percentiles, which tokens are slow, and the gaps they make.

One rule says which token is slow, whether it is counted (`stall_count`), marked in the report or
given a cause (`gaps`): it took at least

- FACTOR times the usual token, and
- SIGMAS robust standard deviations more than that, and
- LEAST_MS more than that.

The first condition is what a user notices, the second keeps a run that is restless all the time
from being all stalls, the third keeps timer noise of very short tokens out. Usual is the median of
the run, or, for `gaps`, the median over the cell's runs of each run's median (the deviation
likewise). Slow tokens with at most JOIN others between them are one gap.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwencli.bench.statistics.robust import robust_sigma

FACTOR = 2.0
SIGMAS = 8.0
LEAST_MS = 1.5
JOIN = 3


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


@dataclass(frozen=True)
class TypicalToken:
    """`ms` between tokens, and above which time a token is slow."""

    ms: float
    limit_ms: float


@dataclass(frozen=True)
class Gap:
    """Tokens `first` to `last` of a run, both included, and how much longer they took (ms)."""

    first: int
    last: int
    lost_ms: float


def typical_token(runs: Iterable[Sequence[float]]) -> TypicalToken | None:
    """The usual token of a cell; None where no run has two tokens.

    Args:
        runs: inter-token latencies (ms) of each run.
    """
    known = [itl for itl in runs if itl]
    if not known:
        return None
    ms = statistics.median(statistics.median(itl) for itl in known)
    sigma = statistics.median(robust_sigma(itl) for itl in known)
    return TypicalToken(ms, slow_limit_ms(ms, sigma))


def gaps(itl_ms: Sequence[float], usual: TypicalToken) -> list[Gap]:
    """The gaps of one run, in order.

    Args:
        itl_ms: `itl_ms[i]` is the time between tokens i and i + 1.
    """
    found: list[list[int]] = []
    for index, itl in enumerate(itl_ms):
        if itl < usual.limit_ms:
            continue
        if found and index - found[-1][1] <= JOIN + 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return [
        Gap(first + 1, last + 1, sum(itl_ms[first : last + 1]) - (last + 1 - first) * usual.ms)
        for first, last in found
    ]
