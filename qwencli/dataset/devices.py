"""Worker processes, one a device of this machine, which share the work of a set.

This process hands tasks out and hears outcomes; it has no engine, and loads no torch. A worker
holds no more than keeps its engine full, and no more than its share of what is left at the pace it
has shown, so that a slow one makes fewer. What a worker held that dies goes to the others.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Self

from qwencli.dataset.caption_worker import (
    Facts,
    WorkerConfig,
    WorkerReady,
    joined_facts,
    run_worker,
)
from qwencli.dataset.pipeline import Failed, Outcome, Task
from qwencli.engine.machine.child_process import start_process
from qwencli.errors import CaptionError, DatasetError, DeviceError, QwenCliError, UsageError

if TYPE_CHECKING:
    if sys.platform == "win32":  # what `Pipe` gives there
        from multiprocessing.connection import PipeConnection as Connection
    else:
        from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

# Tasks on their way to a worker, beyond those that its engine has taken.
_ON_THE_WAY = 16
# How often one looks whether the user wants to stop, and how long a worker may take to leave.
_LOOK_EVERY_S, _LEAVING_S = 0.2, 30.0
# What ends a worker from outside: a person, or a system without memory.
_KILL = 9
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
_DEVICE_OPTION = re.compile(r"--device\b")


def named_devices(named: str) -> tuple[str, ...]:
    """The devices of `--devices`; `all` is every NVIDIA GPU of this machine.

    Raises:
        UsageError: it names something else.
        DeviceError: `all`, and there is none.
    """
    from qwencli.engine.machine.host import num_gpus

    if named.strip() == "all":
        count = num_gpus()
        if not count:
            raise DeviceError(
                "--devices all: no NVIDIA GPU was found", "leave it out, or name devices: cpu,cpu"
            )
        return tuple(f"cuda:{number}" for number in range(count))
    devices = tuple(each.strip() for each in named.split(","))
    for each in devices:
        if not _DEVICE.fullmatch(each):
            raise UsageError(
                f"--devices: {each!r} is not a device", "write all, or such as cuda:0,cuda:1"
            )
    return tuple(f"{each}:0" if each == "cuda" else each for each in devices)


def as_named(error: QwenCliError) -> QwenCliError:
    """A worker's error, with the option that named its device here."""
    if not isinstance(error, DeviceError):
        return error
    message, hint = (_DEVICE_OPTION.sub("--devices", each) for each in (error.message, error.hint))
    return DeviceError(message, hint)


