"""One request through `generate()`, delivered token by token with its timings."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import torch

from qwencli.config import Cache
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.frontend.preprocess import VisualInputs
from qwencli.engine.hf.changes import AS_IS, Changes
from qwencli.engine.hf.inversion import pulled
from qwencli.engine.hf.recorder import TokenRecorder, VisionSpan
from qwencli.engine.response import ResponseBuilder
from qwencli.errors import UnsupportedModeError
from qwencli.results import GenerationChunk, RanModes

# A token's id and the clock's mark of when it was ready.
Token = tuple[int, Mark]

_CACHE_SETTINGS: dict[Cache, dict[str, Any]] = {
    Cache.DYNAMIC: {"cache_implementation": "dynamic", "disable_compile": True},
    Cache.STATIC: {"cache_implementation": "static", "disable_compile": True},
    Cache.STATIC_COMPILE: {"cache_implementation": "static", "disable_compile": False},
}


class Generation:
    """One call of `generate()` for one answer."""

    def __init__(
        self, model: Any, answer: ResponseBuilder, ran: RanModes, changes: Changes = AS_IS
    ) -> None:
        self._model, self._answer, self._ran = model, answer, ran
        self._changes = changes

    def chunks(self, load_s: float) -> Iterator[GenerationChunk]:
        """Yield each token's text as it becomes known, and the result with the last chunk."""
        answer = self._answer
        clock = EventTimer(self._ran.device)
        inputs = self._inputs()
        tokens: Generator[Token] = pulled(lambda push: self._generate(inputs, clock, push))
        with VisionSpan(self._model, clock) as vision, closing(tokens):
            for token_id, mark in tokens:
                yield answer.add(token_id, mark)
                if answer.stopped:
                    break
        self._check_cache()
        yield answer.finish(clock, vision.marks, self._ran, load_s)

    def _generate(
        self, inputs: dict[str, Any], clock: EventTimer, push: Callable[[Token], None]
    ) -> None:
        from transformers import StoppingCriteriaList

        sampling = self._answer.sampling
        torch.manual_seed(secrets.randbits(32) if sampling.seed < 0 else sampling.seed)
        recorder = TokenRecorder(
            clock,
            self._ran.device,
            capacity=sampling.max_new_tokens + 1,
            deliver=lambda token_id, mark: push((token_id, mark)),
        )
        without_grad = torch.no_grad() if self._changes.no_grad else torch.inference_mode()
        with without_grad:
            self._model.generate(
                **inputs,
                generation_config=self._generation_config(),
                stopping_criteria=StoppingCriteriaList([recorder]),
            )
        if self._ran.device.startswith("cuda"):
            torch.cuda.synchronize(self._ran.device)
        recorder.flush()

    def _inputs(self) -> dict[str, Any]:
        device, prompt = self._ran.device, self._answer.prompt
        input_ids = torch.tensor([prompt.input_ids], dtype=torch.int64, device=device)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if prompt.inputs is not None:
            inputs |= self._visual_inputs(prompt.inputs)
            inputs["mm_token_type_ids"] = torch.tensor([prompt.mm_token_type_ids], device=device)
        return inputs

    def _visual_inputs(self, shown: VisualInputs) -> dict[str, Any]:
        device, dtype = self._ran.device, getattr(torch, self._ran.dtype)
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

        sampling = self._answer.sampling
        settings: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.do_sample,
            "repetition_penalty": sampling.repetition_penalty,
            "use_cache": True,
            "pad_token_id": self._answer.files.pad_token_id,
            "eos_token_id": sorted(self._answer.stop_ids) or None,
            **_CACHE_SETTINGS[Cache(self._ran.cache)],
        }
        if sampling.do_sample:
            settings |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p or None,
            }
        return GenerationConfig(**settings | dict(self._changes.generate))

    def _check_cache(self) -> None:
        """`generate()` skips compilation without a word where it cannot compile; we do not."""
        if self._ran.cache == Cache.STATIC_COMPILE and not hasattr(self._model, "_compiled_call"):
            raise UnsupportedModeError(
                f"--cache {self._ran.cache}: transformers did not compile this model",
                nearest=Cache.STATIC.value,
            )
