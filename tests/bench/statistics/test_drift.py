from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.statistics.stationarity import (
    FirstRun,
    drift,
    first_run_effect,
    mann_kendall,
    stationarity,
    theil_sen,
)


def noise(rng, n=20, percent=0.5):
    return 100 * (1 + percent / 100 * rng.standard_normal(n))


def test_theil_sen_ignores_an_outlier():
    assert theil_sen([1.0, 3.0, 5.0, 1000.0, 9.0, 11.0, 13.0]) == 2.0


def test_mann_kendall_worked_by_hand():
    # S = 6, variance 4*3*13/18 = 8.667, z = 5/2.944 = 1.698.
    assert mann_kendall([1, 2, 3, 4]) == pytest.approx(0.0894, abs=1e-4)
    # One pair tied: S = 5, variance (156 - 18)/18 = 7.667, z = 4/2.769 = 1.445.
    assert mann_kendall([1, 2, 2, 4]) == pytest.approx(0.1486, abs=1e-4)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0], [1.0, 2.0, 1.0]])
def test_no_trend_at_all(values):
    assert mann_kendall(values) == 1.0


@given(st.lists(st.integers(0, 100), min_size=6, max_size=25), st.sampled_from([0.25, 2.0, 1024.0]))
def test_drift_scales_and_reverses(values, factor):
    found = drift([float(value) for value in values])
    scaled = drift([value * factor for value in values])
    backward = drift([float(value) for value in values[::-1]])
    assert scaled.p_value == found.p_value == pytest.approx(backward.p_value)
    assert scaled.slope == pytest.approx(found.slope * factor)
    assert backward.slope == pytest.approx(-found.slope)


def test_warm_up_and_first_run_are_kept_apart():
    assert first_run_effect(50.0, [80.0, 100.0, 101.0, 99.0, 100.0]) == [
        FirstRun(0, 0.5, True),
        FirstRun(1, 0.8, True),
    ]
    assert first_run_effect(None, [100.5, 100.0, 101.0, 99.0, 100.0]) == [FirstRun(1, 1.005, False)]


def test_a_first_run_within_one_percent_does_not_count_however_steady_the_rest():
    assert [r.differs for r in first_run_effect(100.9, [98.9, 100.0, 100.0, 100.0])] == [
        False,
        True,
    ]


def test_first_runs_need_three_others():
    assert first_run_effect(50.0, [1.0, 2.0, 3.0]) == []


def test_first_runs_of_steady_series_rarely_differ():
    rng = np.random.default_rng(1)
    flagged = 0
    for _ in range(300):
        warm_up, *values = noise(rng, 11).tolist()
        flagged += sum(first.differs for first in first_run_effect(warm_up, values))
    assert flagged / 600 <= 0.05


def test_steady_series_are_called_stationary():
    rng = np.random.default_rng(2)
    for n in (6, 10, 20, 50):
        kinds = [stationarity(noise(rng, n).tolist()).kind for _ in range(120)]
        assert kinds.count("stationary") / 120 >= 0.95


def test_a_step_is_called_a_step():
    rng = np.random.default_rng(3)
    for _ in range(60):
        values = noise(rng)
        values[12:] *= 0.97
        found = stationarity(values.tolist())
        assert found.kind == "step"
        assert found.steps[0].ratio == pytest.approx(0.97, abs=0.01)


def test_a_drift_is_called_a_drift():
    rng = np.random.default_rng(4)
    kinds = []
    for _ in range(60):
        found = stationarity((noise(rng) * np.linspace(1.0, 0.94, 20)).tolist())
        kinds.append(found.kind)
        assert found.drift.slope == pytest.approx(-6 / 19, rel=0.4)
    assert kinds.count("drift") >= 54


@pytest.mark.parametrize("n", [0, 1, 5])
def test_few_runs_get_no_verdict(n):
    found = stationarity([1.0] * n)
    assert (found.kind, found.steps, found.drift) == ("too few runs", (), None)


def test_equal_runs_are_stationary():
    assert stationarity([3.0] * 10).kind == "stationary"
