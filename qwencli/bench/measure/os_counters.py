"""Counters that Linux keeps of this process: threads, processor core, control group.

- `/proc/self/task/ID/schedstat` holds, for one thread, nanoseconds on a processor, nanoseconds
  runnable but waiting for one, and the number of times it was put on one
  (Documentation/scheduler/sched-stats.rst). The second is what another program costs it.
- `scaling_cur_freq` of a core is what the kernel measured or set last, in kHz
  (Documentation/admin-guide/pm/cpufreq.rst). Virtual machines mostly have no such file.
- `cpu.stat` of a control group with a processor limit (`cpu.max`, `docker --cpus`) counts for how
  long the limit kept it from running, over all processors: `throttled_usec` in version 2,
  `throttled_time` (ns) in version 1. A limit of any group above holds too, so all are read up to
  the root that this process sees.
- `cpu.pressure`, `memory.pressure` and `io.pressure` say for how long some task of the group waited
  for that (Documentation/accounting/psi.rst); where the group has none, those of the whole system
  do.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from qwencli.engine.machine.cpu_threads import PROC, cpu_groups

_TASKS = Path("/proc/self/task")
# Threads that one reading looks at: 0.8 us each. Where the CPU computes, a pool as wide as a large
# machine has parts that wait alike, of which these are the busiest; a GPU waits for none of them.
MOST_THREADS, MOST_BESIDE_A_GPU = 16, 4
# Of psutil's fields, which differ by system; those of guests are part of these.
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")

Reading = tuple[bytes, ...]
_CORES = Path("/sys/devices/system/cpu")
PRESSURES = ("cpu", "memory", "io")
# The names of the same counter in the two versions, and what makes milliseconds of it.
_THROTTLED_MS = {b"throttled_usec": 1e-3, b"throttled_time": 1e-6}


class RunQueue:
    """Waits of the main thread and of the busiest others; a context manager.

    A reading is raw text, the main thread's first, so that parsing stays out of what is measured;
    () where the system does not tell.

    Args:
        most: threads to read, the main one among them.
    """

    def __init__(self, most: int = MOST_THREADS) -> None:
        self._most = most
        self._files: tuple[int, ...] = ()

    def __enter__(self) -> RunQueue:
        main = threading.main_thread().native_id
        others = sorted(_times(), key=lambda times: -times.ran_ns)
        wanted = [main, *(times.thread for times in others if times.thread != main)]
        for thread in wanted[: self._most]:
            with suppress(OSError):  # it has ended meanwhile
                path = _TASKS / str(thread) / "schedstat"
                self._files += (os.open(path, os.O_RDONLY),)
        return self

    def read(self) -> Reading:
        if sys.platform == "win32":  # no schedstat: there are no files either
            return ()
        try:
            return tuple([os.pread(file, 64, 0) for file in self._files])
        except OSError:  # a thread that ended takes its file with it
            return tuple([reread(file, 64) for file in self._files])

    def __exit__(self, *exc: object) -> None:
        for file in self._files:
            os.close(file)
        self._files = ()


def reread(file: int, most: int) -> bytes:
    """What an open file of the system's says now; empty where it cannot be read."""
    if sys.platform != "win32":
        with suppress(OSError):
            return os.pread(file, most, 0)
    return b""


class Waits(NamedTuple):
    """Between two readings, in ms. Runnable, but waiting for a processor: the main thread, and of
    the other threads (torch's helpers) the one that waited longest; and what these others ran."""

    main_ms: float
    helper_ms: float
    helper_cpu_ms: float


def waits(earlier: Reading, later: Reading) -> Waits | None:
    """None unless both readings are of the same threads and the main one's is there."""
    if not earlier or len(earlier) != len(later):
        return None
    pairs = [
        (tuple(map(int, before.split()[:2])), tuple(map(int, after.split()[:2])))
        if before and after
        else ((0, 0), (0, 0))
        for before, after in zip(earlier, later, strict=True)
    ]
    (main, *others) = [((b[0] - a[0]) / 1e6, (b[1] - a[1]) / 1e6) for a, b in pairs]
    return Waits(
        main_ms=main[1],
        helper_ms=max((waited for _, waited in others), default=0.0),
        helper_cpu_ms=sum(ran for ran, _ in others),
    )


@dataclass(frozen=True)
class ThreadTimes:
    thread: int
    ran_ns: int


def _times(threads: Iterable[int] | None = None) -> list[ThreadTimes]:
    """How long these threads, or all, have run; those that have ended are left out."""
    if not _TASKS.is_dir():
        return []
    if threads is None:
        threads = [int(path.name) for path in _TASKS.iterdir()]
    found = []
    for thread in threads:
        with suppress(OSError, IndexError):
            text = (_TASKS / str(thread) / "schedstat").read_text(encoding="ascii")
            found.append(ThreadTimes(thread, int(text.split()[0])))
    return found


