"""From requests to prompts that are ready to run: prepared in threads, beside the steps.

Pictures are opened and resized, the template rendered, tokens counted and everything laid out on
the host, some requests ahead of those that run. Requests come out in the order they came in.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch

from qwencli.config import SamplingParams
from qwencli.engine.cache.paged_kv import PAGE_SIZE
from qwencli.engine.cache.prefix_cache import digests_of, keys_of, page_keys
from qwencli.engine.constrained import TokenMatcher
from qwencli.engine.frontend.model_files import ModelFiles
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.request import Key, RequestId, RequestSource, request_of
from qwencli.engine.response import ResponseBuilder
from qwencli.engine.runner_prompt import PromptLayouts, RunnerPrompt
from qwencli.messages import GenerationRequest
from qwencli.models.shapes import ModelShape

# Threads that read, resize and tokenize for the steps to come: as few as keep prompts ready, as the
# thread that runs the model waits for the interpreter's lock whenever one of them has it.
FIRST_PREPARERS, MOST_PREPARERS = 3, 8
# Prompts that are ready from which on fewer threads will do: about those of one step.
PLENTY_READY = 16
# Requests that are prepared or being prepared before they start; their pictures take memory.
PREPARED_AHEAD = 64


@dataclass
class PreparedInput:
    """A request whose prompt is ready to run.

    Args:
        keys: of the prompt's slots, and `page_keys` of its whole pages; `rest` the keys of the
            slots behind those, None where nothing is shared.
    """

    answer: ResponseBuilder
    prompt: RunnerPrompt
    keys: list[Key]
    page_keys: list[bytes]
    rest: list[Key] | None


class _Turns:
    """Lets as many threads work as `most` says at that time."""

    def __init__(self, most: int) -> None:
        self.most, self._working = most, 0
        self._free = threading.Condition()

    def __enter__(self) -> None:
        with self._free:
            self._free.wait_for(lambda: self._working < self.most)
            self._working += 1

    def __exit__(self, *exc: object) -> None:
        with self._free:
            self._working -= 1
            self._free.notify()

    def allow(self, most: int) -> None:
        with self._free:
            self.most = most
            self._free.notify()


class InputProcessor:
    """The requests that no scheduler knows yet.

    Args:
        device: whose stream pictures are prepared on.
        prepare: a request -> its prompt, its settings and what it is held to; runs in threads.
            Raises what is wrong with the request.
    """

    def __init__(
        self,
        files: ModelFiles,
        shape: ModelShape,
        device: str,
        prepare: Callable[[GenerationRequest], tuple[Prompt, SamplingParams, TokenMatcher | None]],
    ) -> None:
        self._files, self._prepare = files, prepare
        self._layouts = PromptLayouts(shape)
        self._added: OrderedDict[RequestId, tuple[RequestSource, float, bool]] = OrderedDict()
        self._preparing: OrderedDict[RequestId, Future[PreparedInput]] = OrderedDict()
        self._most_turns = min(MOST_PREPARERS, max(1, (os.cpu_count() or 1) - 1))
        self._turns = _Turns(min(FIRST_PREPARERS, self._most_turns))
        self._threads = ThreadPoolExecutor(
            self._most_turns,
            thread_name_prefix="prepare",
            initializer=_own_stream,
            initargs=(device,),
        )

    def __len__(self) -> int:
        return len(self._added) + len(self._preparing)

    def add(self, number: RequestId, request: RequestSource, stream: bool) -> None:
        self._added[number] = request, time.perf_counter(), stream

    def abort(self, number: RequestId) -> None:
        self._added.pop(number, None)
        future = self._preparing.pop(number, None)
        if future is not None:
            future.cancel()

    def begin(self, num_ready: int) -> None:
        """Begin to prepare what came, as far as memory is for; `num_ready` wait for the device."""
        while self._added and len(self._preparing) + num_ready < PREPARED_AHEAD:
            number, added = self._added.popitem(last=False)
            self._preparing[number] = self._threads.submit(self._prepared, *added)

    def share_lock(self, num_ready: int) -> None:
        """More threads prepare where nothing is ready, fewer where there is plenty."""
        turns = self._turns.most
        if not num_ready and self._preparing:
            turns += 1
        elif num_ready >= PLENTY_READY:
            turns -= 1
        turns = min(max(turns, 1), self._most_turns)
        if turns != self._turns.most:
            self._turns.allow(turns)

    def take(self) -> Iterator[tuple[RequestId, PreparedInput | Exception]]:
        """What is ready since, or what was wrong with it, in the order it came."""
        for number in [number for number, future in self._preparing.items() if future.done()]:
            yield number, _outcome(self._preparing.pop(number))

    def wait(self) -> None:
        """Wait until one is ready, if any is being prepared."""
        if self._preparing:
            wait(list(self._preparing.values()), return_when=FIRST_COMPLETED)

    def next_round(self, prompt: RunnerPrompt, answer: ResponseBuilder) -> RunnerPrompt:
        """The prompt of an answer's next round: what was run before, and what is fed behind it."""
        return self._layouts.gone_on(
            prompt,
            answer.current_prompt.input_ids,
            answer.settings,
            sorted(answer.stop_ids),
            answer.matcher,
        )

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _prepared(self, request: RequestSource, arrived_s: float, stream: bool) -> PreparedInput:
        with self._turns:
            return self._prepared_now(request, arrived_s, stream)

    def _prepared_now(
        self, request: RequestSource, arrived_s: float, stream: bool
    ) -> PreparedInput:
        asked = request_of(request)
        prompt, sampling, matcher = self._prepare(asked)
        answer = ResponseBuilder(
            self._files, prompt, sampling, arrived_s, matcher=matcher, logprobs=asked.logprobs
        )
        # Log-probabilities stand in the pieces alone.
        answer.stream = stream or asked.logprobs is not None
        digests = digests_of(prompt)
        keys, pages = list[Key](), list[bytes]()
        rest: list[Key] | None = None
        if asked.bypass_caches:
            digests = [os.urandom(len(each)) for each in digests]
        else:
            keys = keys_of(prompt, digests)
            pages = page_keys(keys, PAGE_SIZE)
            rest = keys[len(pages) * PAGE_SIZE :]
        stop_ids = sorted(answer.stop_ids)
        with_logprobs = asked.logprobs is not None
        laid_out = self._layouts.laid_out(
            prompt,
            digests,
            answer.settings,
            stop_ids,
            answer.matcher,
            with_logprobs,
            measured=asked.bypass_caches,
        )
        if prompt.inputs is not None:
            # What the runner has it needs once; an answer lives longer.
            answer.prompt = replace(prompt, inputs=replace(prompt.inputs, patches=(), frames=()))
        return PreparedInput(answer, laid_out, keys, pages, rest)


def _outcome(future: Future[PreparedInput]) -> PreparedInput | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, Exception):
        raise error
    return error


def _own_stream(device: str) -> None:
    """Pictures are prepared beside the steps, not behind them."""
    if device.startswith("cuda"):
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
