"""The one protocol all engines offer."""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, Self

from qwencli.config import EngineConfig
from qwencli.engine.request import RequestId, RequestSource, StepOutput, request_of
from qwencli.errors import LoadStoppedError, QwenCliError, RequestError
from qwencli.messages import GenerationRequest
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult

# How long a step waits for what another process computes: longer, and Windows hears no Ctrl-C.
WAIT_S = 0.2


class BytesRead:
    """How much of a model's weights has been read; other threads may look, or `stop` the reading,
    at any time.

    Args:
        total: 0 = it is not known yet.
    """

    def __init__(self) -> None:
        self.total = self.done = 0
        self._lock, self._stopped = threading.Lock(), False

    def add(self, count: int) -> None:
        """Raises LoadStoppedError once the reading is to end."""
        with self._lock:
            self.done += count
            if self._stopped:
                raise LoadStoppedError("the load was stopped")

    def stop(self) -> None:
        """End this reading, and any that begins later."""
        self._stopped = True

    def begin(self, total: int) -> None:
        with self._lock:
            self.total, self.done = total, 0


class RequestQueue(Protocol):
    """The half of `Engine` that answers many requests."""

    @property
    def max_rows(self) -> int: ...

    @property
    def has_unfinished(self) -> bool: ...

    def add(self, request: RequestSource, *, stream: bool = True) -> RequestId: ...

    def step(self) -> list[StepOutput]: ...

    def abort(self, request: RequestId) -> None: ...

    def close(self) -> None: ...


class EngineFacts(Protocol):
    """What a loaded engine is, see `Engine`."""

    @property
    def effective(self) -> EffectiveConfig: ...

    @property
    def max_seq_len(self) -> int | None: ...

    @property
    def model_type(self) -> str | None: ...

    @property
    def can_think(self) -> bool | None: ...


class Engine(EngineFacts, RequestQueue, Protocol):
    """Loads one model once and answers requests until closed. A context manager.

    `effective`, `load_s`, `max_seq_len` (most tokens of a request, None where
    a server does not say), `model_type` (config.json's word, None where a server does not say),
    `can_think` (whether thoughts can be asked for, None where a server does not say),
    `memory_plan` (bytes by use, empty where nothing is planned) and `load_warnings` (a line each)
    exist after `load`. `load` is idempotent; `close` frees device memory without moving weights to
    the host; after `close`, `load` may be called again. `weights_read` is (bytes read, all bytes)
    of the load that runs or ran last, and may be looked at from other threads; (0, 0) where that is
    not known. Abandoning or closing the iterator of `stream` cancels the request; the engine stays
    usable. `stop_load` ends a load that another thread waits for, as soon as it reads weights; it
    raises LoadStoppedError there, and so does a later one.

    Many requests at once: `add` takes one, `step` runs a step of those that run and returns what
    it gave, until `has_unfinished` is False; `client.generate_many` does that. `add` refuses
    nothing: what is wrong with a request is its `StepOutput`. `max_rows` is how many run at once,
    1 for an engine that answers one after the other. `abort` may come at any time. Without `stream`
    nobody reads the pieces of an answer: an engine may leave out those between the first, which
    says that it has begun, and the one with the result.
    `batch_from` is how many requests have to be there before it pays to run them together.
    `drop_queue` gives back what running them together takes, while none is unfinished; it is made
    anew when it is needed.
    """

    config: EngineConfig
    batch_from: int

    @property
    def load_s(self) -> float: ...

    @property
    def memory_plan(self) -> Mapping[str, int]: ...

    @property
    def load_warnings(self) -> tuple[str, ...]: ...

    @property
    def weights_read(self) -> tuple[int, int]: ...

    def load(self) -> None: ...

    def stop_load(self) -> None: ...

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]: ...

    def generate(self, request: GenerationRequest) -> GenerationResult: ...

    def drop_queue(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


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

    def add(self, request: RequestSource, *, stream: bool = True) -> RequestId:
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
            except Exception as error:  # noqa: BLE001 - others go on
                return [StepOutput(number, error=RequestError.of(error, "preparing it"))]
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


def drain(chunks: Iterator[GenerationChunk]) -> GenerationResult:
    """Run a stream to its end and return its result."""
    result = None
    for chunk in chunks:
        result = chunk.result
    assert result is not None, "a stream ends with the chunk that carries its result"
    return result


def stream_alone(
    requests: RequestQueue, request: GenerationRequest, *, stream: bool = True
) -> Iterator[GenerationChunk]:
    """The chunks of one request in a queue of its own, closed after them. Raises its error.

    While nothing comes there are empty chunks, after each of which a caller may give up.
    """
    requests.add(request, stream=stream)
    try:
        while requests.has_unfinished:
            outputs = requests.step()
            if not outputs:
                yield GenerationChunk("", ())
            for output in outputs:
                if output.error is not None:
                    raise output.error
                if output.chunk is not None:
                    yield output.chunk
    finally:
        requests.close()


class ManyRequests(ABC):
    """The half of `Engine` that takes many requests, over `stream`; a subclass that runs them
    together has a queue of its own."""

    # Making the graphs of a batch takes a GPU as long as a dozen answers.
    batch_from = 16
    _queue: RequestQueue | None = None

    @abstractmethod
    def load(self) -> None: ...

    @abstractmethod
    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]: ...

    @property
    def weights_read(self) -> tuple[int, int]:
        return 0, 0

    @property
    def max_rows(self) -> int:
        return self._requests().max_rows

    @property
    def has_unfinished(self) -> bool:
        return self._queue is not None and self._queue.has_unfinished

    @property
    def kv_pages(self) -> tuple[int, int] | None:
        """Pages of keys and values in use, and all; None where there are none yet."""
        pages: tuple[int, int] | None = getattr(self._queue, "kv_pages", None)
        return pages

    def add(self, request: RequestSource, *, stream: bool = True) -> RequestId:
        return self._requests().add(request, stream=stream)

    def step(self) -> list[StepOutput]:
        return self._requests().step()

    def abort(self, request: RequestId) -> None:
        if self._queue is not None:  # else there is none, and no model to load for it
            self._queue.abort(request)

    def stop_load(self) -> None:
        return  # an engine that reads no weights here

    def drop_queue(self) -> None:
        self._close_queue()

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


class QueuedEngine(ManyRequests):
    """An engine that runs elsewhere: a lone request goes through a queue of its own too."""

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """Yield the answer as its pieces come; raises what the queue says of the request."""
        self.load()
        return self._alone(request, stream=True)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.load()
        return drain(self._alone(request, stream=False))

    def _alone(self, request: GenerationRequest, *, stream: bool) -> Iterator[GenerationChunk]:
        yield from stream_alone(self._lone_queue(), request, stream=stream)

    def _lone_queue(self) -> RequestQueue:
        return self._make_queue()

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
