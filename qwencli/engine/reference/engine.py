"""The transformers engine: the reference, and the baseline of every comparison."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Self

import torch

from qwencli.config import Cache, EngineConfig, SamplingParams, resolve_sampling
from qwencli.engine.base import drain
from qwencli.engine.memory_errors import is_out_of_memory, out_of_memory_error
from qwencli.engine.prompt import Prompt
from qwencli.engine.reference import loading
from qwencli.engine.reference.generating import Generation
from qwencli.engine.reference.quantizing import scheme_of
from qwencli.engine.sources import ModelFiles, open_model
from qwencli.errors import InputError, UnsupportedModeError
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationChunk, GenerationResult, RanModes

CACHES = (Cache.DYNAMIC, Cache.STATIC, Cache.STATIC_COMPILE)


class TransformersEngine:
    """`from_pretrained` and `generate()`, timed from inside. Implements `Engine`.

    Raises:
        UnsupportedModeError: a mode this engine does not have, on creation.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.cache not in CACHES:
            raise UnsupportedModeError(
                f"--cache {config.cache} cannot run on the transformers engine",
                nearest=Cache.STATIC_COMPILE.value,
            )
        self.config = config
        self._model: Any = None
        self._files: ModelFiles | None = None
        self._load_s = 0.0
        self._ran: RanModes | None = None

    @property
    def ran(self) -> RanModes:
        assert self._ran is not None, "load() comes first"
        return self._ran

    @property
    def load_s(self) -> float:
        return self._load_s

    def load(self) -> None:
        if self._model is not None:
            return
        started = time.perf_counter()
        files = open_model(self.config)
        plan = loading.plan_load(self.config, files)
        model = loading.load_model(self.config, plan)
        try:
            loading.check_effective(self.config, plan, model)
        except UnsupportedModeError:
            del model
            loading.release(plan.device)
            raise
        if plan.device.startswith("cuda"):
            torch.cuda.synchronize(plan.device)
        self._model, self._files = model, files
        self._load_s = time.perf_counter() - started
        self._ran = RanModes(
            engine=self.config.engine.value,
            quantization=scheme_of(model),
            attention=loading.effective_attention(model),
            cache=self.config.cache.value,
            device=plan.device,
            dtype=loading.effective_dtype(model),
        )

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """Yield the answer token by token.

        Raises:
            InputError: the prompt does not fit the model, or an image cannot be used.
            OutOfMemoryError: the request does not fit the device; the engine stays usable.
        """
        self.load()
        assert self._files is not None
        started = time.perf_counter()
        prompt = self._files.prompts.build(request.messages)
        sampling = resolve_sampling(
            request.sampling, self._files.generation_defaults, ignore_eos=request.ignore_eos
        )
        self._check_length(prompt, sampling)
        generation = Generation(
            self._model, self._files, prompt, sampling, self.ran, started_s=started
        )
        try:
            yield from generation.chunks(load_s=self._load_s)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            doing = f"answering a prompt of {len(prompt.input_ids)} tokens"
            failure = out_of_memory_error(
                self.ran.device, doing, error, num_image_tokens=prompt.num_image_tokens
            )
        else:
            return
        # Outside the handler: the exception's traceback holds the tensors that must go first.
        del generation
        loading.release(self.ran.device)
        raise failure

    def generate(self, request: GenerationRequest) -> GenerationResult:
        return drain(self.stream(request))

    def close(self) -> None:
        """Free the device memory; nothing is moved to the host on the way."""
        if self._model is None:
            return
        if self.ran.device.startswith("cuda"):
            torch.cuda.synchronize(self.ran.device)
        self._model = self._files = None
        if self.config.cache is Cache.STATIC_COMPILE:
            # Compiled graphs keep their own pool and references to the weights.
            torch.compiler.reset()
        loading.release(self.ran.device)

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_length(self, prompt: Prompt, sampling: SamplingParams) -> None:
        assert self._files is not None
        needed = len(prompt.input_ids) + sampling.max_new_tokens
        limit = self.config.max_seq_len or self._files.max_seq_len
        if needed > limit:
            raise InputError(
                f"the prompt has {len(prompt.input_ids)} tokens ({prompt.num_image_tokens} of "
                f"images) and {sampling.max_new_tokens} new ones are asked for, but "
                f"{self.config.model.name} holds {limit}",
                "lower --max-new-tokens or --max-pixels, or shorten the prompt",
            )
