"""One request through `generate()`, delivered token by token with its timings."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qwencli.config import Cache, SamplingParams
from qwencli.engine.prompt import Prompt
from qwencli.engine.reference.inversion import pulled
from qwencli.engine.reference.recorder import Clock, TokenRecorder, VisionSpan
from qwencli.engine.sources import ModelFiles
from qwencli.errors import UnsupportedModeError
from qwencli.results import FinishReason, GenerationChunk, GenerationResult, RanModes, Timings

# A token's id and the clock's mark of when it was ready.
Token = tuple[int, Any]


class Generation:
    """One call of `generate()` for one prompt.

    Args:
        started_s: when the request arrived, on `time.perf_counter`.
    """

    def __init__(
        self,
        model: Any,
        files: ModelFiles,
        prompt: Prompt,
        sampling: SamplingParams,
        ran: RanModes,
        *,
        started_s: float,
    ) -> None:
        self._model, self._files, self._prompt = model, files, prompt
        self._sampling, self._ran, self._started_s = sampling, ran, started_s
        self._stop_ids = frozenset() if sampling.ignore_eos else frozenset(files.stop_token_ids)
        self._tokens: list[Token] = []

    def chunks(self, *, load_s: float) -> Iterator[GenerationChunk]:
        """Yield each token's text as it becomes known, and the result with the last chunk."""
        inputs = self._inputs()
        detokenizer = self._files.detokenizer()
        text: list[str] = []
        clock = Clock(self._ran.device)
        with VisionSpan(self._model, clock) as vision:
            tokens: Iterator[Token] = pulled(lambda push: self._generate(inputs, clock, push))
            for token_id, mark in tokens:
                self._tokens.append((token_id, mark))
                piece = "" if token_id in self._stop_ids else detokenizer.push(token_id)
                text.append(piece)
                yield GenerationChunk(piece, (token_id,))
        self._check_cache()
        tail = detokenizer.finish()
        result = self._result("".join([*text, tail]), clock, vision, load_s)
        yield GenerationChunk(tail, (), result)

    @torch.inference_mode()
    def _generate(
        self, inputs: dict[str, Any], clock: Clock, push: Callable[[Token], None]
    ) -> None:
        from transformers import StoppingCriteriaList

        sampling = self._sampling
        seed = secrets.randbits(32) if sampling.seed < 0 else sampling.seed
        torch.manual_seed(seed)
        recorder = TokenRecorder(
            clock,
            self._ran.device,
            sampling.max_new_tokens + 1,
            lambda token_id, mark: push((token_id, mark)),
        )
        self._model.generate(
            **inputs,
            generation_config=self._generation_config(),
            stopping_criteria=StoppingCriteriaList([recorder]),
        )
        if self._ran.device.startswith("cuda"):
            torch.cuda.synchronize(self._ran.device)
        recorder.flush()

    def _inputs(self) -> dict[str, Any]:
        device, prompt = self._ran.device, self._prompt
        input_ids = torch.tensor([prompt.input_ids], dtype=torch.int64, device=device)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if prompt.pixel_values is not None:
            pixels = torch.from_numpy(prompt.pixel_values)
            inputs["pixel_values"] = pixels.to(device, getattr(torch, self._ran.dtype))
            inputs["image_grid_thw"] = torch.tensor(prompt.grid_thw, device=device)
            inputs["mm_token_type_ids"] = torch.tensor([prompt.mm_token_type_ids], device=device)
        return inputs

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        sampling = self._sampling
        settings: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.do_sample,
            "repetition_penalty": sampling.repetition_penalty,
            "use_cache": True,
            "pad_token_id": self._files.pad_token_id,
            "eos_token_id": sorted(self._stop_ids) or None,
            **_CACHE_SETTINGS[Cache(self._ran.cache)],
        }
        if sampling.do_sample:
            settings |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p or None,
            }
        return GenerationConfig(**settings)

    def _check_cache(self) -> None:
        """`generate()` skips compilation without a word where it cannot compile; we do not."""
        if self._ran.cache == Cache.STATIC_COMPILE and not hasattr(self._model, "_compiled_call"):
            raise UnsupportedModeError(
                f"--cache {self._ran.cache}: transformers did not compile this model",
                nearest=Cache.STATIC.value,
            )

    def _result(
        self, text: str, clock: Clock, vision: VisionSpan, load_s: float
    ) -> GenerationResult:
        ids = tuple(token_id for token_id, _ in self._tokens)
        marks = [clock.origin, *(mark for _, mark in self._tokens)]
        token_t_s = tuple(clock.host_s(mark) for mark in marks[1:])
        step_s = tuple(clock.seconds(a, b) for a, b in itertools.pairwise(marks))
        decode_s = sum(step_s[1:])
        finish: FinishReason = "stop" if ids and ids[-1] in self._stop_ids else "length"
        vision_s = vision.seconds()
        on_gpu = self._ran.device.startswith("cuda")
        return GenerationResult(
            text=text,
            token_ids=ids,
            finish_reason=finish,
            num_prompt_tokens=len(self._prompt.input_ids),
            num_image_tokens=self._prompt.num_image_tokens,
            timings=Timings(
                load_s=load_s,
                preprocess_s=self._prompt.preprocess_s,
                vision_encode_s=vision_s,
                prefill_s=step_s[0] - (vision_s or 0.0),
                ttft_s=token_t_s[0] - self._started_s,
                decode_s=decode_s,
                e2e_s=time.perf_counter() - self._started_s,
                decode_tok_per_s=(len(ids) - 1) / decode_s if decode_s > 0 else None,
            ),
            ran=self._ran,
            token_t_s=token_t_s,
            token_gpu_ms=tuple(s * 1e3 for s in step_s) if on_gpu else None,
        )


_CACHE_SETTINGS: dict[Cache, dict[str, Any]] = {
    Cache.DYNAMIC: {"cache_implementation": "dynamic", "disable_compile": True},
    Cache.STATIC: {"cache_implementation": "static", "disable_compile": True},
    Cache.STATIC_COMPILE: {"cache_implementation": "static", "disable_compile": False},
}
