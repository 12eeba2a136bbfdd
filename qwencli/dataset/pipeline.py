"""Captions a set: open -> generate -> guard -> format -> sink, with a bounded number in between.

Pictures are opened by the threads in which the engine prepares prompts, captions are written by a
thread of their own, and this thread keeps the engine full, or hears of those of others. What one
picture raises is its own failure; what the engine or the disk raises ends the run.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from qwencli.dataset.sources import CAPTION, Item, Slot
from qwencli.errors import (
    AnswerError,
    CaptionError,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    QwenCliError,
    RequestError,
)
from qwencli.messages import GenerationRequest, TextPart, VisualPart
from qwencli.results import GenerationResult

if TYPE_CHECKING:
    from qwencli.engine.protocol import Engine

# What costs one picture its caption, while the others are done.
ITEM_ERRORS = (
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    CaptionError,
    AnswerError,
    RequestError,
)
# Captions that wait to be written; a disk slower than the engine holds it up.
WAITING_CAPTIONS = 256
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Task:
    """One caption to make.

    Args:
        attempt: counts what was tried before for the same caption.
    """

    item: Item
    field: str = CAPTION
    sample: int = 0
    attempt: int = 0

    @property
    def slot(self) -> Slot:
        return Slot(self.item.key, self.field, self.sample)


@dataclass(frozen=True)
class Captioned:
    """A caption that may be written, and the request and answer it came from."""

    task: Task
    caption: str
    prompt: str
    seed: int | None
    result: GenerationResult


@dataclass(frozen=True)
class Failed:
    """A task without a caption, and why."""

    task: Task
    error: QwenCliError


Outcome = Captioned | Failed


def empty_answer(task: Task, result: GenerationResult) -> CaptionError | None:
    """The least that a guard asks for: an answer with something in it."""
    if result.text.strip():
        return None
    if result.thoughts is not None:
        return CaptionError(f"{task.item.key}: the model thought and gave no answer")
    return CaptionError(f"{task.item.key}: the answer is empty")


def stripped(task: Task, text: str) -> str:
    return text.strip()


@dataclass(frozen=True)
class Stages:
    """What is done to each task. All of it raises `QwenCliError` for what is wrong with one.

    Args:
        open: the picture of an item; runs in threads.
        ask: the request about it; runs in threads. `Task.attempt` tells how often it was asked.
        fault: what is wrong with an answer, None where it is good.
        format: the caption that is written, from the text of a good answer.
        attempts: how often a task is tried whose answers have faults.
        name: what errors call an item.
    """

    open: Callable[[Item], VisualPart]
    ask: Callable[[Task, VisualPart], GenerationRequest]
    fault: Callable[[Task, GenerationResult], CaptionError | None] = empty_answer
    format: Callable[[Task, str], str] = stripped
    attempts: int = 1
    name: Callable[[Item], str] = operator.attrgetter("key")


class Writer(Protocol):
    """Takes outcomes to where they are kept; all of it runs in one thread."""

    def write(self, outcomes: list[Outcome], keep: Callable[[Outcome], None]) -> None:
        """Keep them, and tell of each as it is kept: what could not be written has failed.

        Raises:
            QwenCliError: nothing can be kept any more.
        """


class Stopper:
    """Whether the user has asked to stop, while `watching`.

    The first Ctrl-C sets `asked`; the second ends the process at once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.asked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            # A progress bar hides the cursor.
            end = b"\x1b[?25h\n" if sys.stderr.isatty() else b""
            with suppress(OSError):
                os.write(2, end + b"left; what is done is kept, and the same command goes on\n")
            # Files are whole at every moment, so nothing is lost.
            os._exit(130)
        self.asked = True
        self._say("stopping: finishing what runs; Ctrl-C again leaves at once")


