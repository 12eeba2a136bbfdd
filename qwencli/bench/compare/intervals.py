"""How far apart two sides of one cell are, and how well that is known: numbers in, intervals out.

**The process is the unit.** The runs of a process share its memory layout, its choice of kernels
and the stretch of time it lived in; they are repeats, not independent trials, and an interval over
them is too narrow by whatever processes differ by (pseudoreplication: Hurlbert 1984, Ecological
Monographs 54; for program timings Kalibera and Jones 2013, "Rigorous benchmarking in reasonable
time", ISMM; Mytkowicz et al. 2009, "Producing wrong data without doing anything obviously wrong!",
ASPLOS). So each process gives one value, the log of its median speed; the sides differ by the
difference of their means, with Student's t over the scatter of processes within the sides.

**What few processes cannot show is taken from campaigns that had several** (KNOWN, UNKNOWN), as a
variance with degrees of freedom of its own, pooled with what was seen: the moderated t of Smyth
2004, Stat. Appl. Genet. Mol. Biol. 3. One process a side rests on it alone.

- KNOWN counts on a GPU whose runs scatter by QUIET or less, as they did where it was measured, and
  as long as the cell's own processes do not contradict it.
- Otherwise the cell's own processes are all there is to call something the same, and UNKNOWN where
  there is one a side. A change needs more: few processes may be alike by chance, above all where
  processes come in two kinds, as on busy CPUs. Until ENOUGH degrees of freedom the change must hold
  with UNKNOWN pooled in as well.

A change must also be larger than what the processes of either side differ by among themselves. A
slow drift of the machine, which the first campaign and then the second go through, grows with their
number as this does; the t interval, which shrinks with it, would take it for a change.

**Sides that took turns** are told apart by their pairs (`paired_interval`). Where processes of A
and B alternate, neighbours in time met the same machine: each pair gives one difference, and what
both met is not in it. The estimate is the median of all means of two differences (Hodges and
Lehmann 1963, Annals of Mathematical Statistics 34), its interval that of Wilcoxon's signed-rank
test (Hollander, Wolfe and Chicken 2014, "Nonparametric Statistical Methods", 3.3): exact for
differences that scatter evenly about their centre, however far some of them lie. A few disturbed
processes make it wider and do not move it.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qwencli.bench.statistics.robust import MIN_RUNS, Interval, robust_sigma
from qwencli.bench.statistics.stationarity import OUTLIER_Z

# With fewer pairs no interval has the confidence that SAME asks for.
MIN_PAIRS = 5
# Two one-sided tests at 5 % each for the same, and half a percent on each side for a change.
SAME_CONFIDENCE, CHANGE_CONFIDENCE = 0.90, 0.99
# Log speed; runs on quiet GPUs scatter by 0.01 to 0.12 % (results/2026-11-25-h100-a-against-a).
QUIET = 0.005
# Own variance above so many times the known one contradicts it: where both are right the chance of
# that is at most 5 % (F distribution, 1 to 8 degrees of freedom against 8).
CONTRADICTED = 6.0
# Five processes a side: by chance alone all of one kind on A and of the other on B in 2 of 1024.
ENOUGH = 8
# From here on one far run can be told from the rest.
_MIN_RUNS_TO_DROP = 8

Processes = Sequence[Sequence[float]]


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float) -> Interval:
    """The interval of the ratio b / a; without end where so few pairs cannot have that confidence.

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


@dataclass(frozen=True)
class Prior:
    """What processes of one cell differ by: standard deviation of log speed, and how well known."""

    sd: float
    df: int


# Four cells on an H100, each in three campaigns with a process each: 0.085 % at 8 degrees of
# freedom, 0.15 % the upper end of its 95 % one-sided interval (results/2026-11-25-h100-a-against-a
# a and b, results/2026-11-25-h100-engines).
KNOWN = Prior(0.0015, 8)
# Thirteen cells with three or five processes each on two CPU machines: 5.2 %, from 0.07 to 17 %,
# so different that they count for little (results/2026-11-23-cpu-engines-3,
# 2026-11-25-cpu-engines-before, 2026-11-25-cpu-engines).
UNKNOWN = Prior(0.05, 3)


@dataclass(frozen=True)
class Intervals:
    """Two intervals of the ratio B / A of speeds: to call it the same, and a wider one to call it
    a change.

    Args:
        few: the sides have one process each, so that what processes differ by was not seen here.
        restless: runs of a process scatter by more than QUIET.
    """

    same: Interval
    change: Interval
    few: bool
    restless: bool


