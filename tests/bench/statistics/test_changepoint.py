from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.bench.statistics.stationarity import ALPHA, PERMUTATIONS, change_points


def noise(rng, n=20, level=100.0, percent=0.5):
    return level * (1 + percent / 100 * rng.standard_normal(n))


@pytest.mark.parametrize("n", [10, 20, 50])
def test_white_noise_rarely_alarms(n):
    rng = np.random.default_rng(n)
    alarms = sum(bool(change_points(noise(rng, n).tolist())) for _ in range(250))
    assert alarms / 250 <= 0.05


def test_heavy_tails_rarely_alarm():
    rng = np.random.default_rng(5)
    series = [(100 + rng.standard_cauchy(20)).tolist() for _ in range(250)]
    assert sum(bool(change_points(values)) for values in series) / 250 <= 0.05


@pytest.mark.parametrize("at", [5, 10, 15])
def test_a_planted_step_of_3_percent_is_found_where_it_is(at):
    rng = np.random.default_rng(at)
    exact = 0
    for _ in range(100):
        values = noise(rng)
        values[at:] *= 0.97
        steps = change_points(values.tolist())
        assert steps, "missed"
        exact += [step.index for step in steps] == [at]
        nearest = min(steps, key=lambda step: abs(step.index - at))
        assert abs(nearest.index - at) <= 1
        assert nearest.p_value <= ALPHA
    assert exact >= 90


def test_two_steps_and_their_sizes():
    rng = np.random.default_rng(0)
    values = [v for level in (100.0, 103.0, 98.0) for v in noise(rng, 12, level)]
    first, second = change_points(values)
    assert (first.index, second.index) == (12, 24)
    assert first.ratio == pytest.approx(1.03, abs=0.005)
    assert second.ratio == pytest.approx(98 / 103, abs=0.005)


def test_one_outlier_is_no_step():
    rng = np.random.default_rng(0)
    values = noise(rng).tolist()
    values[10] = 1.0
    assert change_points(values) == []


def test_the_statistic_agrees_with_enumeration():
    # Six of one level, six of another: 2 of the 924 orders are as extreme, so p is 1 in 462.
    (step,) = change_points([1.0] * 6 + [2.0] * 6)
    expected = 2 / 924
    error = 4 * (expected / PERMUTATIONS) ** 0.5 + 1 / PERMUTATIONS
    assert step.p_value == pytest.approx(expected, abs=error)


@pytest.mark.parametrize("n", [0, 1, 3, 8])
def test_too_short_a_series_has_no_steps(n):
    assert change_points([1.0] * (n // 2) + [2.0] * (n - n // 2)) == []


def test_nine_values_are_enough():
    assert [step.index for step in change_points([1.0] * 4 + [2.0] * 5)] == [4]


def test_equal_values_have_no_steps():
    assert change_points([5.0] * 30) == []


def test_a_step_from_zero_has_no_ratio():
    (step,) = change_points([0.0] * 10 + [1.0] * 10)
    assert step.ratio is None


@given(st.lists(st.integers(1, 50), min_size=4, max_size=30), st.integers(1, 1000))
@settings(max_examples=30)
def test_steps_do_not_depend_on_the_unit(values, factor):
    plain, scaled = (change_points(series) for series in (values, [v * factor for v in values]))
    assert [(s.index, s.p_value) for s in plain] == [(s.index, s.p_value) for s in scaled]
    assert [s.index for s in plain] == sorted({s.index for s in plain})
    assert all(2 <= s.index <= len(values) - 2 for s in plain)
