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
from typing import NamedTuple

_TASKS = Path("/proc/self/task")
_STAT = Path("/proc/stat")
# Threads that one reading looks at: 0.8 us each. Where the CPU computes, a pool as wide as a large
# machine has parts that wait alike, of which these are the busiest; a GPU waits for none of them.
MOST_THREADS, MOST_BESIDE_A_GPU = 16, 4
_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
_IDLE, _IOWAIT, _STEAL = 3, 4, 7  # fields of the "cpu" line of /proc/stat

Reading = tuple[bytes, ...]


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
