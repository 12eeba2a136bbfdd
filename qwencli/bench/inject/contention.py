"""What competes with a run: a Python thread, a process on its core, users of the memory.

The programs run in processes of their own (`python -c`). Each prints a line when it is ready, and
ends by itself when its standard input is closed: when the process that started it is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

_BEGIN = """
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
"""
COMPUTING = f"""{_BEGIN}
print(flush=True)
while True:
    pass
"""
# Computes after a "+" on its standard input and waits after a "-". It is never stopped by a signal:
# a process that is stopped would not see its input close, and stay for ever.
COMPUTING_WHEN_TOLD = """
import os, select
print(flush=True)
going = False
while True:
    if not going or select.select([0], [], [], 0)[0]:
        said = os.read(0, 1)
        if not said:
            break
        going = said == b"+"
    for _ in range(5000 * going):
        pass
"""
# Copies more than any cache holds, in pieces small enough to go through the caches.
COPYING = f"""{_BEGIN}
source, target = memoryview(bytearray(b"x") * (1 << 26)), memoryview(bytearray(1 << 26))
print(flush=True)
while True:
    for at in range(0, 1 << 26, 1 << 19):
        target[at : at + (1 << 19)] = source[at : at + (1 << 19)]
"""
MOST_NEIGHBOURS = 8
_POLL_S = 0.005
# Long enough to be seen in any run; without an end a launch-bound run could take minutes.
COMPUTING_S = 3.0


@contextmanager
def python_thread() -> Iterator[None]:
    """A second Python thread in this process computes without pause, COMPUTING_S at most."""
    going = True

    def compute() -> None:
        end = time.perf_counter() + COMPUTING_S
        while going and time.perf_counter() < end:
            pass

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    try:
        yield
    finally:
        going = False
        thread.join()


@contextmanager
def shared_core() -> Iterator[None]:
    """The main thread is tied to one core, of which another process wants half."""
    if sys.platform != "linux":
        raise NotImplementedError("`needs` looks before this is called")
    cores = os.sched_getaffinity(0)
    core = {min(cores)}
    with programs(COMPUTING, 1) as (hog,):
        try:
            os.sched_setaffinity(hog.pid, core)
            os.sched_setaffinity(0, core)  # 0 = the calling thread alone
            yield
        finally:
            os.sched_setaffinity(0, cores)


def neighbours(program: str) -> AbstractContextManager[list[subprocess.Popen[bytes]]]:
    """Other processes run one of the programs above: as many as there are other processors, up to
    MOST_NEIGHBOURS."""
    return programs(program, min(MOST_NEIGHBOURS, max((os.cpu_count() or 1) - 1, 1)))


@contextmanager
def programs(program: str, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes of one of the programs above, ready."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-c", program]
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@contextmanager
def one_core() -> Iterator[None]:
    """The main thread is tied to one core and has it to itself."""
    if sys.platform != "linux":
        raise NotImplementedError("`needs` looks before this is called")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class PeakMemory:
    """Most resident memory of this process while the block runs, above what it began with.

    `growth_bytes` is filled at the end; it is looked at every 5 ms, so shorter peaks are missed.
    """

    growth_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        import psutil

        self._process = psutil.Process()
        self._began = self._most = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.is_set():
            self._most = max(self._most, self._process.memory_info().rss)
            time.sleep(_POLL_S)

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        self.growth_bytes = self._most - self._began
