"""Rounds as blocks: what all conditions of a round share is the time it was made at, not an effect.

Randomised complete blocks (Fisher 1935, "The Design of Experiments", chapter 4), with medians in
place of means so that one disturbed run moves nothing: the effect of a round is the median over
its conditions of value / that condition's median over all rounds. Dividing by it takes out a drift
(heat, clocks, other load) that is slow beside a round. Estimated from fewer than LEAST_CONDITIONS
it would mostly be the effect in question, and nothing is taken out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

LEAST_CONDITIONS = 4

# Condition -> round -> value.
ByRound = Mapping[str, Mapping[int, float]]


def without_rounds(values: ByRound) -> dict[str, dict[int, float]]:
    """The values with the effects of their rounds divided out; unchanged where one is not above 0
    or a round has too few conditions."""
    as_they_are = {name: dict(rounds) for name, rounds in values.items()}
    if any(value <= 0 for rounds in values.values() for value in rounds.values()):
        return as_they_are
    usual = {name: statistics.median(rounds.values()) for name, rounds in values.items() if rounds}
    relative: dict[int, list[float]] = {}
    for name, rounds in values.items():
        for number, value in rounds.items():
            relative.setdefault(number, []).append(value / usual[name])
    if any(len(ratios) < LEAST_CONDITIONS for ratios in relative.values()):
        return as_they_are
    effect = {number: statistics.median(ratios) for number, ratios in relative.items()}
    return {
        name: {number: value / effect[number] for number, value in rounds.items()}
        for name, rounds in values.items()
    }
