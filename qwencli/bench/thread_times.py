"""Processor time and run-queue delay of this process's threads, where the system tells (Linux).

`/proc/self/task/ID/schedstat` holds, for one thread, nanoseconds on a processor, nanoseconds
runnable but waiting for one, and the number of times it was put on one
(Documentation/scheduler/sched-stats.rst). The second figure is what another program costs it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TASKS = Path("/proc/self/task")
_STAT = Path("/proc/stat")
# Threads that one reading looks at: 0.8 us each.
MOST_THREADS = 4
_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
_IDLE, _IOWAIT, _STEAL = 3, 4, 7  # fields of the "cpu" line of /proc/stat

Reading = tuple[bytes, ...]


class RunQueue:
    """Waits of the main thread and of the busiest others; a context manager.

    A reading is raw text, so that parsing stays out of what is measured; () where the system does
    not tell.
    """

    def __init__(self) -> None:
        self._files: tuple[int, ...] = ()

    def __enter__(self) -> RunQueue:
        main = threading.main_thread().native_id
        others = sorted(_times(), key=lambda times: -times.ran_ns)
        wanted = [main, *(times.thread for times in others if times.thread != main)]
        with suppress(OSError):
            for thread in wanted[:MOST_THREADS]:
                path = _TASKS / str(thread) / "schedstat"
                self._files += (os.open(path, os.O_RDONLY),)
        return self

    def read(self) -> Reading:
        if sys.platform == "win32":  # no schedstat: there are no files either
            return ()
        try:
            return tuple([os.pread(file, 64, 0) for file in self._files])
        except OSError:  # a thread that ended takes its file with it
            return ()

    def __exit__(self, *exc: object) -> None:
        for file in self._files:
            os.close(file)
        self._files = ()


def waited_ms(earlier: Reading, later: Reading) -> float | None:
    """The longest wait among the threads; None unless both readings are of the same threads."""
    if not earlier or len(earlier) != len(later):
        return None
    pairs = zip(earlier, later, strict=True)
    return max(int(after.split()[1]) - int(before.split()[1]) for before, after in pairs) / 1e6


@dataclass(frozen=True)
class ThreadTimes:
    thread: int
    ran_ns: int


def _times(threads: Iterable[int] | None = None) -> list[ThreadTimes]:
    """Of these threads, or of all; those that have ended are left out."""
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
    """All processors together, since the system started: busy, and taken by the hypervisor."""

    busy_ms: float
    steal_ms: float


def system_times() -> SystemTimes | None:
    """In steps of the system's clock tick (10 ms on Linux); None where there is no /proc/stat."""
    try:
        with _STAT.open(encoding="ascii") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    tick_ms = 1e3 * _TICK_S
    busy = sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT]
    return SystemTimes(busy * tick_ms, ticks[_STEAL] * tick_ms)
