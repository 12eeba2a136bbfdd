"""What the probes cost, from a few runs of each cell that count for nothing else.

The probes inside the process: in each of these runs, stretches of tokens with them and without take
turns. Neighbouring stretches are a few milliseconds apart, so that clocks, heat and other programs
are the same for both; runs compared with runs would need hundreds to see one percent.

The sensor sampler beside it cannot be switched within milliseconds: it is on in every other of
these runs, and their unwatched stretches are compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwencli.bench.statistics.robust import Interval, median_interval, ratio_interval
from qwencli.results import GenerationChunk, GenerationResult

if TYPE_CHECKING:
    from qwencli.bench.measure.host_probe import TokenProbe

# Tokens of one stretch. Their median hides a stall, and a run has enough of them.
STRETCH = 8
# Runs of each cell that are made for this alone, after the measured ones, and the time (s) after
# which a slow cell makes no more.
RUNS = 6
BUDGET_S = 6.0


@dataclass(frozen=True)
class Pair:
    """A stretch that was watched and the mean of the two around it: median ms between tokens.

    The mean takes out what grows with the context. A row of probes.csv.
    """

    run: int
    pair: int
    itl_probe_on_ms: float
    itl_probe_off_ms: float


def drain_in_turns(
    probe: TokenProbe, chunks: Iterator[GenerationChunk], run: int
) -> GenerationResult:
    """Run a stream to its end with the probe looking at every other stretch of tokens."""
    result, token = None, 0
    for chunk in chunks:
        if chunk.token_ids:
            if _watched(token, run):
                probe.note()
            elif _watched(token + 1, run):
                probe.resume()
            token += 1
        result = chunk.result
    assert result is not None, "a stream ends with the chunk that carries its result"
    return result


def _watched(token: int, run: int) -> bool:
    return (token // STRETCH + _turn(run)) % 2 == 1


def _turn(run: int) -> int:
    """Whether odd (0) or even (1) stretches are watched: kernels work in blocks of the context, so
    that the two are not alike. Changes with pairs of runs, because the sampler changes with runs.
    """
    return run // 2 % 2


def pairs(itl_ms: Sequence[float], run: int) -> list[Pair]:
    """Neighbouring stretches with the probe on and off, of a run by `drain_in_turns`.

    Args:
        itl_ms: time from token i to token i + 1; what the probe does at token i is in it.
    """
    medians = [
        statistics.median(itl_ms[at : at + STRETCH])
        for at in range(0, len(itl_ms) - STRETCH + 1, STRETCH)
    ]
    watched = [at for at in range(1, len(medians) - 1) if _watched(at * STRETCH, run)]
    return [
        Pair(run, number, medians[at], (medians[at - 1] + medians[at + 1]) / 2)
        for number, at in enumerate(watched)
    ]


def overhead_percent(found: Iterable[Pair]) -> Interval | None:
    """What watching adds to the time between tokens; None for too few pairs.

    Each pair is set against one of a run in which the other stretches were watched; the geometric
    mean of the two is free of any difference between odd and even stretches.
    """
    turns: tuple[list[float], list[float]] = [], []
    for pair in found:
        turns[_turn(pair.run)].append(pair.itl_probe_on_ms / pair.itl_probe_off_ms)
    both = [math.sqrt(a * b) for a, b in zip(*turns, strict=False)]
    return median_interval([100.0 * (ratio - 1.0) for ratio in both])


def sampler_percent(on_ms: Sequence[float], off_ms: Sequence[float]) -> Interval | None:
    """What the sampler adds to it, from unwatched tokens of runs with and without it (medians of
    each run, ms); None for fewer than three runs of either kind."""
    found = ratio_interval(off_ms, on_ms)
    if found is None:
        return None
    low, middle, high = (100.0 * (x - 1.0) for x in (found.low, found.estimate, found.high))
    return Interval(middle, low, high, found.confidence)
