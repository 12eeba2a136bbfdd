"""Steps in a series of runs: where the level changed, and how surely.

Binary segmentation (Vostrikova 1981) on ranks. The statistic of a split after k of n values is
Pettitt's (1979, "A non-parametric approach to the change-point problem", Applied Statistics 28)
U_k = 2 * (sum of the first k ranks) - k (n + 1), divided by sqrt(k (n - k)) so that a step near an
end weighs as much as one in the middle (James, James and Siegmund 1987). Its distribution comes
from permutations of the same ranks, so neither the noise's shape nor ties matter. Ranks say that
there is a step but not well where: it is put at the split of the values themselves that leaves the
smallest absolute residuals around the medians of the two sides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# The share of steady series in which a step is seen all the same.
ALPHA = 0.02
# A single slow run is an outlier, not a level.
MIN_SEGMENT = 2
PERMUTATIONS = 1999


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
