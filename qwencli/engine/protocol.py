"""The one protocol all engines offer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, Self

from qwencli.config import EngineConfig
from qwencli.engine.request import RequestId, RequestSource, StepOutput
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationChunk, GenerationResult, RanModes


class RequestQueue(Protocol):
    """The half of `Engine` that answers many requests."""

    @property
    def max_rows(self) -> int: ...

    @property
    def has_unfinished(self) -> bool: ...

    def add(self, request: RequestSource) -> RequestId: ...

    def step(self) -> list[StepOutput]: ...

    def abort(self, request: RequestId) -> None: ...

    def close(self) -> None: ...


class Engine(RequestQueue, Protocol):
    """Loads one model once and answers requests until closed. A context manager.

    `ran`, `load_s`, `max_seq_len` (most tokens of a request), `memory_plan` (bytes by use, empty
    where nothing is planned) and `load_warnings` (a line each) exist after `load`. `load` is
    idempotent; `close` frees device memory without moving weights to the host; after `close`,
    `load` may be called again.
    Abandoning or closing the iterator of `stream` cancels the request; the engine stays usable.

    Many requests at once: `add` takes one, `step` runs a step of those that run and returns what
    it gave, until `has_unfinished` is False; `client.generate_many` does that. `add` refuses
    nothing: what is wrong with a request is its `StepOutput`. `max_rows` is how many run at once,
    1 for an engine that answers one after the other. `abort` may come at any time.
    """

    config: EngineConfig

    @property
    def ran(self) -> RanModes: ...

    @property
    def load_s(self) -> float: ...

    @property
    def max_seq_len(self) -> int: ...

    @property
    def memory_plan(self) -> Mapping[str, int]: ...

    @property
    def load_warnings(self) -> tuple[str, ...]: ...

    def load(self) -> None: ...

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]: ...

    def generate(self, request: GenerationRequest) -> GenerationResult: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def drain(chunks: Iterator[GenerationChunk]) -> GenerationResult:
    """Run a stream to its end and return its result."""
    result = None
    for chunk in chunks:
        result = chunk.result
    assert result is not None, "a stream ends with the chunk that carries its result"
    return result
