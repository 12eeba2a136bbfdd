"""What engine and reader share of a request: its answer, as it comes.

The engine's thread puts pieces in, and wakes those who read them wherever they are: tasks of an
event loop (`Answer`), or another process (`engine_client`). A reader that is slow finds several
pieces at once and holds nobody: the engine never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from qwencli.engine.protocol import EngineFacts
from qwencli.engine.request import RequestSource
from qwencli.errors import EngineError, QwenCliError
from qwencli.results import GenerationChunk


class TooManyRequestsError(QwenCliError):
    """As many requests wait as may wait."""


class ClientGoneError(QwenCliError):
    """Nobody waits for this answer any more."""


class RequestTimeoutError(QwenCliError):
    """An answer was not complete in time."""


class EngineStoppedError(EngineError):
    """The engine was told to end, or has failed for good."""


Piece = GenerationChunk | QwenCliError


class Outlet(Protocol):
    """Where the pieces of answers are read."""

    def wake(self, answers: Sequence[Any]) -> None:
        """Tell the readers of these answers, all of this outlet, that there are pieces; of the
        engine's thread.

        Raises:
            RuntimeError: nobody reads there any more.
        """


class Asked:
    """One request, as the engine's thread sees it.

    Args:
        outlet: where its answer is read.
        whole: pieces between the first and the one with the result are of no interest.
        in_batch: run it as a row of a batch, even alone.
    """

    def __init__(
        self, source: RequestSource, outlet: Outlet, *, whole: bool, in_batch: bool
    ) -> None:
        self.outlet, self.whole, self.in_batch = outlet, whole, in_batch
        self.source: RequestSource | None = source
        self.begun_s: float | None = None
        self.arrived_s = time.perf_counter()
        self._pieces: deque[Piece] = deque()
        self._over = False

    def take(self, piece: Piece) -> None:
        """Add a piece, whose reader is told of it by `Outlet.wake`."""
        if self._over:
            return
        # Never unset: the reader may end the answer while this is looked at.
        if isinstance(piece, QwenCliError) or piece.result is not None:
            self._over = True
        self._pieces.append(piece)

    @property
    def is_over(self) -> bool:
        return self._over


class _Loop(NamedTuple):
    """An event loop whose tasks read answers."""

    loop: asyncio.AbstractEventLoop

    def wake(self, answers: Sequence[Answer]) -> None:
        self.loop.call_soon_threadsafe(_wake, answers)


class Answer(Asked):
    """One request, as the task that reads its answer sees it; made by `EngineHandle.submit`.

    Args:
        forget: what tells the engine that nobody waits for it any more.
    """

    def __init__(
        self, forget: Callable[[Answer], None], source: RequestSource, whole: bool, in_batch: bool
    ) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(source, _Loop(self._loop), whole=whole, in_batch=in_batch)
        self._forget = forget
        self._waiter: asyncio.Future[None] | None = None
        self._reader: Callable[[list[GenerationChunk]], bool] | None = None

    async def pieces(self) -> list[GenerationChunk]:
        """What has come since the last call, once there is something; the last one of an answer
        has its result.

        Raises:
            QwenCliError: what ended the answer.
        """
        while not self._pieces:
            self._waiter = self._loop.create_future()
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
        self._reader, self._waiter = reader, self._loop.create_future()
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
            self._forget(self)
            self.take(why)
            self.wake()

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


class EngineHandle(Protocol):
    """An engine as an event loop asks it: of its own process, or of another."""

    @property
    def engine(self) -> EngineFacts: ...

    @property
    def failure(self) -> Exception | None: ...

    @property
    def max_rows(self) -> int: ...

    @property
    def num_unfinished(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    @property
    def idle_s(self) -> float: ...

    def submit(
        self, source: RequestSource, *, whole: bool = False, in_batch: bool = False
    ) -> Answer: ...

    def end_answers(self) -> None: ...


def stopped() -> EngineStoppedError:
    return EngineStoppedError("the engine has stopped", "start the server again")


def _wake(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.wake()