def other_python_ms() -> float | None:
    """Processor time of all Python threads but the main one; None where the system is silent."""
    if not _TASKS.is_dir():
        return None
    main = threading.main_thread()
    threads = [t.native_id for t in threading.enumerate() if t is not main and t.native_id]
    return sum(times.ran_ns for times in _times(threads)) / 1e6


@dataclass(frozen=True)
class SystemTimes:
    """All processors together, since the system started: busy, and taken by the hypervisor (None
    where the system does not tell)."""

    busy_ms: float
    steal_ms: float | None


def system_times() -> SystemTimes | None:
    """In steps of the system's clock tick (10 ms on Linux); None where it does not tell."""
    import psutil

    try:
        times = psutil.cpu_times()._asdict()
    except OSError:
        return None
    busy_s = sum(times.get(name, 0.0) for name in _BUSY)
    steal_s = times.get("steal")
    return SystemTimes(1e3 * busy_s, None if steal_s is None else 1e3 * steal_s)


def _core_reader() -> Callable[[], int] | None:
    """Asks on which core this thread is; None where the system's library cannot say."""
    try:
        reader: Any = ctypes.CDLL(None).sched_getcpu
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without name
        return None
    core: Callable[[], int] = reader
    return core


class CoreClock:
    """Reads it; a context manager. Costs nothing where there is nothing to read."""

    def __init__(self, cores: Path = _CORES, core: Callable[[], int] | None = None) -> None:
        self._cores = cores
        found = any(cores.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._core = (core or _core_reader()) if found else None
        self._files: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def read_mhz(self) -> float | None:
        """The clock of this moment's core; None where it is not known."""
        if sys.platform == "win32" or self._core is None:
            return None
        core = self._core()
        try:
            if core not in self._files:
                path = self._cores / f"cpu{core}" / "cpufreq" / "scaling_cur_freq"
                self._files[core] = os.open(path, os.O_RDONLY)
            return int(os.pread(self._files[core], 32, 0)) / 1e3
        except (OSError, ValueError):  # a core that was taken away, or "<unknown>"
            return None


class Stalls(NamedTuple):
    """Between two readings, in ms; None = the system does not tell."""

    throttled_ms: float | None = None
    cpu_pressure_ms: float | None = None
    memory_pressure_ms: float | None = None
    io_pressure_ms: float | None = None


class CgroupStats:
    """Reads them; a context manager. A reading is raw text, parsed by `stalls` afterwards."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._files: tuple[int, ...] = ()
        self._limits = 0

    def __enter__(self) -> Self:
        groups = list(cpu_groups(self._proc))
        limits = [path for group in groups if (path := group / "cpu.stat").is_file()]
        self._files = tuple(file for path in limits if (file := _opened(path)) is not None)
        self._limits = len(self._files)
        for name in PRESSURES:
            places = [group / f"{name}.pressure" for group in groups]
            opened = map(_opened, [*places, self._proc / "pressure" / name])
            file = next((file for file in opened if file is not None), None)
            self._files += (file if file is not None else -1,)
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files:
            if file >= 0:
                os.close(file)
        self._files = ()

    def read(self) -> Reading:
        return tuple([reread(file, 1024) for file in self._files])

    def stalls(self, earlier: Reading, later: Reading) -> Stalls:
        """What lay between two readings of this object."""
        at = self._limits
        throttled = [
            after - before
            for a, b in zip(earlier[:at], later[:at], strict=True)
            if (before := _throttled_ms(a)) is not None and (after := _throttled_ms(b)) is not None
        ]
        pressures = [
            None if (before := _stalled_ms(a)) is None or (after := _stalled_ms(b)) is None
            else after - before
            for a, b in zip(earlier[at:], later[at:], strict=True)
        ]  # fmt: skip
        return Stalls(max(throttled, default=None), *pressures)


def _opened(path: Path) -> int | None:
    """A descriptor that can be read from; None where there is none."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    if not reread(file, 1024):  # pressure that was turned off opens, and cannot be read
        os.close(file)
        return None
    return file


def _throttled_ms(text: bytes) -> float | None:
    for line in text.splitlines():
        name, _, value = line.partition(b" ")
        if name in _THROTTLED_MS:
            return int(value) * _THROTTLED_MS[name]
    return None


def _stalled_ms(text: bytes) -> float | None:
    """Milliseconds, from the line "some avg10=0.00 avg60=0.00 avg300=0.00 total=81094411" (us)."""
    for line in text.splitlines():
        if line.startswith(b"some "):
            return int(line.rpartition(b"=")[2]) / 1e3
    return None
