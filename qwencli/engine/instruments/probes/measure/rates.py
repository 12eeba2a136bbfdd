"""What torch sees, whether the device computes, and its rates: memory, host link, launches.

Memory bandwidth limits decoding, which reads every weight once a token; so does the rate at which
the host launches work, hundreds of kernels a token.
"""

from __future__ import annotations

import statistics
import time

import torch

from qwencli.engine.instruments.probes.answers import (
    Bandwidth,
    HostLink,
    LaunchRate,
    SmallWork,
    Work,
)
from qwencli.engine.instruments.timing import launch_times, memory_rates, read_bandwidth, sustained
from qwencli.engine.machine.device import TorchFacts, run_small_work, torch_facts


def torch_build(device: str, work: Work) -> TorchFacts:
    return torch_facts()


def small_work(device: str, work: Work) -> SmallWork:
    return SmallWork(device, run_small_work(device))


DURATION_S = 1.0


def bandwidth(device: str, work: Work) -> Bandwidth:
    """The better of two ways to read, a copy, and what one token's weights are read with."""
    rates = memory_rates(device, DURATION_S)
    best = max(rates.read, key=lambda name: rates.read[name])
    # The probe's sizes are of 16-bit weights; on a CPU they are float32.
    token_bytes = work.decoder_bytes * (2 if device == "cpu" else 1)
    token = read_bandwidth(device, token_bytes)
    return Bandwidth(rates.read[best], best, rates.copy, max(token, rates.read[best]))


BYTES = 1 << 27
# Long enough for a link that saves power to train up to its full speed.
LINK_S = 0.7


def host_link(device: str, work: Work) -> HostLink:
    """Copies of pinned memory, the way weights are loaded."""
    with torch.inference_mode():
        there = torch.empty(BYTES, dtype=torch.uint8, device=device)
        here = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
        to_device = sustained(device, lambda: there.copy_(here, non_blocking=True), LINK_S)
        to_host = sustained(device, lambda: here.copy_(there, non_blocking=True), LINK_S)
    return HostLink(BYTES / to_device, BYTES / to_host)


ROUND_TRIPS = 200


def launch_rate(device: str, work: Work) -> LaunchRate:
    """One addition to a single number: nothing but its launch takes time."""
    times = launch_times(device)
    graph_us = statistics.median(times.graph) * 1e6 if times.graph else None
    return LaunchRate(statistics.median(times.eager) * 1e6, graph_us, _round_trip_us(device))


def _round_trip_us(device: str) -> float:
    times = []
    with torch.inference_mode():
        number = torch.zeros(1, device=device)
        for _ in range(ROUND_TRIPS):
            start = time.perf_counter()
            number.add_(1).item()
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
