"""One thread that owns an engine, and what the tasks of an event loop see of it.

Requests come in through a list of orders, answers go out through a list for each; nothing else is
shared. A reader that is slow finds several pieces at once and holds nobody: the engine never waits.
A lone request runs as `engine.stream` does, which is the faster way for one; those that come
meanwhile run together, in turns with it, and for half a minute from then on so does every one:
each turn of a lone one costs those that run together a step.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from qwencli.engine.protocol import Engine, RequestQueue, SerialQueue
from qwencli.engine.request import RequestId, RequestSource, StepOutput
from qwencli.errors import EngineError, QwenCliError
from qwencli.results import GenerationChunk

# Steps that fail one after the other, with whatever is asked: the device is lost.
MOST_FAILED_STEPS = 3
# For how long after several requests were there at once the next one is taken to have company soon.
TOGETHER_S = 30.0
# How long requests may be waited for where nothing runs and as many as ran together last are about
# to come, and how long for the next of them, by how many they were. Prompts that begin while others
# are still read wait for the interpreter at every operation, and run in more passes.
GATHER_S, NEXT_S, NEXT_S_OF_EACH = 0.05, 0.005, 0.0002


class TooManyRequestsError(QwenCliError):
    """As many requests wait as may wait."""


class ClientGoneError(QwenCliError):
    """Nobody waits for this answer any more."""


class RequestTimeoutError(QwenCliError):
    """An answer was not complete in time."""


class EngineStoppedError(EngineError):
    """The engine was told to end, or has failed for good."""


class Answer:
    """One request, as the task that reads its answer sees it; made by `EngineThread.submit`.

    Args:
        whole: pieces between the first and the one with the result are of no interest.
        in_batch: run it as a row of a batch, even alone.
    """

    def __init__(
        self, thread: EngineThread, source: RequestSource, whole: bool, in_batch: bool
    ) -> None:
        self._thread, self.whole, self.in_batch = thread, whole, in_batch
        self.source: RequestSource | None = source
        self.loop = asyncio.get_running_loop()
        self.begun_s: float | None = None
        self.arrived_s = time.perf_counter()
        self._pieces: deque[GenerationChunk | QwenCliError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._reader: Callable[[list[GenerationChunk]], bool] | None = None
        self._over = False

    async def pieces(self) -> list[GenerationChunk]:
        """What has come since the last call, once there is something; the last one of an answer
        has its result.

        Raises:
            QwenCliError: what ended the answer.
        """
        while not self._pieces:
            self._waiter = self.loop.create_future()
            await self._waiter
        return self._taken()

    async def read_by(self, reader: Callable[[list[GenerationChunk]], bool]) -> None:
        """Have `reader` called with pieces as they come, until it returns False. Of many streams
        it is much of the work to resume the task of each for every piece.

        Raises:
            QwenCliError: what ended the answer.
        """
        while self._pieces:
            if not reader(self._taken()):
                return
        self._reader, self._waiter = reader, self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._reader = None

    def _taken(self) -> list[GenerationChunk]:
        pieces = self._pieces
        # Counted before one looks whether it is over: only what ends an answer may be an error.
        count = len(pieces)
        if not self._over:
            return [pieces.popleft() for _ in range(count)]  # type: ignore[misc]
        found: list[GenerationChunk] = []
        while pieces:
            piece = pieces[0]
            if isinstance(piece, QwenCliError):
                if found:  # first what came before it
                    return found
                raise piece
            found.append(pieces.popleft())  # type: ignore[arg-type]
        return found

    def end(self, why: QwenCliError) -> None:
        """End it from the reader's side: the engine forgets it before its next step."""
        if not self._over:
            self._thread.forget(self)
            self.take(why)
            self.wake()

    def take(self, piece: GenerationChunk | QwenCliError) -> None:
        """Of the engine's thread: add a piece; `wake` follows on the loop's own thread."""
        if self._over:
            return
        # Never unset: the loop's thread may end the answer while this is looked at.
        if isinstance(piece, QwenCliError) or piece.result is not None:
            self._over = True
        self._pieces.append(piece)

    @property
    def is_over(self) -> bool:
        return self._over

    def wake(self) -> None:
        """Of the loop's thread: tell the reader that there are pieces."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._reader is None:
            waiter.set_result(None)
            return
        try:
            while self._pieces:
                if not self._reader(self._taken()):
                    waiter.set_result(None)
                    return
        except Exception as error:  # noqa: BLE001 - it is the waiting task's
            waiter.set_exception(error)


def stopped() -> EngineStoppedError:
    return EngineStoppedError("the engine has stopped", "start the server again")


class _Place(NamedTuple):
    """Where a request runs: a queue, and its name there."""

    queue: RequestQueue
    number: RequestId


class EngineThread:
    """Loads an engine in a thread of its own and answers requests there until closed.

    Args:
        max_waiting: requests beside those that run at once; more are refused.
        on_failure: called in the engine's thread when it can answer nothing any more.
        rows_at_once: make the rows of batches when the engine is loaded, not when they are first
            asked for (`rows`, or `submit` of a batch): they take much of a GPU's memory.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 1024,
        on_failure: Callable[[], None] = lambda: None,
        rows_at_once: bool = True,
    ) -> None:
        self.engine, self._max_waiting, self.on_failure = engine, max_waiting, on_failure
        self.failure: Exception | None = None
        self.max_rows = 1
        self.last_active_s = time.monotonic()
        self._rows_at_once = rows_at_once or engine.config.batch_invariant
        self._orders: deque[Callable[[], None]] = deque()
        self._ordered = threading.Condition()
        self._closing = False
        self._loaded = threading.Event()
        self._unfinished: set[Answer] = set()
        self._places: dict[Answer, _Place] = {}
        self._answers: dict[_Place, Answer] = {}
        # When more than one request was there, the most since one began where nothing ran, and how
        # many have begun and are not over.
        self._together_s = float("-inf")
        self._most_together = self._num_begun = 0
        self._queues: tuple[RequestQueue, RequestQueue]
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the engine.

        Raises:
            QwenCliError: as `Engine.load` does.
        """
        self._thread.start()
        self._loaded.wait()
        if self.failure is not None:
            self._thread.join()
            raise self.failure

    def close(self) -> None:
        """End what runs, and free the engine."""
        with self._ordered:
            self._closing = True
            self._ordered.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self, source: RequestSource, *, whole: bool = False, in_batch: bool = False
    ) -> Answer:
        """Ask for an answer; of a running event loop.

        Args:
            whole, in_batch: see `Answer`.

        Raises:
            TooManyRequestsError: as many wait as may wait.
            EngineStoppedError: nothing is answered any more.
        """
        if self.failure is not None or self._closing:
            raise stopped()
        with self._ordered:
            if len(self._unfinished) >= self.max_rows + self._max_waiting:
                raise TooManyRequestsError(
                    f"{len(self._unfinished)} requests are being answered already",
                    "try again a little later",
                )
            answer = Answer(self, source, whole, in_batch)
            self._unfinished.add(answer)
            self._orders.append(functools.partial(self._begin, answer))
            self._ordered.notify()
        return answer

    def end_answers(self) -> None:
        """Tell all that wait that nothing more comes; of their event loop."""
        for answer in list(self._unfinished):
            answer.end(stopped())

    def forget(self, answer: Answer) -> None:
        with self._ordered:
            self._orders.append(functools.partial(self._abort, answer))
            self._ordered.notify()

    def rows(self) -> concurrent.futures.Future[int]:
        """How many requests run together; the rows are made where they are not there yet."""
        made: concurrent.futures.Future[int] = concurrent.futures.Future()

        def make() -> None:
            try:
                self._make_rows()
            except Exception as error:  # noqa: BLE001 - told to the one that waits
                made.set_exception(error)
            else:
                made.set_result(self.max_rows)

        with self._ordered:
            self._orders.append(make)
            self._ordered.notify()
        return made

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._unfinished)

    @property
    def num_running(self) -> int:
        return sum(answer.begun_s is not None for answer in list(self._unfinished))

    @property
    def idle_s(self) -> float:
        """For how long nothing has been asked; 0 while something runs."""
        return 0.0 if self._unfinished else time.monotonic() - self.last_active_s

    def _run(self) -> None:
        try:
            self.engine.load()
            self._lone: RequestQueue = SerialQueue(self.engine.stream)
            self._queues = self._lone, self._lone
            if self._rows_at_once:
                # So that the first request need not wait for them.
                self._make_rows()
        except Exception as error:  # noqa: BLE001 - told by `start`
            self.failure = error
            return
        finally:
            self._loaded.set()
        failed = 0
        try:
            while self._take_orders() and self._gather():
                for queue in dict.fromkeys(self._queues):
                    if queue.has_unfinished:
                        failed = 0 if self._step(queue) else failed + 1
                if failed >= MOST_FAILED_STEPS:
                    self.on_failure()
                    return
        finally:
            self.failure = self.failure or stopped()
            for answer in list(self._unfinished):
                self._abort(answer)
                self._tell({answer: [stopped()]})
            self.engine.close()

    def _make_rows(self) -> None:
        """Have batches run together, where this engine has that; once made they stay."""
        self.max_rows = self.engine.max_rows
        if self.engine.config.batch_invariant:
            self._queues = self.engine, self.engine
        elif self.max_rows > 1:
            self._queues = self.engine, self._lone

    def _take_orders(self) -> bool:
        """Do what was ordered, once there is anything to do; False = close."""
        with self._ordered:
            while not (self._orders or self._closing or self._places):
                self._ordered.wait()
            orders = list(self._orders)
            self._orders.clear()
            if self._closing:
                return False
        for do in orders:
            do()
        return True

    def _gather(self) -> bool:
        """Let those come that ask again all at once, see `GATHER_S`; False = close."""
        if self._num_begun or not self._places or not self._is_together or self.max_rows == 1:
            return True
        expected, self._most_together = self._most_together, len(self._unfinished)
        expected = min(expected, self.max_rows)
        pause_s = min(NEXT_S, NEXT_S_OF_EACH * expected)
        until = time.monotonic() + GATHER_S
        while len(self._places) < expected and time.monotonic() < until:
            with self._ordered:
                if not (self._orders or self._closing or self._ordered.wait(pause_s)):
                    break
            if not self._take_orders():
                return False
        return True

    @property
    def _is_together(self) -> bool:
        return time.monotonic() - self._together_s < TOGETHER_S

    def _begin(self, answer: Answer) -> None:
        if answer.is_over or answer.source is None:
            return
        if answer.in_batch:
            try:
                self._make_rows()
            except Exception as error:  # noqa: BLE001 - the engine goes on without
                self._drop(answer)
                self._tell({answer: [_failure(error)]})
                return
        many, lone = self._queues
        # One that came at the same time and one that still runs are company alike.
        self._note_company()
        queue = many if self._is_together or answer.in_batch else lone
        place = _Place(queue, queue.add(answer.source, stream=not answer.whole))
        # Pictures are held no longer than the engine needs them.
        answer.source = None
        self._places[answer], self._answers[place] = place, answer

    def _abort(self, answer: Answer) -> None:
        place = self._places.get(answer)
        if place is not None:
            place.queue.abort(place.number)
        self._drop(answer)

    def _note_company(self) -> None:
        count = len(self._unfinished)
        self._most_together = max(self._most_together, count)
        if count > 1:
            self._together_s = time.monotonic()

    def _drop(self, answer: Answer) -> None:
        self._note_company()
        place = self._places.pop(answer, None)
        if place is not None:
            del self._answers[place]
            self._num_begun -= answer.begun_s is not None
        with self._ordered:
            self._unfinished.discard(answer)
        self.last_active_s = time.monotonic()

    def _step(self, queue: RequestQueue) -> bool:
        """A step of a queue; whether it went through."""
        try:
            outputs = queue.step()
        except Exception as error:  # noqa: BLE001 - the server goes on
            self._fail(queue, error)
            return False
        told: dict[Answer, list[GenerationChunk | QwenCliError]] = {}
        for output in outputs:
            self._note(queue, output, told)
        self._tell(told)
        return True

    def _note(
        self,
        queue: RequestQueue,
        output: StepOutput,
        told: dict[Answer, list[GenerationChunk | QwenCliError]],
    ) -> None:
        answer = self._answers.get(_Place(queue, output.request))
        if answer is None:
            return
        begins = answer.begun_s is None
        if begins:
            answer.begun_s = time.perf_counter()
            self._num_begun += 1
        piece = output.error or output.chunk
        assert piece is not None, "an output is an error or a chunk"
        if output.finished or begins or not answer.whole:
            told.setdefault(answer, []).append(piece)
        if output.finished:
            self._drop(answer)

    def _fail(self, queue: RequestQueue, error: Exception) -> None:
        """A step failed as a whole: so have all requests that it may have run."""
        failure = _failure(error)
        places = [each for each in self._answers if each.queue is queue]
        if queue is self._lone or self.max_rows == 1:
            del places[1:]  # one after the other: the first it was
        for place in places:
            answer = self._answers[place]
            self._abort(answer)
            self._tell({answer: [failure]})

    def _tell(self, told: dict[Answer, list[GenerationChunk | QwenCliError]]) -> None:
        """Hand pieces to their readers, and wake all of a loop's at once."""
        loops: dict[asyncio.AbstractEventLoop, list[Answer]] = {}
        for answer, pieces in told.items():
            for piece in pieces:
                answer.take(piece)
            loops.setdefault(answer.loop, []).append(answer)
        for loop, answers in loops.items():
            try:
                loop.call_soon_threadsafe(_wake, answers)
            except RuntimeError:  # the loop is closed, and so are its connections
                for answer in answers:
                    self._abort(answer)


def _failure(error: Exception) -> QwenCliError:
    if isinstance(error, QwenCliError):
        return error
    failure = EngineError(
        f"a step failed: {type(error).__name__}: {error}",
        "ask again; this is a fault of qwencli, please report it",
    )
    failure.__cause__ = error
    return failure


def _wake(answers: list[Answer]) -> None:
    for answer in answers:
        answer.wake()
