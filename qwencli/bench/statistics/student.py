"""Quantiles of Student's t for whole degrees of freedom; the standard library has only the normal.

The probability is the finite sum of Abramowitz and Stegun 1964, "Handbook of Mathematical
Functions", 26.7.3 and 26.7.4; the quantile is found by halving.
"""

from __future__ import annotations

import math
from functools import cache


def within(t: float, df: int) -> float:
    """The probability that |T| <= t, for t >= 0 and df >= 1."""
    angle = math.atan2(t, math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = df % 2
    term = math.cos(angle) if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + odd, df, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@cache
def t_quantile(confidence: float, df: int) -> float:
    """The t with P(|T| <= t) = confidence: half the width of a two-sided interval.

    Args:
        confidence: above 0 and below 1.
        df: at least 1.
    """
    low, high = 0.0, 1.0
    while within(high, df) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, df) < confidence else (low, middle)
    return (low + high) / 2
