"""Numbers as text a browser turns back into a typed array; fewer of them, extremes kept.

Knows nothing of campaigns.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence

MISSING = float("nan")


def pack_floats(values: Sequence[float]) -> str:
    """Base64 of little-endian 32-bit floats: 5.3 characters a value, seven digits, NaN = missing.

    Written decimals need about as many characters, and the browser must parse each of them.
    """
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def keep_extremes(series: Sequence[Sequence[float]], most: int) -> list[int]:
    """Indices of the points to draw: all of them, or about `most` of them.

    The points are cut into stretches of equal length, and of each stretch the lowest and the
    highest value of every series stay, and so do the first and the last point: the worst stall of
    each stretch is drawn, which taking every n-th point would miss.

    Args:
        series: one or more series of one length; missing values are NaN.
        most: at least 2 for each series.
    """
    length = len(series[0])
    if length <= most:
        return list(range(length))
    stretches = max(1, most // (2 * len(series)))
    kept = {0, length - 1}
    for number in range(stretches):
        stretch = range(length * number // stretches, length * (number + 1) // stretches)
        for values in series:
            known = [i for i in stretch if values[i] == values[i]]
            if known:
                kept.add(min(known, key=values.__getitem__))
                kept.add(max(known, key=values.__getitem__))
    return sorted(kept)
