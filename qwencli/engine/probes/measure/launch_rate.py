"""How fast this host launches work: the other limit of decoding, which launches hundreds of
kernels a token."""

from __future__ import annotations

import statistics
import time

import torch

from qwencli.engine.probes.answers import LaunchRate, Work
from qwencli.engine.probes.measure.timing import seconds_per_call, synchronize

LAUNCHES = 2000
NODES = 1000
ROUND_TRIPS = 200


def launch_rate(device: str, work: Work) -> LaunchRate:
    """One addition to a single number: nothing but its launch takes time."""
    with torch.inference_mode():
        number = torch.zeros(1, device=device)
        return LaunchRate(_eager_us(number), _graph_us(number), _round_trip_us(number))


def _eager_us(number: torch.Tensor) -> float:
    device = str(number.device)
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            number.add_(1)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / LAUNCHES * 1e6


def _graph_us(number: torch.Tensor) -> float | None:
    device = number.device
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        number.add_(1)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(NODES):
            number.add_(1)
    return seconds_per_call(str(device), graph.replay) / NODES * 1e6


def _round_trip_us(number: torch.Tensor) -> float:
    times = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        number.add_(1).item()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
