"""How fast this host launches work: the other limit of decoding, which launches hundreds of
kernels a token."""

from __future__ import annotations

import statistics
import time

import torch

from qwencli.engine.instruments.limits import launch_times
from qwencli.engine.instruments.probes.answers import LaunchRate, Work

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
