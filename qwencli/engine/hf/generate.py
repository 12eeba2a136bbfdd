"""One request through transformers' `generate()`, delivered token by token with its timings.

`generate()` pushes tokens; our engines are pulled. A second thread would put a second holder of
the GIL into what we measure, and torch.compile's CUDA graphs are bound to the thread that made
them. A greenlet switches stacks inside the one thread instead (`as_generator`).

`generate()` already waits for the GPU once per token, when it asks whether to stop. `TokenRecorder`
adds no wait of its own: on CUDA it records an event and starts an asynchronous copy of the new
token id when the token has been chosen, and reads both at the *next* token, when `generate()`'s
own wait has passed them. Tokens are therefore handed on one step late, with exact times.

`Overrides` is what an experiment (`qwencli bench study`) has the engine do otherwise: what programs
around transformers did or do, one thing at a time. Ordinary use never does.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from transformers import LogitsProcessor, StoppingCriteria

from qwencli.config import Cache
from qwencli.engine.constrained import TokenMatcher, fill_masks
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.frontend.preprocess import VisualInputs
from qwencli.engine.native.sampler import masked
from qwencli.engine.response import ResponseBuilder
from qwencli.errors import UnsupportedModeError
from qwencli.results import EffectiveConfig, GenerationChunk


@dataclass(frozen=True)
class Overrides:
    """
    Args:
        load: keywords of `from_pretrained` that replace the engine's own.
        through_host: load in float32 into host memory first, and cast and move afterwards.
        quantization: keywords of `BitsAndBytesConfig` that replace the engine's own.
        generate: settings of `GenerationConfig` that replace the engine's own.
        no_grad: run under `torch.no_grad` in place of `torch.inference_mode`.
        release_through_host: move the model to host memory before dropping it.
    """

    load: Mapping[str, Any] = field(default_factory=dict)
    through_host: bool = False
    quantization: Mapping[str, Any] = field(default_factory=dict)
    generate: Mapping[str, Any] = field(default_factory=dict)
    no_grad: bool = False
    release_through_host: bool = False


NO_OVERRIDES = Overrides()


T = TypeVar("T")


def as_generator(push_all: Callable[[Callable[[T], None]], None]) -> Generator[T]:
    """Yield every value that `push_all(push)` pushes, as it pushes it.

    Closing the generator early raises GreenletExit at the pending `push`, so that `push_all`
    unwinds through its own `finally` blocks. An exception in `push_all` comes out here.
    """
    consumer = getcurrent()

    def push(value: T) -> None:
        consumer.switch(value)

    producer = greenlet(lambda: push_all(push))
    try:
        value = producer.switch()
        while not producer.dead:
            yield value
            # The consumer may pull from another greenlet or frame than the one that started.
            consumer = getcurrent()
            producer.parent = consumer
            value = producer.switch()
    finally:
        if not producer.dead:
            producer.throw(GreenletExit)


class VisionSpan:
    """Marks the start and end of each run of the vision tower by hooks; a context manager."""

    def __init__(self, model: Any, clock: EventTimer) -> None:
        self.marks: list[tuple[Mark, Mark]] = []
        self._clock = clock
        self._start: Mark = None
        self._tower = getattr(getattr(model, "model", None), "visual", None)
        self._handles: list[Any] = []

    def __enter__(self) -> VisionSpan:
        if self._tower is not None:
            self._handles = [
                self._tower.register_forward_pre_hook(self._before),
                self._tower.register_forward_hook(self._after),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: Any, inputs: Any) -> None:
        self._start = self._clock.mark()

    def _after(self, module: Any, inputs: Any, output: Any) -> None:
        self.marks.append((self._start, self._clock.mark()))


class TokenRecorder(StoppingCriteria):
    """Called by `generate()` after each token is chosen and before it waits for the device.

    Args:
        capacity: most tokens the call can produce.
        deliver: called once per token, one token late; `flush` delivers the last.
    """

    def __init__(
        self, clock: EventTimer, device: str, capacity: int, deliver: Callable[[int, Mark], None]
    ) -> None:
        self._clock, self._deliver = clock, deliver
        self._cuda = device.startswith("cuda")
        self._go_on = torch.zeros(1, dtype=torch.bool, device=device)
        self._ids = torch.empty(capacity, dtype=torch.int64, pin_memory=self._cuda)
        self._count = 0
        self._pending: Mark = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.flush()
        self._ids[self._count].copy_(input_ids[0, -1], non_blocking=self._cuda)
        self._pending = self._clock.mark()
        self._count += 1
        return self._go_on

    def flush(self) -> None:
        """Deliver the token whose id the device has written by now."""
        if self._pending is not None:
            mark, self._pending = self._pending, None
            self._deliver(int(self._ids[self._count - 1]), mark)


class SchemaProcessor(LogitsProcessor):
    """Leaves the scores of those tokens that the answer's schema allows next.

    Args:
        num_prompt_tokens: behind them the answer begins.
    """

    def __init__(self, matcher: TokenMatcher, vocab_size: int, num_prompt_tokens: int) -> None:
        # Tokens are handed on one step late, so what has accepted those is behind.
        self._matcher, self._taken = matcher.copy(), num_prompt_tokens
        self._mask = torch.full((1, -(-vocab_size // 32)), -1, dtype=torch.int32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in input_ids[0, self._taken :].tolist():
            self._matcher.accept(token)
        self._taken = input_ids.shape[1]
        fill_masks([(self._matcher, 0)], self._mask)
        return masked(scores, self._mask.to(scores.device))


# A token's id and the clock's mark of when it was ready.
Token = tuple[int, Mark]

_CACHE_SETTINGS: dict[Cache, dict[str, Any]] = {
    Cache.DYNAMIC: {"cache_implementation": "dynamic", "disable_compile": True},
    Cache.STATIC: {"cache_implementation": "static", "disable_compile": True},
    Cache.STATIC_COMPILE: {"cache_implementation": "static", "disable_compile": False},
}


class Generation:
    """One answer: a call of `generate()`, or one a round."""

    def __init__(
        self,
        model: Any,
        answer: ResponseBuilder,
        effective: EffectiveConfig,
        overrides: Overrides = NO_OVERRIDES,
    ) -> None:
        self._model, self._answer, self._effective = model, answer, effective
        self._overrides = overrides

    def chunks(self, load_s: float) -> Iterator[GenerationChunk]:
        """Yield each token's text as it becomes known, and the result with the last chunk."""
        answer = self._answer
        clock = EventTimer(self._effective.device)
        with VisionSpan(self._model, clock) as vision:
            yield from self._round(clock)
            while (between := answer.next_round()) is not None:
                yield between
                yield from self._round(clock)
        self._check_cache()
        yield answer.finish(clock, vision.marks, self._effective, load_s)

    def _round(self, clock: EventTimer) -> Iterator[GenerationChunk]:
        """One round of decoding, see `response`: one call of `generate()`."""
        inputs = self._inputs()
        tokens: Generator[Token] = as_generator(lambda push: self._generate(inputs, clock, push))
        with closing(tokens):
            for token_id, mark in tokens:
                yield self._answer.add(token_id, mark)
                if self._answer.round_over:
                    break

    def _generate(
        self, inputs: dict[str, Any], clock: EventTimer, push: Callable[[Token], None]
    ) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        sampling = self._answer.settings
        torch.manual_seed(secrets.randbits(32) if sampling.seed < 0 else sampling.seed)
        recorder = TokenRecorder(
            clock,
            self._effective.device,
            capacity=sampling.max_new_tokens + 1,
            deliver=lambda token_id, mark: push((token_id, mark)),
        )
        processors = LogitsProcessorList()
        if self._answer.matcher is not None:
            vocab_size = self._answer.files.vocab_size
            num_prompt_tokens = len(self._answer.current_prompt.input_ids)
            held = SchemaProcessor(self._answer.matcher, vocab_size, num_prompt_tokens)
            processors.append(held)
        without_grad = torch.no_grad() if self._overrides.no_grad else torch.inference_mode()
        with without_grad:
            self._model.generate(
                **inputs,
                generation_config=self._generation_config(),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([recorder]),
            )
        if self._effective.device.startswith("cuda"):
            torch.cuda.synchronize(self._effective.device)
        recorder.flush()

    def _inputs(self) -> dict[str, Any]:
        device, prompt = self._effective.device, self._answer.current_prompt
        input_ids = torch.tensor([prompt.input_ids], dtype=torch.int64, device=device)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if prompt.inputs is not None:
            inputs |= self._visual_inputs(prompt.inputs)
            inputs["mm_token_type_ids"] = torch.tensor([prompt.mm_token_type_ids], device=device)
        return inputs

    def _visual_inputs(self, shown: VisualInputs) -> dict[str, Any]:
        device, dtype = self._effective.device, getattr(torch, str(self._effective.dtype))
        inputs: dict[str, Any] = {}
        for video, pixels, grids in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            chosen = [i for i, visual in enumerate(shown.visuals) if visual.video is video]
            if chosen:
                patches = [torch.as_tensor(shown.patches[i]).to(device, dtype) for i in chosen]
                inputs[pixels] = torch.cat(patches)
                inputs[grids] = torch.tensor([shown.grid_thw[i] for i in chosen], device=device)
        seconds = [visual.seconds_per_grid for visual in shown.visuals if visual.video]
        if seconds and self._model.config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = seconds
        return inputs

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        sampling = self._answer.settings
        settings: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.do_sample,
            "repetition_penalty": sampling.repetition_penalty,
            "use_cache": True,
            "pad_token_id": self._answer.files.pad_token_id,
            "eos_token_id": sorted(self._answer.stop_ids) or None,
            **_CACHE_SETTINGS[Cache(str(self._effective.cache))],
        }
        if sampling.do_sample:
            settings |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p or None,
            }
        return GenerationConfig(**settings | dict(self._overrides.generate))

    def _check_cache(self) -> None:
        """`generate()` skips compilation without a word where it cannot compile; we do not."""
        if self._effective.cache == Cache.STATIC_COMPILE and not hasattr(
            self._model, "_compiled_call"
        ):
            raise UnsupportedModeError(
                f"--cache {self._effective.cache}: transformers did not compile this model",
                nearest=Cache.STATIC.value,
            )
