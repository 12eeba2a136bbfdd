"""The faults: each makes one cause happen, inside the measured process or beside it.

A fault disturbs one run through the stream of its chunks: what it does between two chunks is, to
the engine and to the probes, time that passes while a token is made.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwencli.bench.causes import Cause
from qwencli.bench.inject.contention import COMPUTING_WHEN_TOLD
from qwencli.bench.inject.pauser import Pauser
from qwencli.engine.instruments import disturbances
from qwencli.engine.machine.child_process import python_command
from qwencli.errors import UsageError
from qwencli.results import GenerationChunk

Chunks = Iterator[GenerationChunk]
# When a fault began and ended, on `time.perf_counter`.
Span = tuple[float, float]

MOMENTS = 3
# Longer than the tokens that an engine may have on their way to the GPU (eight of 4 ms).
SHORTEST_S, LONGEST_S = 0.06, 0.12
HEAP_OBJECTS = 300_000
BEGIN_EARLY = 0.25  # of the run
# One takes half a core in turns of 3 ms, which the steps already on their way to a GPU outlast.
GPU_HOGS = 16
ALL = "ALL"


class Fault(ABC):
    """One cause on purpose. Made once in a process, `close`d at its end."""

    cause: Cause

    def __init__(self, device: str) -> None:
        self.device = device

    @abstractmethod
    def disturb(self, chunks: Chunks, tokens: int, chance: random.Random) -> Iterator[Any]:
        """Pass the chunks of a run of `tokens` tokens on, disturbed; `spans` says when."""

    spans: Sequence[Span] = ()

    def close(self) -> None:  # noqa: B027 - most faults start nothing beside this process
        """End what was started beside this process."""


class MomentaryFault(Fault):
    """Something that happens between two tokens, at MOMENTS places of a run."""

    @abstractmethod
    def act(self, seconds: float, chance: random.Random) -> None:
        """Disturb for about so long."""

    def begin_run(self) -> None:
        """Make ready; not part of the fault."""

    def end_run(self) -> None:
        """Tidy up."""

    def disturb(self, chunks: Chunks, tokens: int, chance: random.Random) -> Iterator[Any]:
        spans: list[Span] = []
        self.spans = spans
        moments = {tokens * (2 * i + 1) // (2 * MOMENTS) for i in range(MOMENTS)}
        moments = {moment + chance.randrange(-3, 4) for moment in moments}
        self.begin_run()
        try:
            for token, chunk in enumerate(chunks):
                if token in moments:
                    start = time.perf_counter()
                    self.act(chance.uniform(SHORTEST_S, LONGEST_S), chance)
                    spans.append((start, time.perf_counter()))
                yield chunk
        finally:
            self.end_run()


class GarbageCollection(MomentaryFault):
    cause = Cause.GC

    def begin_run(self) -> None:
        self._heap = [{"number": number} for number in range(HEAP_OBJECTS)]

    def end_run(self) -> None:
        del self._heap

    def act(self, seconds: float, chance: random.Random) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            gc.collect()


class Idle(MomentaryFault):
    cause = Cause.IDLE_GAP

    def act(self, seconds: float, chance: random.Random) -> None:
        time.sleep(seconds)


class Recompile(MomentaryFault):
    cause = Cause.RECOMPILE

    def __init__(self, device: str) -> None:
        super().__init__(device)
        disturbances.compile_for(0.0)  # the compiler's own first import is no recompile

    def act(self, seconds: float, chance: random.Random) -> None:
        disturbances.compile_for(seconds)

    def end_run(self) -> None:
        disturbances.forget_compilations()


class AllocatorChurn(MomentaryFault):
    cause = Cause.ALLOCATOR

    def act(self, seconds: float, chance: random.Random) -> None:
        disturbances.churn_allocator(self.device, seconds, chance.randrange(1 << 30))


class GraphCapture(MomentaryFault):
    cause = Cause.GRAPH_CAPTURE

    def act(self, seconds: float, chance: random.Random) -> None:
        disturbances.capture_graphs(self.device, seconds)


class Stopped(MomentaryFault):
    """SIGSTOP and SIGCONT from another process, which arrive while later tokens are made."""

    cause = Cause.SUSPENDED

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._pauser = Pauser()

    def act(self, seconds: float, chance: random.Random) -> None:
        self._pauser.pause(seconds)

    def end_run(self) -> None:
        self.spans = self._pauser.pauses()

    def close(self) -> None:
        self._pauser.close()


_COUNTED = 2_000_000


class HeldInterpreter(MomentaryFault):
    """A Python thread that computes inside one C call, which keeps the interpreter lock."""

    cause = Cause.GIL

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._wanted = threading.Event()
        self._seconds = 0.0
        start = time.perf_counter()
        sum(range(_COUNTED))
        self._per_second = _COUNTED / (time.perf_counter() - start)
        self._held: list[Span] = []
        self._thread = threading.Thread(target=self._hold, daemon=True)
        self._thread.start()

    def begin_run(self) -> None:
        self._held = []

    def act(self, seconds: float, chance: random.Random) -> None:
        self._seconds = seconds
        self._wanted.set()

    def end_run(self) -> None:
        while self._wanted.is_set():
            time.sleep(0.001)
        self.spans = self._held

    def _hold(self) -> None:
        while True:
            self._wanted.wait()
            start = time.perf_counter()
            sum(range(int(self._seconds * self._per_second)))
            self._held.append((start, time.perf_counter()))
            self._wanted.clear()


class SyncEveryToken(Fault):
    cause = Cause.HOST_SYNC

    def disturb(self, chunks: Chunks, tokens: int, chance: random.Random) -> Iterator[Any]:
        start = time.perf_counter()
        for chunk in chunks:
            disturbances.synchronize(self.device)
            yield chunk
        self.spans = [(start, time.perf_counter())]


class BesideFault(Fault):
    """Something beside the run that goes on from an early token to its end."""

    @abstractmethod
    def go(self) -> None: ...

    @abstractmethod
    def halt(self) -> None: ...

    def disturb(self, chunks: Chunks, tokens: int, chance: random.Random) -> Iterator[Any]:
        begin = chance.randrange(1, max(2, int(BEGIN_EARLY * tokens)))
        start = None
        try:
            for token, chunk in enumerate(chunks):
                if token == begin:
                    start = time.perf_counter()
                    self.go()
                yield chunk
        finally:
            self.halt()
            if start is not None:
                self.spans = [(start, time.perf_counter())]


class HogOnTheSameCore(BesideFault):
    """Other processes that compute on the core to which the main thread is tied meanwhile."""

    cause = Cause.PREEMPTION

    def __init__(self, device: str) -> None:
        super().__init__(device)
        count = GPU_HOGS if device.startswith("cuda") else 1
        self._hogs = [
            subprocess.Popen(
                [sys.executable, "-c", COMPUTING_WHEN_TOLD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            for _ in range(count)
        ]
        for hog in self._hogs:
            assert hog.stdout is not None
            hog.stdout.readline()

    def disturb(self, chunks: Chunks, tokens: int, chance: random.Random) -> Iterator[Any]:
        if sys.platform != "linux":
            raise NotImplementedError("`kinds` looks before this is called")
        cores = os.sched_getaffinity(0)
        core = {min(cores)}
        for hog in self._hogs:
            os.sched_setaffinity(hog.pid, core)
        os.sched_setaffinity(0, core)  # 0 = the calling thread alone
        try:
            yield from super().disturb(chunks, tokens, chance)
        finally:
            os.sched_setaffinity(0, cores)

    def go(self) -> None:
        self._say(b"+")

    def halt(self) -> None:
        self._say(b"-")

    def _say(self, word: bytes) -> None:
        for hog in self._hogs:
            assert hog.stdin is not None
            hog.stdin.write(word)

    def close(self) -> None:
        for hog in self._hogs:
            hog.kill()
            hog.communicate()


class OtherGpuProgram(BesideFault):
    cause = Cause.OTHER_GPU_PROCESS

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._program = subprocess.Popen(
            python_command("qwencli.engine.instruments.disturbances"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_only_device(device)},
        )
        assert self._program.stdout is not None
        self._program.stdout.readline()  # "ready"

    def go(self) -> None:
        self._say("go")

    def halt(self) -> None:
        self._say("stop")

    def _say(self, word: str) -> None:
        assert self._program.stdin is not None
        self._program.stdin.write(word + "\n")
        self._program.stdin.flush()

    def close(self) -> None:
        self._program.kill()
        self._program.communicate()


def _only_device(device: str) -> dict[str, str]:
    """Environment in which cuda:0 is this device, unless the user has chosen already."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return {}
    return {"CUDA_VISIBLE_DEVICES": device.partition(":")[2] or "0"}


