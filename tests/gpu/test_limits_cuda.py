"""The machine's limits, and what work asks of it, on a real GPU."""

from __future__ import annotations

import torch

from qwencli.engine.instruments.device_events import device_work
from qwencli.engine.instruments.timing import launch_times, read_bandwidth

DEVICE = "cuda:0"


def test_memory_reads_faster_than_any_host_memory():
    assert read_bandwidth(DEVICE, 1 << 30) > 1e11


def test_a_graph_launches_faster_than_the_host():
    times = launch_times(DEVICE)
    assert min(times.graph) < min(times.eager) < 1e-4


def test_kernels_of_a_graph_are_counted_and_its_launch_is_one():
    number = torch.zeros(1, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            number.add_(1)
    graph.replay()
    eager = device_work(DEVICE, lambda: [number.add_(1) for _ in range(10)])
    replayed = device_work(DEVICE, lambda: [graph.replay() for _ in range(3)])
    assert eager is not None
    assert replayed is not None
    assert (eager.kernels, eager.launches) == (10, 10)
    assert (replayed.kernels, replayed.launches) == (30, 3)
    assert replayed.busy_ms > 0.0
