"""What results call quantized weights: how they are stored, and what their products round.

    int8            stored so; vectors are multiplied as they are
    int8-w8a8       and vectors are rounded to 8 bits (w = bits of a weight, a = of an activation)
    int4-g128-w4a8, fp8-e4m3-w8a16, awq-int4-g128-w4a8+none

Labels of results from before 2026-11-25 have no such ending whatever ran.
"""

from __future__ import annotations

import re

_BITS = re.compile(r"-w\d+a\d+(?=\+|$)")


def with_activation_bits(label: str, weight_bits: int, activation_bits: int | None) -> str:
    """The label of weights whose products round vectors to so many bits; None = they do not."""
    return label if activation_bits is None else f"{label}-w{weight_bits}a{activation_bits}"


def stored_label(label: str) -> str:
    """How the weights are stored, whatever multiplies them."""
    return _BITS.sub("", label)
