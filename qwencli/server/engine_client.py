"""The engine as the process sees it that speaks HTTP: it runs in the process that started this one.

Requests go there and pieces of answers come back through a `Channel`. The engine's interpreter has
no part in reading requests, checking them and writing events, which for many streams is as much
work as running them. It imports no torch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qwencli.engine.request import RequestSource
from qwencli.errors import EngineError
from qwencli.results import EffectiveConfig
from qwencli.server.answers import Answer, Asked, EngineHandle, Piece, stopped
from qwencli.server.channel import Channel

# Of a request: its number, and pieces of its answer.
Told = list[tuple[int, list[Piece]]]


@dataclass
class RemoteEngine:
    """What the other process said of its engine, see `EngineFacts`."""

    max_seq_len: int | None
    model_type: str | None
    can_think: bool | None
    effective: EffectiveConfig
    kv_pages: tuple[int, int] | None
    max_rows: int

    @classmethod
    def of(cls, there: EngineHandle) -> RemoteEngine:
        engine = there.engine
        return cls(
            max_seq_len=engine.max_seq_len,
            model_type=engine.model_type,
            can_think=engine.can_think,
            effective=engine.effective,
            kv_pages=pages_of(engine),
            max_rows=there.max_rows,
        )


def pages_of(engine: object) -> tuple[int, int] | None:
    """Pages in use and all pages; None where the engine has none."""
    pages: tuple[int, int] | None = getattr(engine, "kv_pages", None)
    return pages


class EngineClient:
    """Implements `EngineHandle`; of an event loop."""

    def __init__(self, channel: Channel, engine: RemoteEngine) -> None:
        self.engine = engine
        self.failure: Exception | None = None
        self._channel = channel
        self._numbers = itertools.count()
        self._answers: dict[int, Answer] = {}
        self._names: dict[Asked, int] = {}
        self._last_active_s = time.monotonic()

    @property
    def max_rows(self) -> int:
        return self.engine.max_rows

    @property
    def num_unfinished(self) -> int:
        return len(self._answers)

    @property
    def num_running(self) -> int:
        return sum(answer.begun_s is not None for answer in self._answers.values())

    @property
    def idle_s(self) -> float:
        return 0.0 if self._answers else time.monotonic() - self._last_active_s

    def submit(
        self, source: RequestSource, *, whole: bool = False, in_batch: bool = False
    ) -> Answer:
        """As `EngineThread.submit`; what it raises there ends the answer here.

        Args:
            source: can be sent, as an `AskedRequest` can.
        """
        if self.failure is not None:
            raise stopped()
        answer, number = Answer(self._forget, source, whole, in_batch), next(self._numbers)
        answer.source = None
        self._channel.send(("ask", number, source, whole, in_batch))
        self._answers[number], self._names[answer] = answer, number
        return answer

    def end_answers(self) -> None:
        for answer in list(self._answers.values()):
            answer.end(stopped())

    def take(self, told: Told, kv_pages: tuple[int, int] | None) -> None:
        """Give pieces to their readers."""
        self.engine.kv_pages = kv_pages
        for number, pieces in told:
            answer = self._answers.get(number)
            if answer is None:  # nobody waits for it any more
                continue
            if answer.begun_s is None:
                answer.begun_s = time.perf_counter()
            for piece in pieces:
                answer.take(piece)
            if answer.is_over:
                self._drop(answer)
            answer.wake()

    def fail(self, why: Exception) -> None:
        """The engine answers nothing any more."""
        self.failure = why
        self.end_answers()

    def _forget(self, answer: Answer) -> None:
        number = self._names.get(answer)
        if number is not None:
            self._channel.send(("forget", number))
            self._drop(answer)

    def _drop(self, answer: Answer) -> None:
        del self._answers[self._names.pop(answer)]
        self._last_active_s = time.monotonic()


class Forwarded(Asked):
    """A request of the other process, on the engine's side."""

    def __init__(
        self, number: int, source: RequestSource, outlet: ChannelOutlet, whole: bool, in_batch: bool
    ) -> None:
        super().__init__(source, outlet, whole=whole, in_batch=in_batch)
        self.number = number

    def taken(self) -> list[Piece]:
        """All pieces since the last call."""
        return [self._pieces.popleft() for _ in range(len(self._pieces))]


class ChannelOutlet:
    """Sends pieces to the process that asked, those of a step in one message.

    Args:
        unfinished: requests by number; those that are over are taken out.
    """

    def __init__(self, channel: Channel, engine: object, unfinished: dict[int, Forwarded]) -> None:
        self._channel, self._engine, self._unfinished = channel, engine, unfinished

    def wake(self, answers: Sequence[Forwarded]) -> None:
        for answer in answers:
            if answer.is_over:
                self._unfinished.pop(answer.number, None)
        told = [(answer.number, answer.taken()) for answer in answers]
        pages = pages_of(self._engine)
        try:
            self._channel.send(("told", told, pages))
        except Exception as error:  # noqa: BLE001 - told to those whose pieces they were
            why = EngineError(f"an answer cannot be sent: {error}", "report this fault of qwencli")
            self._channel.send(("told", [(answer.number, [why]) for answer in answers], pages))
