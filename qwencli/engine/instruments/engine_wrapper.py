"""An engine around another one: what a study or an injected fault disturbs it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

from qwencli.engine.protocol import Engine, ManyRequests, drain
from qwencli.messages import GenerationRequest
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult


class EngineWrapper(ManyRequests):
    """An `Engine` that answers as the one inside does; subclasses disturb it."""

    def __init__(self, engine: Engine) -> None:
        self.config = engine.config
        self._engine = engine

    @property
    def effective(self) -> EffectiveConfig:
        return self._engine.effective

    @property
    def load_s(self) -> float:
        return self._engine.load_s

    @property
    def max_seq_len(self) -> int | None:
        return self._engine.max_seq_len

    @property
    def model_type(self) -> str | None:
        return self._engine.model_type

    @property
    def can_think(self) -> bool | None:
        return self._engine.can_think

    @property
    def load_warnings(self) -> tuple[str, ...]:
        return self._engine.load_warnings

    def stop_load(self) -> None:
        self._engine.stop_load()

    @property
    def weights_read(self) -> tuple[int, int]:
        return self._engine.weights_read

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
