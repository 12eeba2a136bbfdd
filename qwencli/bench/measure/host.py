"""What one run cost the host: CPU share, garbage collection, preemption.

Cheap enough to leave on: two clock readings at each end and one callback a collection.
"""

from __future__ import annotations

import gc
import importlib
import time
from typing import Any, Self


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
