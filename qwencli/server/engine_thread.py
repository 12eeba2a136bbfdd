"""One thread that owns an engine.

Requests come in through a list of orders, answers go out through a list for each; nothing else is
shared. A lone request runs as `engine.stream` does, which is the faster way for one; those that
come meanwhile run together, in turns with it, and for half a minute from then on so does every one:
each turn of a lone one costs those that run together a step.
"""

from __future__ import annotations

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
from qwencli.server.answers import Answer, Asked, Outlet, Piece, TooManyRequestsError, stopped

# Steps that fail one after the other, with whatever is asked: the device is lost.
MOST_FAILED_STEPS = 3
# For how long after several requests were there at once the next one is taken to have company soon.
TOGETHER_S = 30.0
# How long requests may be waited for where nothing runs and as many as ran together last are about
# to come, and how long for the next of them, by how many they were. Prompts that begin while others
# are still read wait for the interpreter at every operation, and run in more passes.
GATHER_S, NEXT_S, NEXT_S_OF_EACH = 0.05, 0.005, 0.0002


class _Place(NamedTuple):
    """Where a request runs: a queue, and its name there."""

    queue: RequestQueue
    number: RequestId


# Between two looks at what a load is for.
WATCH_S = 0.5


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
        self._unfinished: set[Asked] = set()
        self._places: dict[Asked, _Place] = {}
        self._answers: dict[_Place, Asked] = {}
        # What those wait for who want to know how many rows there are.
        self._made: list[concurrent.futures.Future[int]] = []
        # When more than one request was there, the most since one began where nothing ran, and how
        # many have begun and are not over.
        self._together_s = float("-inf")
        self._most_together = self._num_begun = 0
        self._queues: tuple[RequestQueue, RequestQueue]
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, watch: Callable[[], object] = lambda: None) -> None:
        """Load the engine.

        Args:
            watch: called every now and then meanwhile; what it raises ends the waiting.

        Raises:
            QwenCliError: as `Engine.load` does.
        """
        self._thread.start()
        while not self._loaded.wait(WATCH_S):
            watch()
        if self.failure is not None:
            self._thread.join()
            raise self.failure

    def close(self) -> None:
        """End what runs, a load too, and free the engine."""
        if not self._loaded.is_set():
            self.engine.stop_load()
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
        answer = Answer(self.forget, source, whole, in_batch)
        self.add(answer)
        return answer

    def add(self, answer: Asked) -> None:
        """Begin to answer. Raises as `submit`."""
        with self._ordered:
            # Not before: the thread may end in between, and nobody would tell of this one.
            self._check_going()
            if len(self._unfinished) >= self.max_rows + self._max_waiting:
                raise TooManyRequestsError(
                    f"{len(self._unfinished)} requests are being answered already",
                    "try again a little later",
                )
            self._unfinished.add(answer)
            self._orders.append(functools.partial(self._begin, answer))
            self._ordered.notify()

    def end_answers(self) -> None:
        """Tell all that wait that nothing more comes; of their event loop."""
        for answer in list(self._unfinished):
            if isinstance(answer, Answer):
                answer.end(stopped())

    def forget(self, answer: Asked) -> None:
        """Nobody waits for it any more: it is dropped before the next step."""
        with self._ordered:
            self._orders.append(functools.partial(self._forget, answer))
            self._ordered.notify()

    def rows(self) -> concurrent.futures.Future[int]:
        """How many requests run together; the rows are made where they are not there yet. Raises
        EngineStoppedError, or it comes of the future, where nothing is made any more."""
        made: concurrent.futures.Future[int] = concurrent.futures.Future()

        def make() -> None:
            try:
                self._make_rows()
            except Exception as error:  # noqa: BLE001 - told to the one that waits
                made.set_exception(error)
            else:
                made.set_result(self.max_rows)

        with self._ordered:
            self._check_going()
            self._made = [each for each in self._made if not each.done()]
            self._made.append(made)
            self._orders.append(make)
            self._ordered.notify()
        return made

    def _check_going(self) -> None:
        if self.failure is not None or self._closing:
            raise stopped()

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
            with self._ordered:
                self.failure = self.failure or stopped()
            for made in self._made:
                if not made.done():
                    made.set_exception(stopped())
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

    def _begin(self, answer: Asked) -> None:
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

    def _forget(self, answer: Asked) -> None:
        self._abort(answer)
        # Whoever asked is told what the engine holds now: no step may follow that would say it.
        self._tell({answer: []})

    def _abort(self, answer: Asked) -> None:
        place = self._places.get(answer)
        if place is not None:
            place.queue.abort(place.number)
        self._drop(answer)

    def _note_company(self) -> None:
        count = len(self._unfinished)
        self._most_together = max(self._most_together, count)
        if count > 1:
            self._together_s = time.monotonic()

    def _drop(self, answer: Asked) -> None:
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
        told: dict[Asked, list[Piece]] = {}
        for output in outputs:
            self._note(queue, output, told)
        self._tell(told)
        return True

    def _note(
        self,
        queue: RequestQueue,
        output: StepOutput,
        told: dict[Asked, list[Piece]],
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

    def _tell(self, told: dict[Asked, list[Piece]]) -> None:
        """Hand pieces to their readers, and wake all of an outlet's at once."""
        outlets: dict[Outlet, list[Asked]] = {}
        for answer, pieces in told.items():
            for piece in pieces:
                answer.take(piece)
            outlets.setdefault(answer.outlet, []).append(answer)
        for outlet, answers in outlets.items():
            try:
                outlet.wake(answers)
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
