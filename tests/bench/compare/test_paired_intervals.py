"""Paired intervals against textbook values and simulated machines."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.compare.comparison import Verdict, decide
from qwencli.bench.compare.intervals import paired_interval, paired_intervals


def test_a_textbook_interval():
    # Hollander and Wolfe, example 3.1: nine depression scores, 96 % interval -0.786 to -0.010.
    before = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
    after = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
    found = paired_interval(list(map(math.exp, before)), list(map(math.exp, after)), 0.96)
    assert math.log(found.estimate) == pytest.approx(-0.46, abs=0.001)
    assert math.log(found.low) == pytest.approx(-0.786, abs=0.001)
    assert math.log(found.high) == pytest.approx(-0.010, abs=0.001)


def test_too_few_pairs_have_no_ends():
    ones = [1.0] * 7
    assert paired_interval(ones, ones, 0.99).high == math.inf
    assert paired_interval([*ones, 1.0], [*ones, 1.0], 0.99).high == 1.0
    assert paired_intervals([(1.0,)] * 4, [(1.0,)] * 4) is None


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=8, max_size=12))
def test_swapping_the_sides_turns_the_interval_over(pairs):
    a, b = zip(*pairs, strict=True)
    there, back = paired_interval(a, b, 0.99), paired_interval(b, a, 0.99)
    assert there.low == pytest.approx(1 / back.high)
    assert there.low <= there.estimate * 1.000001
    assert there.estimate <= there.high * 1.000001


def turns(chance, planted=0.0, busy=0.2, scatter=0.01, processes=10, runs=5):
    """Pairs of processes on a machine that other programs have for stretches of time."""
    a, b = [], []
    for _ in range(processes):
        taken = [3.0 if chance.random() < busy else 1.0 for _ in range(2)]
        # A neighbour stays for a while, so most pairs meet the same.
        taken = [taken[0]] * 2 if chance.random() < 0.8 else taken
        for side, slow, factor in ((a, taken[0], 1.0), (b, taken[1], 1 + planted)):
            level = 1000 / slow / factor * math.exp(chance.gauss(0, scatter * slow))
            side.append(tuple(level * math.exp(-abs(chance.gauss(0, 0.03))) for _ in range(runs)))
    return a, b


def verdicts(count, threshold, **machine):
    chance = random.Random(7)
    return [decide(paired_intervals(*turns(chance, **machine)), threshold) for _ in range(count)]


def test_on_a_busy_machine_nothing_changed_is_never_a_change():
    found = verdicts(200, 0.01, busy=0.4)
    assert {Verdict.SAME, Verdict.AMBIGUOUS} >= set(found)


def test_on_a_quiet_machine_nothing_changed_is_the_same():
    found = verdicts(200, 0.03, busy=0.0)
    assert found.count(Verdict.SAME) >= 160
    assert {Verdict.SAME, Verdict.AMBIGUOUS} >= set(found)


def test_five_percent_is_found_on_a_quiet_machine():
    assert verdicts(200, 0.01, busy=0.0, planted=0.05).count(Verdict.SLOWER) >= 180
