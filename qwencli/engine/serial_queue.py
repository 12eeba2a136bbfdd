"""`add`, `step`, `abort` and `has_unfinished` of an engine that has no batches: one at a time."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from qwencli.engine.protocol import RequestQueue
from qwencli.engine.request import RequestId, RequestSource, StepOutput, request_of
from qwencli.errors import QwenCliError
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationChunk


class SerialQueue:
    """Answers requests one after the other; a step is a token of the first."""

    max_rows = 1

    def __init__(self, stream: Callable[[GenerationRequest], Iterator[GenerationChunk]]) -> None:
        self._stream = stream
        self._ids = itertools.count()
        self._waiting: dict[RequestId, RequestSource] = {}
        self._running: tuple[RequestId, Iterator[GenerationChunk]] | None = None

    @property
    def has_unfinished(self) -> bool:
        return self._running is not None or bool(self._waiting)

    def add(self, request: RequestSource) -> RequestId:
        number = next(self._ids)
        self._waiting[number] = request
        return number

    def step(self) -> list[StepOutput]:
        if self._running is None:
            if not self._waiting:
                return []
            number = next(iter(self._waiting))
            try:
                request = request_of(self._waiting.pop(number))
            except QwenCliError as error:
                return [StepOutput(number, error=error)]
            self._running = number, self._stream(request)
        number, chunks = self._running
        try:
            output = StepOutput(number, next(chunks))
        except QwenCliError as error:
            output = StepOutput(number, error=error)
        if output.finished:
            self._running = None
        return [output]

    def abort(self, request: RequestId) -> None:
        self._waiting.pop(request, None)
        if self._running is not None and self._running[0] == request:
            self._running = None  # a stream that is dropped cancels its request

    def close(self) -> None:
        self._waiting.clear()
        self._running = None


class ManyRequests(ABC):
    """The half of `Engine` that takes many requests, over `stream`; a subclass that runs them
    together has a queue of its own."""

    _queue: RequestQueue | None = None

    @abstractmethod
    def load(self) -> None: ...

    @abstractmethod
    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]: ...

    @property
    def max_rows(self) -> int:
        return self._requests().max_rows

    @property
    def has_unfinished(self) -> bool:
        return self._queue is not None and self._queue.has_unfinished

    def add(self, request: RequestSource) -> RequestId:
        return self._requests().add(request)

    def step(self) -> list[StepOutput]:
        return self._requests().step()

    def abort(self, request: RequestId) -> None:
        self._requests().abort(request)

    def _make_queue(self) -> RequestQueue:
        return SerialQueue(self.stream)

    def _requests(self) -> RequestQueue:
        self.load()
        if self._queue is None:
            self._queue = self._make_queue()
        return self._queue

    def _close_queue(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._queue = None
