"""What torch does beside generating while it is watched: compiling, capturing, waiting, allocating.

For measurements: `DeviceEvents` notes when torch compiles or captures a graph and counts how often
the host waits for the device, without changing what an engine does.

`device_work` counts what a piece of work launched, by the profiler's account.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

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

    from qwencli.engine.instruments.timing import synchronize

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


# The words of the warning that torch's sync debug mode gives (c10/cuda/CUDAFunctions.cpp).
_SYNC_WARNING = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Span:
    """`name` is "compile" or "graph_capture"; seconds of `time.perf_counter`."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class AllocatorCounts:
    """Since the process began: calls of cudaMalloc and cudaFree, and requests that had to give
    cached memory back to the driver before they could be served."""

    device_allocs: int
    alloc_retries: int


class DeviceEvents:
    """A context manager; `spans` and `syncs` grow inside the block.

    `syncs` counts operations that make the host wait for the whole stream or device: those that
    torch's sync debug mode reports (`.item()`, blocking copies) and `torch.cuda.synchronize`. It
    is None off CUDA, where the host runs in step with the device. Waiting for an event is not
    counted: that is how engines read their tokens.
    """

    def __init__(self, device: str) -> None:
        self.spans: list[Span] = []
        self.syncs: int | None = 0 if device.startswith("cuda") else None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(_compiling(self.spans))
            if self.syncs is not None:
                stack.enter_context(_capturing(self.spans))
                stack.enter_context(_waiting(self._count))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _count(self) -> None:
        assert self.syncs is not None
        self.syncs += 1


def allocator_counts(device: str) -> AllocatorCounts | None:
    """None off CUDA, where torch keeps no such counts."""
    if not device.startswith("cuda"):
        return None
    import torch

    stats: dict[str, Any] = torch._C._cuda_memoryStats(torch.device(device).index or 0)
    return AllocatorCounts(
        device_allocs=stats["num_device_alloc"] + stats["num_device_free"],
        alloc_retries=stats["num_alloc_retries"],
    )


@contextmanager
def _compiling(spans: list[Span]) -> Iterator[None]:
    # Where nothing has been compiled yet, importing the compiler here would cost seconds.
    dynamo: Any = sys.modules.get("torch._dynamo.callback")
    if dynamo is None:
        yield
        return
    starts: list[float] = []

    def start(_: Any) -> None:
        starts.append(time.perf_counter())

    def end(_: Any) -> None:
        if starts:
            spans.append(Span("compile", starts.pop(), time.perf_counter()))

    handler = dynamo.callback_handler
    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        with suppress(ValueError):  # torch.compiler.reset() has dropped all callbacks
            handler.remove_start_callback(start)
            handler.remove_end_callback(end)


@contextmanager
def _capturing(spans: list[Span]) -> Iterator[None]:
    from torch.cuda import graphs

    kind: Any = graphs.graph
    enter, leave = kind.__enter__, kind.__exit__
    starts: list[float] = []

    def watched_enter(self: Any) -> Any:
        starts.append(time.perf_counter())
        return enter(self)

    def watched_leave(self: Any, *exc: object) -> Any:
        try:
            return leave(self, *exc)
        finally:
            spans.append(Span("graph_capture", starts.pop(), time.perf_counter()))

    kind.__enter__, kind.__exit__ = watched_enter, watched_leave
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave


@contextmanager
def _waiting(count: Callable[[], None]) -> Iterator[None]:
    import torch

    cuda: Any = torch.cuda
    synchronize, show, mode = cuda.synchronize, warnings.showwarning, cuda.get_sync_debug_mode()

    def watched(*arguments: Any, **named: Any) -> None:
        count()
        synchronize(*arguments, **named)

    def listen(message: Any, *rest: Any, **named: Any) -> None:
        if _SYNC_WARNING in str(message):
            count()
        else:
            show(message, *rest, **named)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{_SYNC_WARNING}")
        # What torch says of the mode itself, once a process.
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        warnings.showwarning = listen
        cuda.synchronize = watched
        cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            cuda.set_sync_debug_mode(mode)
            cuda.synchronize = synchronize