def on_device(worker_config: WorkerConfig, device: str, devices: Sequence[str]) -> WorkerConfig:
    """The worker_config of one of several workers: its device, and its share of the processor."""
    from qwencli.engine.machine.host import usable_cores

    config = replace(worker_config.config, device=device)
    if device == "cpu" and config.threads is None and devices.count("cpu") > 1:
        config = replace(config, threads=max(1, usable_cores() // devices.count("cpu")))
    return replace(worker_config, config=config)


@dataclass(eq=False)
class _Worker:
    """A process, and what it has to do.

    Args:
        held: what it was given and has not answered.
        error: what it ended with.
    """

    device: str
    process: BaseProcess
    pipe: Connection
    ready: WorkerReady | None = None
    held: set[Task] = field(default_factory=set)
    ready_s: float = 0.0
    num_answered: int = 0
    dismissed: bool = False
    error: QwenCliError | None = None

    @property
    def captions_per_s(self) -> float:
        return self.num_answered / max(time.monotonic() - self.ready_s, 1e-3)

    def send(self, message: object) -> None:
        with suppress(OSError):  # it has died, which its own end of the pipe will tell
            self.pipe.send(message)

    def dismiss(self) -> None:
        """It finishes what it holds, and ends."""
        if not self.dismissed:
            self.dismissed = True
            self.send(None)

    def __str__(self) -> str:
        return f"the worker on {self.device} (process {self.process.pid})"


class DeviceWorkers:
    """Worker processes; a context manager. Inside it at least one has loaded its model.

    What a worker held that died is suspect: those are tried again one at a time, and the one that
    ends a worker then is listed as failed. Another worker takes the place of the last one, once,
    and as often as a picture was found to be what ended it.

    Args:
        say: takes a line about a worker that is lost.

    Raises:
        QwenCliError: on entering: a model cannot be loaded.
    """

    def __init__(
        self, worker_config: WorkerConfig, devices: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._facts: list[Facts] = []
        self._suspects: deque[Task] = deque()
        self._tried: set[Task] = set()
        self._may_restart = True
        self._configs = [(device, on_device(worker_config, device, devices)) for device in devices]
        self._workers: list[_Worker] = []

    @property
    def facts(self) -> Facts:
        return joined_facts(self._facts)

    def __enter__(self) -> Self:
        try:
            self._workers = [
                _started(device, worker_config) for device, worker_config in self._configs
            ]
            while not self._facts:
                for _ in self._receive():
                    pass
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end_all()

    def outcomes(
        self, tasks: Sequence[Task], stopping: Callable[[], bool]
    ) -> Generator[Outcome, None, None]:
        """See `worker.Captioner`. A worker that dies is no error while another is left.

        Raises:
            QwenCliError: a model cannot be loaded, or no worker is left.
        """
        waiting = iter(tasks)
        left = len(tasks)
        stopped = False
        while left:
            if stopping() and not stopped:
                stopped = True
                for worker in self._workers:
                    worker.dismiss()
                    if worker.ready is None:
                        worker.process.terminate()
            if stopped and not any(worker.held for worker in self._workers):
                return
            if not stopped:
                self._hand_out(waiting, left)
            for outcome in self._receive(stopped):
                left -= 1
                yield outcome
        for worker in self._workers:
            worker.dismiss()

    def _hand_out(self, waiting: Iterator[Task], left: int) -> None:
        """Give tasks to those that may hold more, a task each in turn."""
        may_hold = {worker: self._most_held(worker, left) for worker in self._workers}
        unassigned = left - sum(len(worker.held) for worker in self._workers)
        while unassigned:
            able = [worker for worker, most in may_hold.items() if len(worker.held) < most]
            if not able:
                return
            before = unassigned
            for worker in able[:unassigned]:
                if self._suspects and not worker.held:
                    task: Task | None = self._suspects.popleft()
                else:
                    task = next(waiting, None)
                if task is None:
                    continue
                worker.held.add(task)
                worker.send(task)
                unassigned -= 1
            if unassigned == before:
                return

    def _most_held(self, worker: _Worker, left: int) -> int:
        from qwencli.engine.client import REQUESTS_AHEAD

        if worker.ready is None or worker.dismissed:
            return 0
        if not self._tried.isdisjoint(worker.held) or (self._suspects and not worker.held):
            return 1  # alone, so that it is known which one it was
        if all(each.num_answered for each in self._workers):
            share = left * worker.captions_per_s / sum(w.captions_per_s for w in self._workers)
        else:
            share = left / len(self._workers) / 2  # it may be the slow one
        rows = worker.ready.max_rows
        return max(1, min(round(share), rows + REQUESTS_AHEAD + _ON_THE_WAY if rows > 1 else 2))

    def _receive(self, stopped: bool = False) -> Iterator[Outcome]:
        """What workers have said since; waits a moment where that is nothing."""
        by_pipe = {id(worker.pipe): worker for worker in self._workers}
        for pipe in connection.wait([each.pipe for each in self._workers], _LOOK_EVERY_S):
            worker = by_pipe[id(pipe)]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                guilty = self._lose(worker)
                if guilty is not None:
                    yield guilty
                if not stopped:
                    self._replace(worker, guilty is not None)
                continue
            if isinstance(message, WorkerReady):
                worker.ready, worker.ready_s = message, time.monotonic()
                self._facts.append(message.facts)
                for warning in message.warnings:
                    self._say(f"{worker.device}: {warning}")
            elif isinstance(message, QwenCliError):
                if worker.ready is None:
                    raise as_named(message)
                worker.error = message
            else:
                task = replace(message.task, attempt=0)
                if task in worker.held:
                    worker.held.remove(task)
                    worker.num_answered += 1
                    self._tried.discard(task)
                    yield message

    def _lose(self, worker: _Worker) -> Failed | None:
        """A worker whose pipe is closed: it has ended, however that was.

        Returns what it held alone when that had ended another one before.
        """
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join(_LEAVING_S)
        if worker.error is None and len(worker.held) == 1 and worker.held <= self._tried:
            [task] = worker.held
            worker.held.clear()
            return Failed(
                task,
                CaptionError(
                    f"{task.item.key}: two workers ended while they captioned it; the last: "
                    f"{_ending(worker.process.exitcode)}",
                    "look at the file; a smaller --max-pixels takes less memory",
                ),
            )
        self._suspects.extend(worker.held)
        self._tried |= worker.held
        return None

    def _replace(self, worker: _Worker, explained: bool) -> None:
        """Say that a worker is lost; another takes its place where it was the last one.

        Args:
            explained: it is known which picture ended it.

        Raises:
            QwenCliError: no worker is left, and another would end as well.
        """
        count = len(worker.held)
        ended = worker.error.message if worker.error else _ending(worker.process.exitcode)
        crashed = worker.ready is not None and worker.process.exitcode != -_KILL
        if self._workers:
            its = "its caption goes" if count == 1 else f"its {count} captions go"
            self._say(f"{worker}: {ended}" + (f"; {its} to the others" if count else ""))
        elif worker.error is not None:
            raise worker.error
        elif explained or (crashed and self._may_restart):
            self._may_restart = explained
            self._say(f"{worker}: {ended}; another takes its place")
            worker_config = next(
                worker_config for device, worker_config in self._configs if device == worker.device
            )
            self._workers.append(_started(worker.device, worker_config))
        else:
            raise DatasetError(
                f"{worker}: {ended}, and no other is left",
                "the same command goes on where this one ended; fewer --devices or a smaller "
                "--max-pixels take less memory",
            )

    def _end_all(self) -> None:
        for worker in self._workers:
            worker.dismiss()
            if worker.held or worker.ready is None:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(_LEAVING_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._workers = []


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return "it closed its pipe" if code is None else f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"it died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _started(device: str, worker_config: WorkerConfig) -> _Worker:
    ours, theirs = multiprocessing.Pipe()
    process = start_process(_work, (theirs, worker_config), f"captions on {device}")
    theirs.close()
    return _Worker(device, process, ours)


def _work(pipe: Connection, worker_config: WorkerConfig) -> None:
    """A worker process: does what comes through the pipe, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print is no answer of the command.
    os.dup2(2, 1)
    inbox = _Inbox(pipe)
    try:
        for message in run_worker(worker_config, inbox.take, lambda: inbox.closed):
            if not isinstance(message, WorkerReady):
                inbox.num_running -= 1
            pipe.send(message)
    except QwenCliError as error:
        pipe.send(error)
    except Exception as error:  # noqa: BLE001 - told where outcomes are awaited
        line = (str(error).strip() or "no message").splitlines()[0]
        pipe.send(DatasetError(f"{type(error).__name__}: {line}", "report this fault of qwencli"))


class _Inbox:
    """Tasks that come through a pipe; read at once, so that nobody waits to send one.

    `closed` is true once there are no more; this process leaves when the other end is gone.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self.closed = False
        self.num_running = 0
        threading.Thread(target=self._read, name="tasks", daemon=True).start()

    def take(self) -> Task | None:
        """The next task; waits for it where nothing runs."""
        with suppress(queue.Empty):
            task = self._tasks.get(block=self.num_running == 0 and not self.closed)
            self.num_running += task is not None
            return task
        return None

    def _read(self) -> None:
        while True:
            try:
                message: Any = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(1)  # nobody is there to tell outcomes
            if message is None:
                self.closed = True
            self._tasks.put(message)
