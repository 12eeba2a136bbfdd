"""How far apart two sides are that took turns, by paired differences and their ranks.

Where processes of A and B alternate, neighbours in time met the same machine: each pair gives one
difference, and what both met is not in it. The estimate is the median of all means of two
differences (Hodges and Lehmann 1963, Annals of Mathematical Statistics 34), its interval that of
Wilcoxon's signed-rank test (Hollander, Wolfe and Chicken 2014, "Nonparametric Statistical Methods",
3.3): exact for differences that scatter evenly about their centre, however far some of them lie. A
few disturbed processes make it wider and do not move it.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

from qwencli.bench.statistics.robust import Interval

# With fewer pairs no interval has the confidence that SAME asks for.
MIN_PAIRS = 5


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float) -> Interval:
    """Of the ratio b / a; without end where so few pairs cannot have that confidence.

    Args:
        a, b: values above zero, as many of each, `a[i]` and `b[i]` neighbours in time.
    """
    shifts = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    means = sorted((shifts[i] + shifts[j]) / 2 for i in range(len(shifts)) for j in range(i + 1))
    outside = _outside(len(shifts), (1 - confidence) / 2)
    estimate = math.exp(statistics.median(means))
    if outside == 0:
        return Interval(estimate, 0.0, math.inf, confidence)
    return Interval(estimate, math.exp(means[outside - 1]), math.exp(means[-outside]), confidence)


@functools.cache
def _outside(pairs: int, tail: float) -> int:
    """Which of the ordered means, counted from either end, is the interval's end; 0 = none."""
    # ways[s]: subsets of the ranks 1 to `pairs` whose sum is s.
    ways = [1]
    for rank in range(1, pairs + 1):
        ways = [
            (ways[s] if s < len(ways) else 0) + (ways[s - rank] if s >= rank else 0)
            for s in range(len(ways) + rank)
        ]
    chance, found = 0.0, 0
    for count in ways:
        chance += count / 2**pairs
        if chance > tail:
            break
        found += 1
    return found
