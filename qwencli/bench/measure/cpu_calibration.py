"""How fast the host is at work that is always the same.

The clock of a core does not say it: virtual machines tell none, and a core at full clock is slow
where something else uses what it has. No counter of the processor is needed, so this is to be had
on every system. Two parts, because the ways out differ:

    loop   stays within the core: longer at a lower clock, on a core of the slow kind, or while
           something else runs on the core's other thread
    walk   visits objects that a run has driven out of the core's own caches (as lmbench's
           lat_mem_rd does): longer while other programs, or other guests of the machine, use the
           caches and the memory that cores share
"""

from __future__ import annotations

import functools
import random
import time
from typing import NamedTuple

# The least of so many counts: an interrupt makes one of them longer.
_LOOPS, _WALKS = 5, 3
_TURNS = 200
# With their places in a list half a megabyte: what the caches that cores have of their own hold
# beside little else.
_OBJECTS = 12_000


class CpuCalibration(NamedTuple):
    """How fast the calling thread's core was at one moment, in microseconds."""

    cpu_loop_us: float
    pointer_chase_us: float


def calibrate_cpu() -> CpuCalibration:
    """Measure it, in less than a millisecond."""
    walk_ns = min(_walk_ns(objects) for objects in _places())
    return CpuCalibration(min(_loop_ns() for _ in range(_LOOPS)) / 1e3, walk_ns / 1e3)


@functools.cache
def _places() -> list[list[int]]:
    """Objects in another order than they lie in memory, so that none can be fetched ahead."""
    order = random.Random(0)
    places = [list(range(1000, 1000 + _OBJECTS)) for _ in range(_WALKS)]
    for objects in places:
        order.shuffle(objects)
    return places


def _walk_ns(objects: list[int]) -> int:
    start = time.perf_counter_ns()
    sum(objects)
    return time.perf_counter_ns() - start


def _loop_ns() -> int:
    start = time.perf_counter_ns()
    total = 0
    for number in range(_TURNS):
        total += number
    return time.perf_counter_ns() - start
