from __future__ import annotations

import pytest

from qwencli.bench.statistics.student import t_quantile, within


@pytest.mark.parametrize(
    ("confidence", "df", "t"),
    # Two-sided, from the tables of Fisher and Yates.
    [
        (0.90, 1, 6.314), (0.90, 2, 2.920), (0.90, 5, 2.015), (0.90, 12, 1.782),
        (0.95, 3, 3.182), (0.95, 30, 2.042), (0.99, 1, 63.657), (0.99, 2, 9.925),
        (0.99, 4, 4.604), (0.99, 11, 3.106), (0.99, 60, 2.660),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(confidence, df, t):
    assert t_quantile(confidence, df) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 10])
def test_the_quantile_holds_its_confidence(df):
    assert within(0.0, df) == 0.0
    assert within(t_quantile(0.99, df), df) == pytest.approx(0.99)
