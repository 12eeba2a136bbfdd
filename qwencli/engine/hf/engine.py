"""The transformers engine: the reference, and the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from qwencli.config import Cache, EngineConfig, EngineName
from qwencli.engine.base_engine import BaseEngine
from qwencli.engine.device_memory import release
from qwencli.engine.frontend.model_files import FoundModel, ModelFiles
from qwencli.engine.hf import load_model
from qwencli.engine.hf.generate import NO_OVERRIDES, Generation, Overrides
from qwencli.engine.hf.quantization import scheme_of
from qwencli.engine.resolve import check_modes
from qwencli.engine.response import ResponseBuilder
from qwencli.errors import UnsupportedModeError
from qwencli.results import EffectiveConfig, GenerationChunk


class TransformersEngine(BaseEngine):
    """`from_pretrained` and `generate()`, timed from inside.

    Raises:
        UnsupportedModeError: a mode this engine does not have, on creation.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(replace(config, cache=config.cache or Cache.DYNAMIC))
        check_modes(self.config, EngineName.TRANSFORMERS)
        self._model: Any = None
        self.overrides: Overrides = NO_OVERRIDES

    @property
    def model(self) -> Any:
        """The loaded transformers model."""
        assert self._model is not None, "load() comes first"
        return self._model

    def _load(self, found: FoundModel) -> tuple[ModelFiles, EffectiveConfig]:
        files = self._open(found)
        plan = load_model.plan_load(self.config, files)
        model = load_model.load_model(self.config, plan, self.overrides)
        try:
            load_model.check_effective(self.config, plan, model)
        except UnsupportedModeError:
            del model
            release(plan.device)
            raise
        if plan.device.startswith("cuda"):
            torch.cuda.synchronize(plan.device)
        self._model = model
        dtype = load_model.effective_dtype(model)
        return files, EffectiveConfig(
            engine=EngineName.TRANSFORMERS.value,
            quantization=scheme_of(model),
            attention=load_model.effective_attention(model),
            cache=str(self.config.cache),
            device=plan.device,
            dtype=dtype,
            kv_dtype=dtype,
            threads=self._threads,
        )

    def _answer(self, answer: ResponseBuilder) -> Iterator[GenerationChunk]:
        generation = Generation(self._model, answer, self.effective, self.overrides)
        yield from generation.chunks(self.load_s)

    @torch.inference_mode()
    def _logits(self, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
        ids = torch.tensor([token_ids], device=self.effective.device)
        yield from self._model(input_ids=ids, use_cache=False).logits[0]

    def _release(self) -> None:
        if self.overrides.release_through_host:
            self._model.to("cpu")
        self._model = None
        if self.config.cache is Cache.STATIC_COMPILE:
            # Compiled graphs keep their own pool and references to the weights.
            torch.compiler.reset()
        release(self.effective.device)

    def _forget(self) -> None:
        return  # generate() keeps nothing from one call to the next

    def _recover(self) -> None:
        release(self.effective.device)
