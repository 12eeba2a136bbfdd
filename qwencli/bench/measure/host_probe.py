"""What the host did during a run: totals for runs.csv, and the rows of host.csv.

`HostProbe` counts a whole run: two clock readings at each end and one callback a collection.
`TokenProbe` follows the tokens: one look at the clock per token; clocks and counters are read every
few tokens and after one that took long, and what costs more after such a one only.
`probe_overhead` measures the sum. How fast the processor is (`cpu_calibration`) is measured when
the run has ended, and within it where tokens take so long that it does not matter.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self

from qwencli.bench.measure.cpu_calibration import CpuCalibration, calibrate_cpu
from qwencli.bench.measure.os_counters import (
    MOST_BESIDE_A_GPU,
    MOST_THREADS,
    CgroupStats,
    CoreClock,
    Reading,
    RunQueue,
    SystemTimes,
    other_python_ms,
    system_times,
    waits,
)
from qwencli.engine.instruments.device_events import AllocatorCounts, DeviceEvents, allocator_counts
from qwencli.results import GenerationChunk, GenerationResult

# A token that took this much longer than usual gets a row; what counts as a gap is decided later,
# by a stricter rule, over all runs of the cell.
SLOW_FACTOR = 1.75
LEAST_EXCESS_S = 0.001
# Tokens after which "usual" is first known.
LEARNING = 5
# A slow token's row reaches back to the reading before, so at most this many tokens.
READ_EVERY = 16
# Tokens that take so long have the host's speed measured between them, so often: a quarter of a
# millisecond in a tenth of a second.
LONG_TOKEN_S, PACE_EVERY_S = 0.01, 0.1

Row = dict[str, Any]


def _involuntary_switches() -> int | None:
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:  # Windows has no getrusage
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


class HostProbe:
    """Measures the block it is around; `row()` afterwards gives the columns of runs.csv.

    CPU percentages are of one core: a process with four busy threads shows 400. `collections`
    holds when each garbage collection began and ended, on `time.perf_counter`.
    """

    def __enter__(self) -> Self:
        self.collections: list[tuple[float, float]] = []
        self._gc_since: float | None = None
        gc.callbacks.append(self._on_gc)
        self._switches = _involuntary_switches()
        self._process, self._thread = time.process_time(), time.thread_time()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        wall = max(time.perf_counter() - self._start, 1e-9)
        process, thread = time.process_time(), time.thread_time()
        switches = _involuntary_switches()
        gc.callbacks.remove(self._on_gc)
        self._row = {
            "process_cpu_percent": 100.0 * (process - self._process) / wall,
            "main_thread_cpu_percent": 100.0 * (thread - self._thread) / wall,
            "gc_pause_ms": 1e3 * sum(end - start for start, end in self.collections),
            "involuntary_switches": (
                None if switches is None or self._switches is None else switches - self._switches
            ),
        }

    def row(self) -> dict[str, float | int | None]:
        return self._row

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_since = time.perf_counter()
        elif self._gc_since is not None:
            self.collections.append((self._gc_since, time.perf_counter()))
            self._gc_since = None


def _usage_reader() -> Any:
    """Counts page faults and context switches of the process; None on Windows."""
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return lambda: None
    return lambda: resource.getrusage(resource.RUSAGE_SELF)


class _Reading(NamedTuple):
    """`token` of them had arrived (0 = the request was made)."""

    token: int
    t_s: float
    main_ns: int
    process_ns: int
    waits: Reading
    usage: Any
    core_mhz: float | None
    syncs: int | None


class _Counts(NamedTuple):
    """What is read at both ends of a phase and after slow tokens only."""

    other_python_ms: float | None
    system: SystemTimes | None
    allocator: AllocatorCounts | None
    cgroup: Reading


class TokenProbe:
    """Watches the runs of one engine, one at a time: `with probe: result = probe.drain(stream)`.

    `rows(collections)` then gives the run's rows of host.csv, `cpu_calibration()` its columns of
    runs.csv.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._threads = MOST_THREADS if device == "cpu" else MOST_BESIDE_A_GPU
        self._limit_s = float("inf")
        self._usage = _usage_reader()
        self._clock = CoreClock()
        calibrate_cpu()  # makes what it walks over, which takes a while

    def __enter__(self) -> Self:
        self._stops: list[float] = []
        self._times: list[float] = []
        self._readings: list[_Reading] = []
        self._slow: list[int] = []
        self._counts: dict[int, _Counts] = {}
        self._calibrations: list[CpuCalibration] = []
        self._paced_s = 0.0
        with ExitStack() as stack:
            self._queue = stack.enter_context(RunQueue(self._threads))
            self._cgroup = stack.enter_context(CgroupStats())
            stack.enter_context(self._clock)
            self._events = stack.enter_context(DeviceEvents(self._device))
            stack.enter_context(_noting_stops(self._stops))
            self._stack = stack.pop_all()
        self._read(time.perf_counter())
        self._count()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._calibrations.append(calibrate_cpu())

    def drain(self, chunks: Iterator[GenerationChunk]) -> GenerationResult:
        """Run a stream to its end and return its result."""
        result = None
        for chunk in chunks:
            if chunk.token_ids:
                self.note()
            result = chunk.result
            if result is not None and len(self._times) > 1:
                # The counters after the last token, which come a few microseconds late.
                self._read(self._times[-1])
                self._count()
        assert result is not None, "a stream ends with the chunk that carries its result"
        return result

    def resume(self) -> None:
        """Go on after some tokens that were not noted; this one is not judged."""
        self._times.append(time.perf_counter())

    def note(self) -> None:
        """A token has arrived: see whether it was slow, and read the counters now and then."""
        now = time.perf_counter()
        times = self._times
        times.append(now)
        token = len(times)
        if token == 1:
            self._read(now)
            self._count()
        elif now - times[-2] > self._limit_s:
            self._slow.append(len(self._readings))
            self._read(now)
            self._count()
        elif token % READ_EVERY == 0:
            self._read(now)
        if token == LEARNING and self._limit_s == float("inf"):
            self._limit_s = _slow_s(times)
        if token > 1 and now - times[-2] > LONG_TOKEN_S and now - self._paced_s > PACE_EVERY_S:
            self._calibrations.append(calibrate_cpu())
            self._paced_s = now

    def _read(self, now: float) -> None:
        self._readings.append(
            _Reading(
                len(self._times),
                now,
                time.thread_time_ns(),
                time.process_time_ns(),
                self._queue.read(),
                self._usage(),
                self._clock.read_mhz(),
                self._events.syncs,
            )
        )

    def _count(self) -> None:
        self._counts[len(self._readings) - 1] = _Counts(
            other_python_ms(),
            system_times(),
            allocator_counts(self._device),
            self._cgroup.read(),
        )

    def cpu_calibration(self) -> dict[str, float]:
        """The run's means of what was measured within it and at its end."""
        means = CpuCalibration(
            *(statistics.fmean(values) for values in zip(*self._calibrations, strict=True))
        )
        return means._asdict()

    def rows(self, collections: Sequence[tuple[float, float]]) -> list[Row]:
        """Rows of host.csv in the order of time, for a run that has ended.

        Args:
            collections: when garbage collections began and ended, on `time.perf_counter`.
        """
        tokens = len(self._times)
        rows = [
            *(_event("gc", start, end) for start, end in collections),
            *(_event(span.name, span.start_s, span.end_s) for span in self._events.spans),
            *(_event("stop", at, at) for at in self._stops),
        ]
        if tokens:
            rows.append(self._interval("prefill", 0, 1))
        if tokens > 1:
            rows.append(self._interval("decode", 1, len(self._readings) - 1))
            rows += [self._interval("token", at - 1, at) for at in self._slow]
            # The quickest run says what is usual: after a disturbed one most would seem quick.
            self._limit_s = min(self._limit_s, _slow_s(self._times))
        return sorted(rows, key=lambda row: row["t_s"])

    def _interval(self, event: str, first: int, last: int) -> Row:
        a, b = self._readings[first], self._readings[last]
        usage = (
            {}
            if b.usage is None
            else {
                "voluntary_switches": b.usage.ru_nvcsw - a.usage.ru_nvcsw,
                "involuntary_switches": b.usage.ru_nivcsw - a.usage.ru_nivcsw,
                "minor_faults": b.usage.ru_minflt - a.usage.ru_minflt,
                "major_faults": b.usage.ru_majflt - a.usage.ru_majflt,
            }
        )
        clocks = [r.core_mhz for r in self._readings[first + 1 : last + 1] if r.core_mhz]
        return {
            **_event(event, a.t_s, b.t_s),
            "core_mhz": statistics.fmean(clocks) if clocks else None,
            "tokens": b.token - a.token,
            "main_cpu_ms": (b.main_ns - a.main_ns) / 1e6,
            "process_cpu_ms": (b.process_ns - a.process_ns) / 1e6,
            **_waits(a.waits, b.waits),
            "syncs": None if a.syncs is None or b.syncs is None else b.syncs - a.syncs,
            **usage,
            **self._counted(first, last),
        }

    def _counted(self, first: int, last: int) -> Row:
        """Differences of what is not read at every reading: since it was last read."""
        after = self._counts[last]
        before = self._counts[max(at for at in self._counts if at <= first)]
        row: Row = {}
        if after.other_python_ms is not None and before.other_python_ms is not None:
            row["other_python_ms"] = max(0.0, after.other_python_ms - before.other_python_ms)
        if after.system and before.system:
            row["system_busy_ms"] = after.system.busy_ms - before.system.busy_ms
            if after.system.steal_ms is not None and before.system.steal_ms is not None:
                row["steal_ms"] = after.system.steal_ms - before.system.steal_ms
        if after.allocator and before.allocator:
            row["device_allocs"] = after.allocator.device_allocs - before.allocator.device_allocs
            row["alloc_retries"] = after.allocator.alloc_retries - before.allocator.alloc_retries
        return {**row, **self._cgroup.stalls(before.cgroup, after.cgroup)._asdict()}


def _waits(earlier: Reading, later: Reading) -> Row:
    found = waits(earlier, later)
    if found is None:
        return {}
    return {
        "runqueue_ms": max(found.main_ms, found.helper_ms),
        "main_runqueue_ms": found.main_ms,
        "helper_runqueue_ms": found.helper_ms,
        "helper_cpu_ms": found.helper_cpu_ms,
    }


def _slow_s(times: Sequence[float]) -> float:
    """From what time on a token is slow, given when some tokens came (s)."""
    usual = statistics.median(b - a for a, b in itertools.pairwise(times))
    return max(SLOW_FACTOR * usual, usual + LEAST_EXCESS_S)


def _event(event: str, start_s: float, end_s: float) -> Row:
    return {"t_s": end_s, "event": event, "span_ms": 1e3 * (end_s - start_s)}


@contextmanager
def _noting_stops(stops: list[float]) -> Iterator[None]:
    """Note when the process goes on after having been stopped (SIGSTOP, Ctrl-Z)."""
    going_on: Any = getattr(signal, "SIGCONT", None)
    if going_on is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(going_on, lambda *_: stops.append(time.perf_counter()))
    try:
        yield
    finally:
        signal.signal(going_on, before)
