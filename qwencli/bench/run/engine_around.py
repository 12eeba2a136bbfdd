"""An engine inside another: all that its answers are not made of is passed on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

from qwencli.engine.protocol import Engine, drain
from qwencli.engine.serial_queue import ManyRequests
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationChunk, GenerationResult, RanModes


class EngineAround(ManyRequests):
    """An `Engine` that answers as the one inside does; subclasses disturb it."""

    def __init__(self, engine: Engine) -> None:
        self.config = engine.config
        self._engine = engine

    @property
    def ran(self) -> RanModes:
        return self._engine.ran

    @property
    def load_s(self) -> float:
        return self._engine.load_s

    @property
    def max_seq_len(self) -> int:
        return self._engine.max_seq_len

    @property
    def load_warnings(self) -> tuple[str, ...]:
        return self._engine.load_warnings

    @property
    def memory_plan(self) -> Mapping[str, int]:
        return self._engine.memory_plan

    def load(self) -> None:
        self._engine.load()

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        return self._engine.stream(request)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        return drain(self.stream(request))

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
