"""The rules that decide, on made-up runs."""

from __future__ import annotations

import random

import pytest

from qwencli.bench.studies.claim_file import Study, Trial
from qwencli.bench.studies.verdicts import Side, Verdict, conclude, judge, without_rounds

PLAIN = [10.0, 10.1, 9.9, 10.05, 9.95]


def a_test(expect="below", by=1.1, against="plain", statistic="median"):
    return Trial("it is", "decode_tok_per_s", "arm", against, expect, by, statistic)


def scaled(factor, spread=1.0):
    return Side([10.0 + factor * 10.0 - 10.0 + spread * (value - 10.0) for value in PLAIN])


def verdict(test, side, against=None, about=None):
    return judge(test, side, Side(PLAIN) if against is None else against, about)


@pytest.mark.parametrize(
    ("expect", "factor", "spread", "said"),
    [
        ("below", 0.5, 1, Verdict.SUPPORTED),
        ("below", 0.95, 1, Verdict.REFUTED),  # an effect, but too small
        ("below", 1.0, 1, Verdict.NOT_REPRODUCED),  # none beyond the noise
        ("below", 1.5, 1, Verdict.REFUTED),  # the opposite
        ("below", 0.85, 30, Verdict.NOT_REPRODUCED),  # drowned in noise
        ("above", 1.5, 1, Verdict.SUPPORTED),
        ("above", 0.5, 1, Verdict.REFUTED),
        ("same", 1.0, 1, Verdict.SUPPORTED),
        ("same", 1.5, 1, Verdict.REFUTED),
        ("same", 1.0, 30, Verdict.NOT_REPRODUCED),
    ],
)
def test_the_rules(expect, factor, spread, said):
    assert verdict(a_test(expect), scaled(factor, spread)).verdict is said


def test_the_effect_is_turned_so_that_the_claim_wants_it_above_one():
    found = verdict(a_test("below"), scaled(0.5))
    assert found.effect.estimate == pytest.approx(2.0, rel=0.01)
    assert found.effect.low <= found.effect.estimate <= found.effect.high
    assert (found.value, found.against_value) == (5.0, 10.0)
    assert (found.n, found.n_against) == (5, 5)


def test_against_a_number():
    assert verdict(a_test("above", 1.0, 8.0), Side(PLAIN), 8.0).verdict is Verdict.SUPPORTED
    found = verdict(a_test("above", 1.0, 50.0), Side([0.0] * 4), 50.0)
    assert found.verdict is Verdict.REFUTED
    assert found.n_against is None


def test_what_is_about_another_machine_is_never_refuted():
    found = verdict(a_test(), scaled(1.5), about="it is about sm_120")
    assert found.verdict is Verdict.NOT_REPRODUCED
    assert "sm_120" in found.reason


def test_a_spread_is_bounded_from_below_alone():
    wide = Side([1.0, 2.0, 3.0, 1.5, 2.5])
    test = a_test("above", 1.0, 2.0, "spread")
    assert verdict(test, Side(PLAIN), 2.0).verdict is Verdict.NOT_REPRODUCED
    assert verdict(test, wide, 2.0).effect.estimate == pytest.approx(1.5)
    against = a_test("above", 1.2, "plain", "spread")
    assert verdict(against, scaled(1.0, 20)).value > 1.2


@pytest.mark.parametrize("few", [[], [1.0], [1.0, 2.0]])
def test_too_few_runs_decide_nothing(few):
    assert verdict(a_test(), Side(few)).verdict is Verdict.CANNOT_RUN
    assert verdict(a_test(), Side(PLAIN), Side(few)).verdict is Verdict.CANNOT_RUN


def test_a_blocked_arm_carries_its_reason():
    found = verdict(a_test(), Side(blocked="no flash-attn"))
    assert (found.verdict, found.reason) == (Verdict.CANNOT_RUN, "no flash-attn")


def findings(*verdicts):
    side = {
        Verdict.SUPPORTED: scaled(0.5),
        Verdict.REFUTED: scaled(1.5),
        Verdict.NOT_REPRODUCED: scaled(1.0),
        Verdict.CANNOT_RUN: Side(blocked="no GPU"),
    }
    return [verdict(a_test(), side[one]) for one in verdicts]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([Verdict.SUPPORTED, Verdict.SUPPORTED], Verdict.SUPPORTED),
        ([Verdict.SUPPORTED, Verdict.REFUTED], Verdict.REFUTED),
        ([Verdict.SUPPORTED, Verdict.NOT_REPRODUCED], Verdict.NOT_REPRODUCED),
        ([Verdict.SUPPORTED, Verdict.CANNOT_RUN], Verdict.SUPPORTED),
        ([Verdict.CANNOT_RUN, Verdict.CANNOT_RUN], Verdict.CANNOT_RUN),
        ([], Verdict.CANNOT_RUN),
    ],
)
def test_a_claim_is_what_its_parts_are(parts, said):
    study = Study("C99", "a claim", "supported", {}, (a_test(),))
    found = conclude(study, findings(*parts), "needs an NVIDIA GPU" if not parts else None)
    assert found.verdict is said
    if Verdict.CANNOT_RUN in parts and said is Verdict.SUPPORTED:
        assert "1 of 2 parts could not run" in found.reason


def drifting(conditions, rounds, drift, noise, seed=1):
    chance = random.Random(seed)
    return {
        name: {r: speed * drift**r * chance.uniform(1 - noise, 1 + noise) for r in range(1, rounds)}
        for name, speed in conditions.items()
    }


def test_a_drift_over_rounds_is_taken_out_and_an_effect_is_not():
    made = drifting({"plain": 30.0, "a": 30.0, "b": 29.0, "slow": 15.0}, 7, 0.8, 0.01)
    found = without_rounds(made)
    for name in made:
        assert max(found[name].values()) / min(found[name].values()) < 1.04
    ratio = sorted(found["plain"].values())[3] / sorted(found["slow"].values())[3]
    assert ratio == pytest.approx(2.0, rel=0.02)


def test_with_few_conditions_or_zeros_nothing_is_taken_out():
    few = drifting({"plain": 30.0, "slow": 15.0}, 5, 0.8, 0.0)
    assert without_rounds(few) == few
    zeros = {name: {1: 0.0, 2: 1.0} for name in "abcd"}
    assert without_rounds(zeros) == zeros
