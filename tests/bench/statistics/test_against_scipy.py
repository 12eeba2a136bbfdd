"""What is computed here agrees with scipy, and what scipy computes with the textbook: on the
campaigns in `results/` and on drawn numbers.

Some statistics are kept by hand (`docs/decisions/0021-libraries.md` says why): scipy is their
reference here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qwencli.bench.attribution.slow_runs import MIN_GROUP, greater_p
from qwencli.bench.compare.intervals import _outside, _Scatter, paired_interval
from qwencli.bench.statistics.robust import RESAMPLES, median_interval, ratio_interval
from qwencli.bench.statistics.stationarity import mann_kendall, theil_sen
from qwencli.bench.storage.row_file import read_rows

RESULTS = Path(__file__).parents[3] / "results"
TIMES = st.lists(st.floats(0.01, 1e4), min_size=3, max_size=20)
CLOSE = {"rel": 1e-9, "abs": 1e-12}


@pytest.fixture(scope="module")
def series() -> list[list[float]]:
    """The decode times of every cell of the kept campaigns that has three runs or more."""
    found = []
    for path in sorted(RESULTS.rglob("runs.csv*")):
        cells = defaultdict(list)
        for row in read_rows(path.with_name("runs.csv")):
            if row["status"] == "ok" and row["decode_s"]:
                cells[row["cell_id"]].append(float(row["decode_s"]))
        found += [times for times in cells.values() if len(times) >= 3]
    assert len(found) > 100
    return found


def within(t: float, df: int) -> float:
    """P(|T| <= t), the finite sum of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = df % 2
    term = math.cos(angle) if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + odd, df, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@given(st.floats(0.5, 0.999), st.integers(1, 300))
def test_students_t_holds_its_confidence(confidence, df):
    assert within(_Scatter(1.0, df).half(confidence, 1.0), df) == pytest.approx(
        confidence, rel=1e-11
    )


@pytest.mark.parametrize(
    ("confidence", "df", "t"),
    # Two-sided, from the tables of Fisher and Yates.
    [(0.90, 1, 6.314), (0.90, 5, 2.015), (0.95, 3, 3.182), (0.99, 2, 9.925), (0.99, 60, 2.660)],
)
def test_quantiles_are_those_of_the_tables(confidence, df, t):
    assert _Scatter(1.0, df).half(confidence, 1.0) == pytest.approx(t, abs=6e-4)


def by_counting(values: list[float], others: list[float]) -> float:
    """The rank-sum test's p-value from U counted pair by pair."""
    n, m = len(values), len(others)
    u = sum((v > o) + 0.5 * (v == o) for v in values for o in others)
    sigma = math.sqrt(n * m * (n + m + 1) / 12)
    return 0.5 * math.erfc((u - n * m / 2 - 0.5) / sigma / math.sqrt(2))


def test_rank_sums_of_the_kept_campaigns(series):
    compared = 0
    for times in series:
        half = len(times) // 2
        if half >= MIN_GROUP and len(set(times)) == len(times):
            first, second = times[:half], times[half:]
            assert greater_p(first, second) == pytest.approx(by_counting(first, second), **CLOSE)
            compared += 1
    assert compared > 50


@given(st.lists(st.floats(0.01, 1e4), min_size=6, max_size=20, unique=True))
@settings(max_examples=50)
def test_rank_sums_of_drawn_times(times):
    expected = by_counting(times[:3], times[3:])
    assert greater_p(times[:3], times[3:]) == pytest.approx(expected, **CLOSE)


def check_trend(values: list[float]) -> None:
    runs = range(len(values))
    assert theil_sen(values) == stats.theilslopes(values, runs).slope
    if len(set(values)) == len(values):
        # scipy's test is the same but for the correction for continuity.
        pairs, n = math.comb(len(values), 2), len(values)
        score = round(stats.kendalltau(runs, values).statistic * pairs)
        assert score == sum((b > a) - (b < a) for a, b in combinations(values, 2))
        z = max(abs(score) - 1, 0) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
        assert mann_kendall(values) == pytest.approx(2 * stats.norm.sf(z), **CLOSE)


def test_trends_of_the_kept_campaigns(series):
    for values in series:
        check_trend(values)


@given(TIMES)
@settings(max_examples=50)
def test_trends_of_drawn_times(values):
    check_trend(values)


def bootstrap(values: list[float], stream: int = 0) -> stats.BootstrapResult:
    return stats.bootstrap(
        (values,),
        np.median,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng([0, stream]),
    )


def test_bootstrap_intervals_of_the_kept_campaigns(series):
    for values, others in zip(series[::8], series[1::8], strict=False):
        own, whole = median_interval(values), bootstrap(values)
        assert (own.low, own.high) == pytest.approx(tuple(whole.confidence_interval), **CLOSE)
        ratio = ratio_interval(values, others)
        drawn = bootstrap(others, 1).bootstrap_distribution / whole.bootstrap_distribution
        ends = tuple(np.quantile(drawn, [0.025, 0.975]))
        assert (ratio.low, ratio.high) == pytest.approx(ends, **CLOSE)


@given(TIMES)
@settings(max_examples=20)
def test_bootstrap_intervals_of_drawn_times(values):
    own = median_interval(values)
    ends = tuple(bootstrap(values).confidence_interval)
    assert (own.low, own.high) == pytest.approx(ends, **CLOSE)


@pytest.mark.parametrize("pairs", [5, 8, 12, 20])
def test_the_ends_of_a_paired_interval_are_those_of_the_signed_rank_test(pairs):
    """The end is the last shift that the exact test does not reject."""
    shifts = np.random.default_rng(pairs).normal(0.02, 0.05, pairs)
    found = paired_interval([1.0] * pairs, np.exp(shifts).tolist(), 0.90)
    assert _outside(pairs, 0.05) > 0

    def p_value(shift: float) -> float:
        return float(stats.wilcoxon(shifts - shift, method="exact").pvalue)

    for end, outward in ((math.log(found.low), -1), (math.log(found.high), 1)):
        assert p_value(end + outward * 1e-9) <= 0.10 < p_value(end - outward * 1e-9)
