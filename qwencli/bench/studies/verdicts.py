"""From the rows of a study to a verdict on each test and each claim, by rules fixed beforehand.

The effect of a test is the ratio of two arms (or of an arm and a number), with its 95 % bootstrap
interval over runs (`statistics.robust`), turned so that the claim wants it above 1.

    above, below   supported: the interval lies at or above the factor `by`
                   not reproduced here: it holds 1 (the effect is no larger than its noise), or it
                   holds `by` (an effect, but whether it is large enough is open)
                   refuted: it lies below 1 (the opposite), or above 1 and below `by` (too small)
    same           supported: the interval lies between 1 / `by` and `by`
                   refuted: it lies outside; else not reproduced here

What is about other hardware or versions than these is never refuted here, only not reproduced; nor
is a spread, because a few runs bound it from below alone. A claim is supported where all of its
tests that could run are, and refuted where one of them is.

**Rounds are blocks**: what all conditions of a round share is the time it was made at, not an
effect. Randomised complete blocks (Fisher 1935, "The Design of Experiments", chapter 4), with
medians in place of means so that one disturbed run moves nothing: the effect of a round is the
median over its conditions of value / that condition's median over all rounds. Dividing by it takes
out a drift (heat, clocks, other load) that is slow beside a round. Estimated from fewer than
LEAST_CONDITIONS it would mostly be the effect in question, and nothing is taken out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from qwencli.bench.statistics.robust import (
    MIN_RUNS,
    Interval,
    describe,
    median_interval,
    ratio_interval,
    spread_interval,
)
from qwencli.bench.studies.claim_file import Study, Trial
from qwencli.output import counted

LEAST_CONDITIONS = 4

# Condition -> round -> value.
ByRound = Mapping[str, Mapping[int, float]]
MORE_RUNS = "more runs can only spread further"

# Values of one arm for one metric.
Values = Sequence[float]


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


class Verdict(StrEnum):
    SUPPORTED = "supported"
    REFUTED = "refuted"
    NOT_REPRODUCED = "not reproduced here"
    CANNOT_RUN = "cannot run here"


@dataclass(frozen=True)
class Side:
    """An arm in one metric: its values by run, or why there are none."""

    values: Values = ()
    blocked: str | None = None


@dataclass(frozen=True)
class Finding:
    """The outcome of one test; `effect` as the claim wants it (above 1 = as claimed), `value` and
    `against_value` the statistics of the two sides."""

    test: Trial
    verdict: Verdict
    reason: str
    effect: Interval | None = None
    value: float | None = None
    against_value: float | None = None
    n: int = 0
    n_against: int | None = None


@dataclass(frozen=True)
class ClaimVerdict:
    study: Study
    verdict: Verdict
    reason: str
    findings: tuple[Finding, ...]


def judge(test: Trial, side: Side, against: Side | float, about: str | None) -> Finding:
    """Apply the test's rule.

    Args:
        about: why this machine is not the one that the claim is about, or None.
    """
    other = None if isinstance(against, float | int) else against
    blocked = side.blocked or (other.blocked if other else None)
    if blocked:
        return Finding(test, Verdict.CANNOT_RUN, blocked)
    values = side.values
    if not values or (other and not other.values):
        return Finding(test, Verdict.CANNOT_RUN, f"{test.metric} is not to be had here")
    measured = Finding(
        test,
        Verdict.CANNOT_RUN,
        "",
        value=describe(values, test.statistic),
        against_value=describe(other.values, test.statistic) if other else float(test.against),
        n=len(values),
        n_against=len(other.values) if other else None,
    )
    interval = _effect(test, values, against)
    if interval is None:
        return replace(measured, reason=_too_few(values, other))
    verdict, reason = _decide(test, interval)
    if verdict is Verdict.REFUTED and (about or test.statistic == "spread"):
        verdict, reason = Verdict.NOT_REPRODUCED, f"{reason}; no refutation: {about or MORE_RUNS}"
    return replace(measured, verdict=verdict, reason=reason, effect=interval)


def _too_few(values: Values, other: Side | None) -> str:
    least = min(len(side) for side in (values, other.values if other else values))
    if least >= MIN_RUNS:
        return "a ratio needs values above zero"
    return f"{counted(least, 'run')} with this figure, {MIN_RUNS} are needed"


def _effect(test: Trial, values: Values, against: Side | float) -> Interval | None:
    if isinstance(against, Side):
        found = ratio_interval(against.values, values, statistic=test.statistic)
    else:
        of_one = spread_interval if test.statistic == "spread" else median_interval
        own = of_one(values)
        found = own and Interval(*(x / against for x in (own.estimate, own.low, own.high)))
    if found is None or test.expect != "below":
        return found
    if found.low <= 0:
        return None
    return Interval(1 / found.estimate, 1 / found.high, 1 / found.low)


def _decide(test: Trial, effect: Interval) -> tuple[Verdict, str]:
    by = test.by
    if test.expect == "same":
        if 1 / by <= effect.low and effect.high <= by:
            return Verdict.SUPPORTED, f"equal within {by:g} times"
        if effect.high < 1 / by or effect.low > by:
            return Verdict.REFUTED, f"different by more than {by:g} times"
        return Verdict.NOT_REPRODUCED, f"too noisy to tell whether equal within {by:g} times"
    if effect.low >= by:
        return Verdict.SUPPORTED, "as claimed"
    if effect.high < 1:
        return Verdict.REFUTED, "the opposite" if by > 1 else "below what is claimed"
    if effect.low <= 1:
        excluded = f"; an effect of {by:g} times is excluded" if effect.high < by else ""
        return Verdict.NOT_REPRODUCED, f"the effect is no larger than its noise{excluded}"
    if effect.high < by:
        return Verdict.REFUTED, f"an effect, but less than {by:g} times"
    return Verdict.NOT_REPRODUCED, f"an effect, but {by:g} times is not certain"


def conclude(study: Study, findings: Sequence[Finding], blocked: str | None) -> ClaimVerdict:
    """One verdict for the claim; `blocked`: why it cannot run here at all."""
    ran = [finding for finding in findings if finding.verdict is not Verdict.CANNOT_RUN]
    if not ran:
        why = blocked or next((finding.reason for finding in findings), "nothing was measured")
        return ClaimVerdict(study, Verdict.CANNOT_RUN, why, tuple(findings))
    for verdict in (Verdict.REFUTED, Verdict.NOT_REPRODUCED, Verdict.SUPPORTED):
        decisive = [finding for finding in ran if finding.verdict is verdict]
        if decisive:
            break
    reason = "; ".join(f"{finding.test.says}: {finding.reason}" for finding in decisive)
    if len(ran) < len(findings):
        reason += f" ({len(findings) - len(ran)} of {len(findings)} parts could not run)"
    return ClaimVerdict(study, verdict, reason, tuple(findings))
