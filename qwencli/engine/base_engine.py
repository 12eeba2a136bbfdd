"""What every engine does that holds a model in this process, around its own way to generate.

That includes `add`, `step`, `abort` and `has_unfinished` of an engine that has no batches (one
request at a time).
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from qwencli.capabilities import check_thinking
from qwencli.config import EngineConfig, SamplingOptions, SamplingParams, resolve_sampling
from qwencli.engine.device_memory import (
    is_device_lost,
    is_out_of_memory,
    out_of_memory_error,
    release,
)
from qwencli.engine.frontend.model_files import FoundModel, ModelFiles, find_model
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.machine.cpu_threads import computing_with, each_with, threads_for
from qwencli.engine.protocol import BytesRead, ManyRequests, drain
from qwencli.engine.resolve import check_seq_len, resolve_device, resolve_dtype
from qwencli.engine.response import ResponseBuilder
from qwencli.errors import (
    OutOfMemoryError,
    PromptTooLongError,
    QwenCliError,
    RequestError,
    UnsupportedModeError,
)
from qwencli.messages import GenerationRequest
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult
from qwencli.tracing import span

# How often pictures are made smaller until a request fits: of many sizes the largest are first.
FITTING_TRIES = 8
RECENT_SAMPLINGS = 64
# Room for what a schema forces at a prompt's end.
FORCED_TOKENS = 64

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from qwencli.engine.constrained import Grammars, TokenMatcher


class BaseEngine(ManyRequests, ABC):
    """Implements `Engine`; a subclass loads the weights, answers a prompt and frees the memory."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._files: ModelFiles | None = None
        self._effective: EffectiveConfig | None = None
        self._load_s = 0.0
        self._warnings: tuple[str, ...] = ()
        # Of the CPU, where that is the device.
        self._threads: int | None = None
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        # Of requests just prepared: many ask for the same, and each is looked at twice.
        self._samplings: dict[tuple[SamplingOptions, bool], SamplingParams] = {}
        self._bytes_read = BytesRead()

    def _begin_load(self, device: str) -> None:
        """Begin what a load on `device` needs no files for; `_load` ends it."""

    @abstractmethod
    def _load(self, found: FoundModel) -> tuple[ModelFiles, EffectiveConfig]:
        """Put the model on its device, done when this returns, and `_open` its files. Leaves
        nothing behind on failure."""

    def _open(self, found: FoundModel) -> ModelFiles:
        with span("tokenizer"):
            device = resolve_device(self.config.device)
            dtype = resolve_dtype(self.config.dtype, device, found.checkpoint_dtype)
            return found.open().prepared_on(device, dtype)

    def _fitted(self, files: ModelFiles) -> ModelFiles:
        """The files, with what the loaded engine knows of what fits."""
        return files

    @abstractmethod
    def _answer(self, answer: ResponseBuilder) -> Iterator[GenerationChunk]:
        """Generate; the last chunk is `answer.finish(...)`."""

    @abstractmethod
    def _logits(self, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [V] after each token of a text."""

    @abstractmethod
    def _release(self) -> None:
        """Drop the model and give its memory back."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what is kept from earlier requests to spare later ones work."""

    @abstractmethod
    def _recover(self) -> None:
        """Free what a request that ran out of memory left; the model stays."""

    @property
    def effective(self) -> EffectiveConfig:
        assert self._effective is not None, "load() comes first"
        return self._effective

    @property
    def load_s(self) -> float:
        return self._load_s

    @property
    def files(self) -> ModelFiles:
        assert self._files is not None, "load() comes first"
        return self._files

    @property
    def max_seq_len(self) -> int:
        """Most tokens, prompt and answer, that a request may take."""
        wanted = self.config.max_seq_len
        return wanted if isinstance(wanted, int) else self.files.max_seq_len

    @property
    def model_type(self) -> str | None:
        return str(self.files.hub_config.get("model_type", "")) or None

    @property
    def can_think(self) -> bool:
        return self.files.prompts.can_think

    @property
    def memory_plan(self) -> Mapping[str, int]:
        """Bytes by use as planned before the load; empty where nothing was planned."""
        return {}

    @property
    def weights_read(self) -> tuple[int, int]:
        return self._bytes_read.done, self._bytes_read.total

    def stop_load(self) -> None:
        self._bytes_read.stop()

    @property
    def load_warnings(self) -> tuple[str, ...]:
        """What did not go well while loading, though the model is there; a line each."""
        return self._warnings

    def load(self) -> None:
        """Load the model unless it is loaded.

        Raises:
            ModelError, UsageError, DeviceError, MissingDependencyError, OutOfMemoryError.
        """
        if self._files is not None:
            return
        with span("load", model=self.config.model.name):
            self._load_now()

    def _load_now(self) -> None:
        started = time.perf_counter()
        device = resolve_device(self.config.device)
        self._begin_load(device)
        with span("model files"):
            found = find_model(self.config)
        check_seq_len(self.config, found.max_seq_len)
        if device == "cpu":
            self._threads = threads_for(found.hub_config, self.config.threads)
        try:
            with computing_with(self._threads):
                files, self._effective = self._load(found)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = out_of_memory_error(device, f"loading {self.config.model.name}", error)
        else:
            self._files = self._fitted(files)
            self._samplings.clear()
            self._load_s = time.perf_counter() - started
            return
        # Outside the handler: until it ends, the traceback holds the tensors that must go.
        release(device)
        raise failure

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """Yield the answer token by token.

        Raises:
            InputError: the prompt does not fit the model, or an image cannot be used.
            OutOfMemoryError: the request does not fit the device; the engine stays usable.
            RequestError: whatever nobody foresaw; the engine stays usable.
        """
        self.load()
        try:
            yield from each_with(self._threads, self._stream(request))
        except QwenCliError:
            raise
        except Exception as error:
            if is_device_lost(error):
                raise  # for all requests
            raise RequestError.of(error, "answering it") from error

    def _stream(self, request: GenerationRequest) -> Generator[GenerationChunk, None, None]:
        started_s = time.perf_counter()
        if request.logprobs is not None:
            raise UnsupportedModeError(
                f"logprobs are not told with the engine {self.effective.engine} and the cache "
                f"{self.effective.cache}",
                nearest="the native engine with its own cache",
            )
        matcher = self._matcher(request)
        prompt = self._prompt(request, matcher)
        sampling = self._fitting(request, prompt)
        if request.bypass_caches:
            self._forget()
        # Memory that an earlier request left fragmented may be enough once it is given back, so a
        # request that has produced nothing yet is tried once more.
        for last_try in (False, True):
            held = None if matcher is None else matcher.copy()
            answer = ResponseBuilder(
                self.files,
                prompt,
                sampling,
                started_s,
                matcher=held,
                bypass_caches=request.bypass_caches,
            )
            try:
                yield from self._answer(answer)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = self._out_of_memory(prompt, error)
            else:
                return
            # Outside the handler: until it ends, the traceback holds the tensors that must go.
            self._recover()
            if last_try or answer.token_ids:
                raise failure

    def generate(self, request: GenerationRequest) -> GenerationResult:
        return drain(self.stream(request))

    def log_probs(self, text: str, most_tokens: int) -> Iterator[npt.NDArray[np.float32]]:
        """Log-probabilities [V] of the next token after each of the text's first tokens.

        The text is read as it is, without a chat template; nothing is generated.
        """
        self.load()
        ids = self.files.prompts.tokenizer.encode(text)[:most_tokens]
        made = (each.float().log_softmax(-1).cpu().numpy() for each in self._logits(ids))
        yield from each_with(self._threads, made)

    def drop_queue(self) -> None:
        if self._queue is not None:
            super().drop_queue()
            release(self.effective.device)

    def close(self) -> None:
        """Free the device memory; nothing is moved to the host on the way."""
        if self._files is not None:
            self._close_queue()
            self._files = self._grammars = None
            self._release()

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _sampling(self, request: GenerationRequest) -> SamplingParams:
        key = request.sampling, request.ignore_eos
        found = self._samplings.get(key)
        if found is None:
            found = resolve_sampling(
                request.sampling, self.files.generation_defaults, ignore_eos=request.ignore_eos
            )
            if len(self._samplings) >= RECENT_SAMPLINGS:
                self._samplings.clear()
            self._samplings[key] = found
        return found

    def _matcher(self, request: GenerationRequest) -> TokenMatcher | None:
        """What the answer is held to, from its beginning on; None where it is free."""
        if request.schema is None:
            return None
        from qwencli.engine.constrained import Grammars

        with self._grammars_lock:
            if self._grammars is None:
                files = self.files
                self._grammars = Grammars(
                    files.prompts.tokenizer, files.vocab_size, files.stop_token_ids
                )
        return self._grammars.matcher(request.schema)

    def _built(self, request: GenerationRequest, matcher: TokenMatcher | None) -> Prompt:
        """The request's prompt; a matcher has accepted what it forces at the prompt's end."""
        check_thinking(
            self.config.model.name, can_think=self.can_think, wanted=request.wants_thoughts
        )
        # Thoughts that have a budget come to an end, and the answer is held to its schema then.
        at_once = matcher is not None and not request.thinking_budget
        prompt = self._built_to_fit(request, at_once)
        if matcher is None or prompt.budget is not None:
            return prompt
        return prompt.with_forced(matcher.forced())

    def _built_to_fit(self, request: GenerationRequest, at_once: bool) -> Prompt:
        """With `--max-pixels auto` pictures are as large as there is room for beside the text."""
        room = self.max_seq_len - self._sampling(request).max_new_tokens
        if at_once:
            room -= FORCED_TOKENS
        prompts = self.files.prompts
        for _ in range(FITTING_TRIES):
            prompt = prompts.build(
                request.messages,
                thinking=request.thinking,
                thinking_budget=request.thinking_budget,
                tools=request.tools,
                starts_with=request.starts_with,
                at_once=at_once,
                most_tokens=self.max_seq_len,
            )
            over, images = len(prompt.input_ids) - room, prompt.num_image_tokens
            if over <= 0 or over >= images or self.config.max_pixels is not None:
                break
            largest = max(width * height for width, height in prompt.resized_sizes)
            smaller = prompts.within(int(largest * (images - over) / images))
            if smaller.max_pixels >= prompts.max_pixels:
                break
            prompts = smaller
        return prompt

    def _prompt(self, request: GenerationRequest, matcher: TokenMatcher | None) -> Prompt:
        """The request's prompt; like the answer, tried once more where memory was short."""
        for last_try in (False, True):
            try:
                with span("preprocess"):
                    return self._built(request, matcher)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = out_of_memory_error(
                    self.effective.device, "preparing the pictures", error, num_image_tokens=1
                )
            self._recover()
            if last_try:
                raise failure
        raise AssertionError("the last try returns or raises")

    def _out_of_memory(self, prompt: Prompt, error: BaseException) -> OutOfMemoryError:
        doing = f"answering a prompt of {len(prompt.input_ids)} tokens"
        return out_of_memory_error(
            self.effective.device, doing, error, num_image_tokens=prompt.num_image_tokens
        )

    def _fitting(self, request: GenerationRequest, prompt: Prompt) -> SamplingParams:
        """How an answer to this prompt is sampled.

        Raises:
            PromptTooLongError: prompt and answer are more than fits.
        """
        sampling = self._sampling(request)
        tokens, new = len(prompt.input_ids), sampling.max_new_tokens
        left = self.max_seq_len - tokens
        if request.cut_to_fit and 0 < left < new:
            return replace(sampling, max_new_tokens=left)
        if new > left:
            raise PromptTooLongError(
                f"the prompt has {tokens} tokens ({prompt.num_image_tokens} of images) and {new} "
                f"new ones are asked for, but {self.config.model.name} holds {self.max_seq_len}",
                self._what_fits(tokens, new),
            )
        return sampling

    def _what_fits(self, tokens: int, new: int) -> str:
        """The nearest settings with which a request that is too long would run."""
        fitting = []
        if tokens < self.max_seq_len:
            fitting.append(f"--max-new-tokens {self.max_seq_len - tokens}")
        if tokens + new <= self.files.max_seq_len:
            fitting.append(f"--max-seq-len {tokens + new}")
        if fitting:
            return f"{' or '.join(fitting)} fits"
        return "lower --max-pixels, send fewer pictures, or shorten the prompt"
