"""One request: encode, prefill what is new, decode with the host running ahead of its reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qwencli.config import Cache
from qwencli.engine.answer import Answer
from qwencli.engine.clock import Clock, Mark
from qwencli.engine.native.attention import AttentionPlan
from qwencli.engine.native.decoding import DecodeState
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import Prompt as ModelPrompt
from qwencli.engine.native.quiet_host import quiet_host
from qwencli.engine.native.sampler import kind_of
from qwencli.engine.native.session import (
    CachedSequence,
    FeatureCache,
    Key,
    digests_of,
    keys_of,
)
from qwencli.engine.native.steppers import Stepper
from qwencli.engine.native.vision import VisionFeatures
from qwencli.results import GenerationChunk, RanModes

# Steps on their way to the GPU beyond the one being read. Enough that a host thread that is kept
# from running for some milliseconds leaves the GPU busy; after a stop token they are wasted.
RUN_AHEAD = 8


class Generation:
    """Answers requests with one model, its caches and its stepper; lives as long as they do."""

    def __init__(
        self,
        model: QwenModel,
        state: DecodeState,
        stepper: Stepper,
        ran: RanModes,
    ) -> None:
        self._model, self._state, self._stepper, self._ran = model, state, stepper, ran
        self._sequence = CachedSequence(state.cache)
        self._features = FeatureCache()
        self._readback = Readback(ran.device, len(state.slots))

    def forget(self) -> None:
        """Drop everything kept from earlier requests."""
        self._sequence.forget_after(0)
        self._features.clear()

    @torch.inference_mode()
    def step_logits(self, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [V] after each token of a text: the first is a prompt, each further one a decode
        step as the model decodes, fused where it is. In a cache of its own."""
        model = self._model
        dynamic = self._ran.cache == Cache.DYNAMIC
        cache = model.dynamic_cache() if dynamic else model.static_cache(1, len(token_ids) + 1)
        first, *rest = token_ids
        yield model.prefill(model.prepare([ModelPrompt([first])]), cache)[0]
        for slot, token in enumerate(rest, start=1):
            at = torch.tensor([slot], device=model.device)
            one = torch.tensor([token], device=model.device)
            yield model.decode_step(one, at, at, cache, AttentionPlan(slot + 1, None))[0]

    @torch.inference_mode()
    def _prefill(
        self, answer: Answer, keys: list[Key], digests: list[bytes], clock: Clock
    ) -> list[tuple[Mark, Mark]]:
        """Fill the cache with the prompt and choose the first token; returns vision's marks."""
        prompt, state = answer.prompt, self._state
        vision: list[tuple[Mark, Mark]] = []

        def encode(index: int) -> VisionFeatures:
            assert prompt.inputs is not None, "only a prompt with pictures is asked for them"
            start = clock.mark()
            patches = torch.as_tensor(prompt.inputs.patches[index])
            patches = patches.to(self._model.device, self._model.dtype)
            features = self._model.encode_images(patches, [prompt.grid_thw[index]])
            vision.append((start, clock.mark()))
            return features

        features = self._features.features(digests, encode)
        inputs = self._model.prepare([ModelPrompt(prompt.input_ids, prompt.visuals)], features)
        stop_ids = sorted(answer.stop_ids)
        state.begin(answer.sampling, inputs.ids[0], stop_ids, inputs.next_positions)
        shared = self._sequence.reuse(keys)
        state.choose_first(self._model.prefill(inputs, state.cache, start=shared))
        self._sequence.remember(keys)
        return vision

    def chunks(self, answer: Answer, load_s: float) -> Iterator[GenerationChunk]:
        """Yield each token's text, and the result with the last chunk.

        However the request ends, the cache afterwards holds what it is remembered to hold.
        """
        state = self._state
        # First of all: captures that a request is the first to need are part of its prefill.
        clock = Clock(self._ran.device)
        first_slot = len(answer.prompt.input_ids)
        steps = answer.sampling.max_new_tokens - 1
        digests = digests_of(answer.prompt)
        keys = keys_of(answer.prompt, digests)
        with torch.inference_mode():
            state.kind = kind_of(answer.sampling)
            self._stepper.prepare(first_slot, first_slot + steps)
        try:
            vision = self._prefill(answer, keys, digests, clock)
            with quiet_host():
                for token_id, mark in self._decode(clock, first_slot, steps):
                    yield answer.add(token_id, mark)
                    if answer.stopped:
                        break
        except BaseException:
            # Steps that are still running write into slots after the prompt only.
            self._sequence.forget_after(first_slot)
            raise
        # The last token has not been fed, so its slot is not written.
        self._sequence.remember([*keys, *answer.token_ids[:-1]])
        yield answer.finish(clock, vision, self._ran, load_s)

    def _decode(self, clock: Clock, first_slot: int, steps: int) -> Iterator[tuple[int, Mark]]:
        """The first token and those of `steps` steps, as the host gets to read them."""
        readback = self._readback
        readback.begin()
        with torch.inference_mode():
            readback.store(self._state.token, clock)
        enqueued = 0
        for delivered in range(steps + 1):
            with torch.inference_mode():
                while enqueued < min(steps, delivered + readback.run_ahead):
                    self._stepper.run(first_slot + enqueued)
                    readback.store(self._state.token, clock)
                    enqueued += 1
            yield readback.read(delivered)


class Readback:
    """Token ids on their way from the device to the host."""

    def __init__(self, device: str, capacity: int) -> None:
        self._cuda = device.startswith("cuda")
        # A host that runs the steps itself has nothing to run ahead of.
        self.run_ahead = RUN_AHEAD if self._cuda else 0
        self._pinned: list[torch.Tensor] = []
        if self._cuda:
            ids = torch.zeros(capacity, dtype=torch.int64, pin_memory=True)
            self._pinned = list(torch.split(ids, 1))
        self._tokens: list[torch.Tensor | int] = []
        self._marks: list[Mark] = []

    def begin(self) -> None:
        self._tokens, self._marks = [], []

    def store(self, token: torch.Tensor, clock: Clock) -> None:
        """Start copying `token` [1] to the host, and mark when it is there."""
        if self._cuda:
            row = self._pinned[len(self._tokens)]
            self._tokens.append(row.copy_(token, non_blocking=True))
        else:
            self._tokens.append(int(token))
        self._marks.append(clock.mark())

    def read(self, index: int) -> tuple[int, Mark]:
        """Wait until token `index` is on the host; returns it and its mark."""
        mark = self._marks[index]
        if self._cuda:
            mark.synchronize()
        return int(self._tokens[index]), mark
