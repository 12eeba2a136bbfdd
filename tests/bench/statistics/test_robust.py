from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.bench.statistics.robust import mad, median_interval, ratio_interval, robust_sigma

SPEEDS = st.lists(st.floats(1.0, 1000.0), min_size=3, max_size=30)


def test_mad_of_a_worked_example():
    # Median 2, deviations 1 1 0 0 2 4 7 (Wikipedia, "Median absolute deviation").
    assert mad([1, 1, 2, 2, 4, 6, 9]) == 1


def test_robust_sigma_is_the_standard_deviation_of_normal_values_and_ignores_outliers():
    values = np.random.default_rng(0).normal(10.0, 2.0, 20_000).tolist()
    assert robust_sigma(values) == pytest.approx(2.0, rel=0.03)
    assert robust_sigma([*values, *[1e9] * 100]) == pytest.approx(2.0, rel=0.05)


@given(SPEEDS, st.floats(0.01, 100.0))
@settings(max_examples=40)
def test_intervals_scale_with_the_values(values, factor):
    scaled = [value * factor for value in values]
    plain, large = median_interval(values), median_interval(scaled)
    assert large.low == pytest.approx(plain.low * factor)
    assert large.high == pytest.approx(plain.high * factor)
    a, b = ratio_interval(values, values[::-1]), ratio_interval(scaled, scaled[::-1])
    assert (b.low, b.high) == pytest.approx((a.low, a.high))


@given(SPEEDS)
@settings(max_examples=40)
def test_an_interval_holds_its_estimate_and_stays_within_the_values(values):
    interval = median_interval(values)
    slack = 1e-9 * max(values)
    assert interval.estimate == statistics.median(values)
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert interval.low - slack <= interval.estimate <= interval.high + slack


def test_equal_seeds_give_equal_intervals():
    values = [10.0, 10.5, 11.0, 9.5, 10.2]
    assert median_interval(values, seed=3) == median_interval(values, seed=3)
    sides = [ratio_interval(values, values, seed=seed) for seed in (3, 3)]
    assert sides[0] == sides[1]


def test_the_two_sides_of_a_ratio_are_resampled_independently():
    values = [10.0, 11.0, 12.0, 13.0, 14.0]
    interval = ratio_interval(values, values)
    assert interval.low < 0.9 < 1.1 < interval.high


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0]])
def test_too_few_runs_have_no_interval(values):
    assert median_interval(values) is None
    assert ratio_interval(values, [1.0, 2.0, 3.0]) is None
    assert ratio_interval([1.0, 2.0, 3.0], values) is None


def test_a_ratio_needs_values_above_zero():
    assert ratio_interval([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]) is None
    assert ratio_interval([1.0, 2.0, 3.0], [-1.0, 2.0, 3.0]) is None


def test_the_median_agrees_with_the_exact_bootstrap_distribution():
    # Of 3 values the resampled median is the smallest with probability 7/27, the largest too.
    interval = median_interval([1.0, 2.0, 3.0], confidence=1 - 2 * 8 / 27)
    assert (interval.low, interval.high) == (2.0, 2.0)
    interval = median_interval([1.0, 2.0, 3.0], confidence=1 - 2 * 6 / 27)
    assert (interval.low, interval.high) == (1.0, 3.0)


@pytest.mark.parametrize(("runs", "at_least"), [(5, 0.88), (10, 0.92), (20, 0.92)])
def test_coverage_of_the_median_interval(runs, at_least):
    rng = np.random.default_rng(1)
    series = [rng.normal(100.0, 1.0, runs).tolist() for _ in range(250)]
    held = sum((i := median_interval(values)).low <= 100.0 <= i.high for values in series)
    assert held / len(series) >= at_least


@pytest.mark.parametrize("runs", [5, 10])
@pytest.mark.parametrize("skewed", [False, True])
def test_coverage_of_the_ratio_interval(runs, skewed):
    rng = np.random.default_rng(2)

    def draw():
        noise = rng.exponential(1.0, runs) if skewed else rng.normal(0.0, 1.0, runs)
        return 100.0 + noise

    held = 0
    for _ in range(250):
        interval = ratio_interval(draw().tolist(), (draw() * 0.9).tolist())
        held += interval.low <= 0.9 <= interval.high
    assert 0.92 <= held / 250 <= 1.0
