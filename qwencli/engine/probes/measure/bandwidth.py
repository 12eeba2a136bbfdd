"""How fast this device reads its memory: the limit of decoding, which reads every weight once a
token."""

from __future__ import annotations

from qwencli.engine.limits import memory_rates
from qwencli.engine.probes.answers import Bandwidth, Work

DURATION_S = 1.0


def bandwidth(device: str, work: Work) -> Bandwidth:
    """The better of two ways to read, and a copy."""
    rates = memory_rates(device, DURATION_S)
    best = max(rates.read, key=lambda name: rates.read[name])
    return Bandwidth(rates.read[best], best, rates.copy)
