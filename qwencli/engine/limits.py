"""What this device can do at best: read memory, take launches. And what work asks of it.

Run beside a measurement, never inside one: each function keeps the device busy by itself.
`python -m qwencli.engine.limits DEVICE` prints the limits as one JSON line, for callers that never
import torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Beyond the largest, on each kind of device, size makes no difference.
LARGEST_BUFFER, LARGEST_BUFFER_ON_CPU, SMALLEST_BUFFER = 1 << 30, 1 << 28, 1 << 22
_COLUMNS = 4096
_READ_S = 0.3
_SAMPLES = 5
_LAUNCHES = 2000
_GRAPH_NODES = 500

# Calls of the CUDA runtime and driver that put work on the device, by the start of their names.
_LAUNCH_CALLS = (
    "cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch",
    "cudaMemcpyAsync", "cuMemcpy", "cudaMemsetAsync", "cuMemset",
)  # fmt: skip
_NOT_KERNELS = ("Memcpy", "Memset")


@dataclass(frozen=True)
class LaunchRate:
    """Launches a second of an operation that does next to nothing.

    `eager`: one by one from Python through torch. `graph`: nodes of a CUDA graph in one replay;
    None off CUDA.
    """

    eager: float
    graph: float | None


@dataclass(frozen=True)
class DeviceWork:
    """What some work put on the device: host calls, kernels, and their summed time in ms."""

    launches: int
    kernels: int
    busy_ms: float


def read_bandwidth(device: str, working_set: int) -> float:
    """Bytes a second of reading a buffer of about `working_set` bytes over and over.

    By matrix-vector products, which is how decoding reads weights. The buffer is as large as what
    one token reads, within bounds: a model that fits into a processor's caches is held against
    the caches. The best of _SAMPLES, because other
    load only ever takes from what the machine can do.
    """
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    largest = LARGEST_BUFFER_ON_CPU if device == "cpu" else LARGEST_BUFFER
    size = min(largest, max(SMALLEST_BUFFER, working_set))
    if device.startswith("cuda"):
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    rows = max(1, size // (_COLUMNS * dtype.itemsize))
    with torch.inference_mode():
        matrix = torch.ones(rows, _COLUMNS, dtype=dtype, device=device)
        vector = torch.ones(_COLUMNS, dtype=dtype, device=device)
        out = torch.empty(rows, dtype=dtype, device=device)

        def read() -> object:
            return torch.mv(matrix, vector, out=out)

        once_s = max(_seconds(device, read, 1), _seconds(device, read, 1))
        times = max(1, int(_READ_S / _SAMPLES / once_s))
        best_s = min(_seconds(device, read, times) for _ in range(_SAMPLES))
    return matrix.nbytes * times / best_s


def launch_rate(device: str) -> LaunchRate:
    """How fast this host launches additions to a single number."""
    import torch

    with torch.inference_mode():
        number = torch.zeros(1, device=device)

        def add() -> object:
            return number.add_(1)

        _seconds(device, add, _LAUNCHES)
        best_s = min(_seconds(device, add, _LAUNCHES) for _ in range(_SAMPLES))
        return LaunchRate(_LAUNCHES / best_s, _graph_rate(device, number))


def _graph_rate(device: str, number: torch.Tensor) -> float | None:
    if not device.startswith("cuda"):
        return None
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(_GRAPH_NODES):
            number.add_(1)
    _seconds(device, graph.replay, 3)
    return _GRAPH_NODES / (min(_seconds(device, graph.replay, 4) for _ in range(_SAMPLES)) / 4)


def _seconds(device: str, work: Callable[[], object], times: int) -> float:
    """Wall time of calling `work` that often, the device's part included."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def device_work(device: str, work: Callable[[], object]) -> DeviceWork | None:
    """Count what `work` launches, under torch's profiler (which slows the host, not the kernels).

    None off CUDA, and where the profiler sees nothing (no access to the counters).
    """
    if not device.startswith("cuda"):
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True
    ) as recorded:
        work()
        _synchronize(device)
    return count_work(recorded.events() or ())


def count_work(events: Any) -> DeviceWork | None:
    """From the profiler's events; None where none of them ran on the device."""
    on_device = [event for event in events if "CUDA" in str(event.device_type)]
    kernels = [event for event in on_device if not event.name.startswith(_NOT_KERNELS)]
    if not kernels:
        return None
    launches = sum(
        event.name.startswith(_LAUNCH_CALLS) for event in events if "CPU" in str(event.device_type)
    )
    busy_us = sum(float(event.time_range.elapsed_us()) for event in on_device)
    return DeviceWork(launches, len(kernels), busy_us / 1e3)


def main(device: str) -> int:
    """Print what decoding depends on, as one JSON line."""
    start = time.perf_counter()
    import torch  # noqa: F401  part of the start of every worker

    start_s = time.perf_counter() - start
    answer = {
        "read_bandwidth": read_bandwidth(device, LARGEST_BUFFER),
        "launch_rate": launch_rate(device).eager,
        "start_s": start_s,
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
