"""What a piece of work put on the device, by the profiler's account."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qwencli.engine.instruments.timing import synchronize

# Calls of the CUDA runtime and driver that put work on the device, by the start of their names.
_LAUNCH_CALLS = (
    "cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch",
    "cudaMemcpyAsync", "cuMemcpy", "cudaMemsetAsync", "cuMemset",
)  # fmt: skip
_NOT_KERNELS = ("Memcpy", "Memset")


@dataclass(frozen=True)
class DeviceWork:
    """Host calls, kernels by number and by name (in the order of first use), and for how long the
    device was at work, copies included (ms)."""

    launches: int
    kernels: int
    names: tuple[str, ...]
    busy_ms: float


def device_work(device: str, work: Callable[[], object]) -> DeviceWork | None:
    """Count what `work` launches, under torch's profiler (which slows the host, not the kernels).

    None off CUDA, and where the profiler sees nothing (no access to the counters).
    """
    if not device.startswith("cuda"):
        return None
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    # Newer versions warn of events that are dropped without acc_events.
    with profile(activities=activities, acc_events=True) as recorded:
        work()
        synchronize(device)
    return count_work(recorded.events() or ())


def count_work(events: Any) -> DeviceWork | None:
    """From the profiler's events; None where none of them ran on the device."""
    on_device = [event for event in events if "CUDA" in str(event.device_type)]
    kernels = [event.name for event in on_device if not event.name.startswith(_NOT_KERNELS)]
    if not kernels:
        return None
    launches = sum(
        event.name.startswith(_LAUNCH_CALLS) for event in events if "CPU" in str(event.device_type)
    )
    spans = [(event.time_range.start, event.time_range.end) for event in on_device]
    names = tuple(dict.fromkeys(kernels))
    return DeviceWork(launches, len(kernels), names, covered(spans) / 1e3)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line the spans (start, end) cover together.

    Kernels that are launched before the one in front has ended overlap it.
    """
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
