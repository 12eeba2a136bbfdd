"""What the probes cost: in one run, stretches of tokens with them and without take turns.

Neighbouring stretches are a few milliseconds apart, so that clocks, heat and other programs are the
same for both; runs compared with runs would need hundreds to see one percent.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qwencli.bench.robust import Interval, median_interval
from qwencli.bench.token_probe import TokenProbe
from qwencli.results import GenerationChunk, GenerationResult

# Tokens of one stretch. Their median hides a stall, and a run has enough of them.
STRETCH = 8
# Runs of each cell that are made for this alone, after the measured ones.
RUNS = 3


@dataclass(frozen=True)
class Pair:
    """A stretch that was watched and the mean of the two around it: median ms between tokens.

    The mean takes out what grows with the context.
    """

    watched_ms: float
    bare_ms: float


def drain_in_turns(probe: TokenProbe, chunks: Iterator[GenerationChunk]) -> GenerationResult:
    """Run a stream to its end with the probe looking at every other stretch of tokens."""
    result, token = None, 0
    for chunk in chunks:
        if chunk.token_ids:
            if _watched(token):
                probe.note()
            elif _watched(token + 1):
                probe.resume()
            token += 1
        result = chunk.result
    assert result is not None, "a stream ends with the chunk that carries its result"
    return result


def _watched(token: int) -> bool:
    return token // STRETCH % 2 == 1


def pairs(itl_ms: Sequence[float]) -> list[Pair]:
    """Of a run that `drain_in_turns` made.

    Args:
        itl_ms: time from token i to token i + 1; what the probe does at token i is in it.
    """
    medians = [
        statistics.median(itl_ms[at : at + STRETCH])
        for at in range(0, len(itl_ms) - STRETCH + 1, STRETCH)
    ]
    return [
        Pair(medians[at], (medians[at - 1] + medians[at + 1]) / 2)
        for at in range(1, len(medians) - 1, 2)
    ]


def overhead_percent(found: Iterable[Pair]) -> Interval | None:
    """What watching adds to the time between tokens; None for fewer than three pairs."""
    return median_interval([100.0 * (pair.watched_ms / pair.bare_ms - 1.0) for pair in found])