def paired_intervals(a: Processes, b: Processes) -> Intervals | None:
    """Intervals of B / A of sides that took turns, process by process (`paired_interval`); None for
    fewer pairs than MIN_PAIRS.

    Args:
        a, b: as in `ratio_intervals`, in the order of time.
    """
    pairs = min(len(a), len(b))
    if pairs < MIN_PAIRS:
        return None
    of_a, of_b = ([statistics.median(process) for process in side[:pairs]] for side in (a, b))
    same, change = (paired_interval(of_a, of_b, c) for c in (SAME_CONFIDENCE, CHANGE_CONFIDENCE))
    return Intervals(same, change, few=False, restless=False)


@dataclass(frozen=True)
class _Scatter:
    """Variance of a process's value, and its degrees of freedom."""

    variance: float
    df: int

    def with_prior(self, prior: _Scatter) -> _Scatter:
        df = self.df + prior.df
        return _Scatter((self.df * self.variance + prior.df * prior.variance) / df, df)

    def half(self, confidence: float, sizes: float) -> float:
        """Half the width of a two-sided interval of Student's t."""
        from scipy.special import stdtrit

        t = float(stdtrit(self.df, (1 + confidence) / 2))
        return t * math.sqrt(self.variance * sizes)


def ratio_intervals(a: Processes, b: Processes, *, gpu: bool) -> Intervals | None:
    """Intervals of B / A; None where a side has fewer than MIN_RUNS runs.

    Args:
        a, b: speeds above zero, by process, no process empty.
        gpu: the speeds are a GPU's.
    """
    if min(sum(map(len, side)) for side in (a, b)) < MIN_RUNS:
        return None
    logs = [[[math.log(speed) for speed in process] for process in side] for side in (a, b)]
    values = [[statistics.median(process) for process in side] for side in logs]
    runs = _run_scatter([process for side in logs for process in side])
    own = _Scatter(*_pooled(values))
    restless = runs is None or math.sqrt(runs.variance) > QUIET
    same, change = own, [own]
    if gpu and runs is not None and not restless:
        # The variance of a median of n normal values is pi / 2 of the mean's.
        of_runs = math.pi / 2 * runs.variance * _mean_of_inverses([*logs[0], *logs[1]])
        prior = _Scatter(KNOWN.sd**2 + of_runs, KNOWN.df)
        if own.variance <= CONTRADICTED * prior.variance:
            same = own.with_prior(prior)
            change = [same]
    elif own.df < ENOUGH:
        # Runs that scatter more than that are a sign of processes that do.
        variance = max(UNKNOWN.sd**2, runs.variance if runs else 0.0)
        pooled = own.with_prior(_Scatter(variance, UNKNOWN.df))
        same, change = (own, [own, pooled]) if own.df else (pooled, [pooled])
    sizes = sum(1 / len(side) for side in values)
    shift = statistics.fmean(values[1]) - statistics.fmean(values[0])
    wide = max(found.half(CHANGE_CONFIDENCE, sizes) for found in change)
    wide = max(wide, *(_drift(side) for side in values))
    return Intervals(
        _interval(shift, same.half(SAME_CONFIDENCE, sizes), SAME_CONFIDENCE),
        _interval(shift, wide, CHANGE_CONFIDENCE),
        few=own.df == 0,
        restless=restless,
    )


def _interval(shift: float, half: float, confidence: float) -> Interval:
    return Interval(
        math.exp(shift), math.exp(shift - half), math.exp(min(shift + half, 700.0)), confidence
    )


def _drift(values: Sequence[float]) -> float:
    """How far a straight drift that goes through as many more processes would carry their mean."""
    n = len(values)
    return (max(values) - min(values)) * n / (n - 1) if n > 1 else 0.0


def _pooled(groups: Processes) -> tuple[float, int]:
    """Variance within groups, and its degrees of freedom; (0.0, 0) where no group has two."""
    df = sum(len(group) - 1 for group in groups)
    squares = sum((v - statistics.fmean(group)) ** 2 for group in groups for v in group)
    return (squares / df, df) if df else (0.0, 0)


def _run_scatter(processes: Processes) -> _Scatter | None:
    """What the runs of one process differ by; None where no process has two."""
    variance, df = _pooled([_without_one_far_run(process) for process in processes])
    return _Scatter(variance, df) if df else None


def _without_one_far_run(values: Sequence[float]) -> Sequence[float]:
    """One hiccup says nothing about the median; two or more may be a stretch of other load."""
    if len(values) < _MIN_RUNS_TO_DROP:
        return values
    centre = statistics.median(values)
    far = max(values, key=lambda value: abs(value - centre))
    rest = list(values)
    rest.remove(far)
    return rest if abs(far - centre) > OUTLIER_Z * robust_sigma(rest) else values


def _mean_of_inverses(processes: Processes) -> float:
    return statistics.fmean(1 / len(process) for process in processes)
