"""How fast this device reads its memory: the limit of decoding, which reads every weight once a
token."""

from __future__ import annotations

from qwencli.engine.instruments.limits import memory_rates, read_bandwidth
from qwencli.engine.instruments.probes.answers import Bandwidth, Work

DURATION_S = 1.0


def bandwidth(device: str, work: Work) -> Bandwidth:
    """The better of two ways to read, a copy, and what one token's weights are read with."""
    rates = memory_rates(device, DURATION_S)
    best = max(rates.read, key=lambda name: rates.read[name])
    # The probe's sizes are of 16-bit weights; on a CPU they are float32.
    token_bytes = work.decoder_bytes * (2 if device == "cpu" else 1)
    token = read_bandwidth(device, token_bytes)
    return Bandwidth(rates.read[best], best, rates.copy, max(token, rates.read[best]))
