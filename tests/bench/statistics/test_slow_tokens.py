from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.attribution.slow_runs import greater_p, quiet_sigma
from qwencli.bench.statistics.slow_tokens import (
    FACTOR,
    JOIN,
    LEAST_MS,
    TypicalToken,
    gaps,
    typical_token,
)

latencies = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60)


def test_a_steady_run_has_none():
    usual = typical_token([[3.0] * 50] * 4)
    assert usual == TypicalToken(3.0, 6.0)
    assert gaps([3.0] * 50, usual) == []


def test_slow_tokens_close_together_are_one_gap():
    itl = [3.0] * 30
    itl[10] = itl[10 + JOIN + 1] = 23.0
    (gap,) = gaps(itl, TypicalToken(3.0, 6.0))
    assert (gap.first, gap.last) == (11, 11 + JOIN + 1)
    assert gap.lost_ms == pytest.approx(40.0)


def test_slow_tokens_apart_are_two():
    itl = [3.0] * 30
    itl[5] = itl[5 + JOIN + 2] = 23.0
    assert [gap.first for gap in gaps(itl, TypicalToken(3.0, 6.0))] == [6, 6 + JOIN + 2]


def test_a_restless_cell_needs_more():
    restless = [1.0, 5.0, 3.0, 4.0, 2.0] * 10
    assert typical_token([restless]).limit_ms > 2 * typical_token([[3.0] * 50]).limit_ms


def test_very_short_tokens_are_not_judged_by_timer_noise():
    assert typical_token([[0.1] * 9]).limit_ms == pytest.approx(0.1 + LEAST_MS)


def test_no_tokens_no_level():
    assert typical_token([[], []]) is None


@given(st.lists(latencies, min_size=1, max_size=6))
def test_every_slow_token_is_in_exactly_one_gap_and_no_gap_ends_in_a_usual_one(runs):
    usual = typical_token(runs)
    for itl in runs:
        found = gaps(itl, usual)
        covered = [token for gap in found for token in range(gap.first, gap.last + 1)]
        assert len(covered) == len(set(covered))
        slow = {index + 1 for index, value in enumerate(itl) if value >= usual.limit_ms}
        assert slow <= set(covered)
        assert all({gap.first, gap.last} <= slow for gap in found)
        assert all(gap.lost_ms == pytest.approx(
            sum(itl[gap.first - 1 : gap.last]) - (gap.last - gap.first + 1) * usual.ms, abs=1e-6
        ) for gap in found)  # fmt: skip


@given(latencies, st.floats(0.1, 10))
def test_scaling_never_makes_gaps_of_a_slow_cell(itl, factor):
    usual = typical_token([itl])
    assert usual.limit_ms >= FACTOR * statistics.median(itl)
    assert typical_token([[value * factor for value in itl]]).ms == pytest.approx(usual.ms * factor)


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=40), st.floats(0, 1e6))
def test_slower_runs_do_not_widen_the_quiet_side(values, extra):
    centre = statistics.median(values)
    slower = [value + extra if value > centre else value for value in values]
    assert quiet_sigma(slower) == pytest.approx(quiet_sigma(values), rel=1e-6, abs=1e-9) or (
        statistics.median(slower) != centre
    )


def test_the_rank_sum_test_agrees_with_counting():
    # All 70 orders of 4 and 4 are equally likely; one has all of the first four last.
    assert greater_p([5, 6, 7, 8], [1, 2, 3, 4]) == pytest.approx(1 / 70, abs=0.005)
    assert greater_p([1, 2, 3, 4], [5, 6, 7, 8]) > 0.98
    assert greater_p([5, 6], [1, 2, 3, 4]) == 1.0


@given(st.lists(st.integers(0, 9), min_size=3, max_size=8), st.randoms())
def test_equal_groups_are_not_told_apart(values, random):
    shuffled = random.sample(values, len(values))
    assert greater_p(values, shuffled) > 0.4