class Reload(Fault):
    """The worker itself loads the model anew before this run (`WorkerSpec.reload_before`)."""

    cause = Cause.RELOAD

    def disturb(self, chunks: Chunks, tokens: int, chance: random.Random) -> Iterator[Any]:
        start = time.perf_counter()
        yield from chunks
        self.spans = [(start, time.perf_counter())]


def _cuda(device: str) -> str | None:
    return None if device.startswith("cuda") else "needs a CUDA device"


def _affinity(device: str) -> str | None:
    return None if sys.platform == "linux" else "this system ties no thread to a core"


def _signals(device: str) -> str | None:
    return None if sys.platform != "win32" else "this system cannot stop a process"


def _anywhere(device: str) -> str | None:
    return None


@dataclass(frozen=True)
class Kind:
    """`blocker(device)` says why the fault cannot be made there, or None."""

    make: Callable[[str], Fault]
    blocker: Callable[[str], str | None]


KINDS: Mapping[Cause, Kind] = {
    Cause.GC: Kind(GarbageCollection, _anywhere),
    Cause.GIL: Kind(HeldInterpreter, _anywhere),
    Cause.PREEMPTION: Kind(HogOnTheSameCore, _affinity),
    Cause.SUSPENDED: Kind(Stopped, _signals),
    Cause.IDLE_GAP: Kind(Idle, _anywhere),
    Cause.RECOMPILE: Kind(Recompile, _anywhere),
    Cause.RELOAD: Kind(Reload, _anywhere),
    Cause.ALLOCATOR: Kind(AllocatorChurn, _cuda),
    Cause.GRAPH_CAPTURE: Kind(GraphCapture, _cuda),
    Cause.HOST_SYNC: Kind(SyncEveryToken, _cuda),
    Cause.OTHER_GPU_PROCESS: Kind(OtherGpuProgram, _cuda),
}


def check_names(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is neither ALL nor a cause that can be injected at all."""
    valid = [cause.value for cause in KINDS]
    for name in names:
        if name != ALL and name not in valid:
            raise UsageError(
                f"{name!r} cannot be injected", f"give {ALL} or one or more of {', '.join(valid)}"
            )


def choose(names: Sequence[str], device: str) -> tuple[list[Cause], dict[Cause, str]]:
    """The causes to inject, and those of ALL that cannot be made here with the reason.

    Raises:
        UsageError: a cause named that cannot be injected here.
    """
    check_names(names)
    blocked = {c: reason for c, kind in KINDS.items() if (reason := kind.blocker(device))}
    if ALL in names:
        return [cause for cause in KINDS if cause not in blocked], blocked
    wanted = [cause for cause in KINDS if cause in names]
    for cause in wanted:
        if cause in blocked:
            raise UsageError(f"{cause} cannot be injected on {device}: it {blocked[cause]}")
    return wanted, {}
