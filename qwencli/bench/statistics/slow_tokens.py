"""Which tokens of a run are a gap.

The rule is that of `itl`, where usual is the median over the cell's runs of each run's median, and
the deviation likewise the median of the runs' MADs. Slow tokens with at most JOIN others between
them are one gap.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwencli.bench.statistics.itl import slow_limit_ms
from qwencli.bench.statistics.robust import robust_sigma

JOIN = 3


@dataclass(frozen=True)
class UsualToken:
    """`ms` between tokens, and above which time a token is slow."""

    ms: float
    limit_ms: float


@dataclass(frozen=True)
class Gap:
    """Tokens `first` to `last` of a run, both included, and how much longer they took (ms)."""

    first: int
    last: int
    lost_ms: float


def usual_token(runs: Iterable[Sequence[float]]) -> UsualToken | None:
    """Of a cell; None where no run has two tokens.

    Args:
        runs: inter-token latencies (ms) of each run.
    """
    known = [itl for itl in runs if itl]
    if not known:
        return None
    ms = statistics.median(statistics.median(itl) for itl in known)
    sigma = statistics.median(robust_sigma(itl) for itl in known)
    return UsualToken(ms, slow_limit_ms(ms, sigma))


def gaps(itl_ms: Sequence[float], usual: UsualToken) -> list[Gap]:
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