def outcomes(
    engine: Engine,
    take: Callable[[], Task | None],
    stages: Stages,
    *,
    expected: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[Outcome, None, None]:
    """Caption what `take` gives, as many at a time as the engine runs.

    Args:
        take: the next task; None where there is none now, see `client.answers`.
        expected: how many tasks there are, where that is known.

    Raises:
        QwenCliError: the engine cannot go on.
    """
    from qwencli.engine.client import answers

    again: deque[Task] = deque()
    asked: dict[Task, _SentPrompt] = {}

    def request(task: Task) -> GenerationRequest:
        made = _request(stages, task)
        asked[task] = _SentPrompt(_prompt_text(made), made.sampling.seed)
        return made

    def next_request() -> tuple[Task, Callable[[], GenerationRequest]] | None:
        task = again.popleft() if again else take()
        return None if task is None else (task, functools.partial(request, task))

    for task, result in answers(engine, next_request, stopping=stopping, expected=expected):
        outcome = _judged(stages, task, result, asked.pop(task, None))
        if outcome is None:
            again.append(replace(task, attempt=task.attempt + 1))
        else:
            yield outcome


def write_outcomes(
    made: Generator[Outcome, None, None], writer: Writer, report: Callable[[Outcome], None]
) -> None:
    """Keep outcomes as they are made; returns when all of it is written.

    Args:
        report: called in this thread for each outcome that was kept.

    Raises:
        QwenCliError: the writer cannot go on, or what `made` raises.
    """
    # Whatever ends this: what makes outcomes has requests in an engine, which is there still.
    with _WriterThread(writer, report) as sink, closing(made):
        for outcome in made:
            sink.put(outcome)
            sink.report()


@dataclass(frozen=True)
class _SentPrompt:
    """What is kept of a request while it is answered: its pictures are the engine's alone."""

    prompt: str
    seed: int | None


def _request(stages: Stages, task: Task) -> GenerationRequest:
    try:
        return stages.ask(task, stages.open(task.item))
    except QwenCliError:
        raise
    except Exception as error:
        line = (str(error).strip() or "no message").splitlines()[0]
        raise InputError(
            f"{stages.name(task.item)}: {type(error).__name__}: {line}",
            "this is a fault of qwencli; report it with the picture",
        ) from error


def _prompt_text(request: GenerationRequest) -> str:
    parts = request.messages[-1].parts
    return "\n".join(part.text for part in parts if isinstance(part, TextPart))


def _judged(
    stages: Stages, task: Task, result: GenerationResult | QwenCliError, asked: _SentPrompt | None
) -> Outcome | None:
    """What became of a task; None where it is to be tried again."""
    if isinstance(result, ITEM_ERRORS):
        return Failed(task, result)
    if isinstance(result, QwenCliError):
        raise result
    assert asked is not None, "what was answered was asked"
    fault = stages.fault(task, result)
    if fault is not None:
        if task.attempt + 1 < stages.attempts:
            return None
        return Failed(task, fault)
    try:
        caption = stages.format(task, result.text)
    except ITEM_ERRORS as error:
        return Failed(task, error)
    return Captioned(task, caption, asked.prompt, asked.seed, result)


class _WriterThread:
    """Runs a `Writer` beside the engine; what it has not written yet is bounded.

    Leaving it writes all that was put, also where the engine has failed.
    """

    def __init__(self, writer: Writer, report: Callable[[Outcome], None]) -> None:
        self._writer, self._report = writer, report
        self._queue: queue.Queue[Outcome | None] = queue.Queue(WAITING_CAPTIONS)
        self._kept: deque[Outcome] = deque()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="write captions", daemon=True)

    def __enter__(self) -> _WriterThread:
        self._thread.start()
        return self

    def put(self, outcome: Outcome) -> None:
        """Raises what the writer has raised."""
        if self._error is not None:
            raise self._error
        self._queue.put(outcome)

    def report(self) -> None:
        while self._kept:
            self._report(self._kept.popleft())

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._queue.put(None)
        self._thread.join()
        self.report()
        if self._error is not None and kind is None:
            raise self._error

    def _work(self) -> None:
        for batch in self._batches():
            if self._error is not None:
                continue  # takes what is put, so that nobody waits for room
            try:
                self._writer.write(batch, self._kept.append)
            except BaseException as error:  # noqa: BLE001 - raised again where outcomes are put
                self._error = error

    def _batches(self) -> Iterator[list[Outcome]]:
        """All that waits, as often as there is something: they are brought to disk together."""
        while True:
            batch: list[Outcome | None] = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while batch[-1] is not None:
                    batch.append(self._queue.get_nowait())
            outcomes = [outcome for outcome in batch if outcome is not None]
            if outcomes:
                yield outcomes
            if batch[-1] is None:
                return
