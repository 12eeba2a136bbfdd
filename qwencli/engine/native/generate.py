"""One request: encode, prefill what is new, decode with the host running ahead of its reading."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from qwencli.config import Cache
from qwencli.engine.cache.paged_kv import DecodePages, pages_for
from qwencli.engine.cache.prefix_cache import PictureKeys, PrefixCache, VisionCache, keys_of
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.layers.vision_tower import VisionFeatures, join_features
from qwencli.engine.native.decode_state import DecodeState, Stepper
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.native.sampler import LIKELIEST, SamplerKind, kind_of
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.request import Key
from qwencli.engine.response import ResponseBuilder
from qwencli.results import EffectiveConfig, GenerationChunk, Speculation
from qwencli.tracing import span

if TYPE_CHECKING:
    from qwencli.engine.constrained import TokenMatcher
    from qwencli.engine.native.prefill_graphs import PrefillGraphs, PrefillRunner
    from qwencli.engine.spec_decode.verify import Speculator

# Steps on their way to the GPU beyond the one being read. Enough that a host thread that is kept
# from running for some milliseconds leaves the GPU busy; after a stop token they are wasted.
MAX_INFLIGHT_STEPS = 8


_Round = tuple[list[tuple[Mark, Mark]], EffectiveConfig, Speculation | None]


class Generation:
    """Answers requests with one model, its caches and its stepper; lives as long as they do.

    Args:
        vision_cache: features of pictures that came before.
        speculator: answers greedy requests in the stepper's place; None = no speculation.
        prompts: runs pictures and prompts; None = the model, operator by operator.
    """

    def __init__(
        self,
        model: QwenModel,
        state: DecodeState,
        stepper: Stepper,
        effective: EffectiveConfig,
        vision_cache: VisionCache,
        speculator: Speculator | None = None,
        prompts: PrefillGraphs | None = None,
    ) -> None:
        self._model, self._state, self._stepper, self._effective = model, state, stepper, effective
        self._prompts: PrefillRunner = model if prompts is None else prompts
        self._graphs = prompts
        self._speculator = speculator
        self._prefix_cache = PrefixCache(state.cache)
        self._vision_cache = vision_cache
        width = 1 if state.drafts is None else len(state.drafts.verify_output)
        self._token_copy = AsyncTokenCopy(effective.device, len(state.slots), width)

    def forget(self) -> None:
        """Drop the keys and values of earlier requests."""
        self._prefix_cache.forget_after(0)

    @torch.inference_mode()
    def step_logits(self, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [V] after each token of a text: the first is a prompt, each further one a decode
        step as the model decodes, fused where it is. In a cache of its own."""
        model = self._model
        dynamic = self._effective.cache == Cache.DYNAMIC
        cache = model.dynamic_cache() if dynamic else model.static_cache(1, len(token_ids) + 1)
        first, *rest = token_ids
        yield model.prefill(model.prepare([ModelPrompt([first])]), cache)[0]
        for slot, token in enumerate(rest, start=1):
            at = torch.tensor([slot], device=model.device)
            one = torch.tensor([token], device=model.device)
            yield model.decode_step(one, at, at, cache, AttentionPlan(slot + 1, None))[0]

    @torch.inference_mode()
    def _prefill(
        self, answer: ResponseBuilder, pictures: PictureKeys, clock: EventTimer
    ) -> tuple[list[tuple[Mark, Mark]], list[Key]]:
        """Fill the cache with the prompt and choose the first token; returns vision's marks, and
        the keys of the prompt's slots."""
        prompt, state = answer.current_prompt, self._state
        vision: list[tuple[Mark, Mark]] = []

        def encode(indices: list[int]) -> Iterator[VisionFeatures]:
            assert prompt.inputs is not None, "only a prompt with pictures is asked for them"
            # One by one: a graph of one picture serves the next of its size.
            for index in indices:
                start = clock.mark()
                patches = torch.as_tensor(prompt.inputs.patches[index])
                patches = patches.to(self._model.device)
                with span("vision"):
                    encoded = self._prompts.encode_images(patches, [prompt.grid_thw[index]])
                yield encoded
                vision.append((start, clock.mark()))

        features = self._vision_cache.features_of(pictures, encode)
        inputs = self._model.prepare(
            [ModelPrompt(prompt.input_ids, prompt.visuals)],
            join_features(features) if features else None,
        )
        keys = keys_of(prompt, pictures.digests)
        shared = self._prefix_cache.reuse(keys)
        if prompt is answer.prompt:
            answer.num_cached_tokens = shared
        logits = self._prompts.prefill(inputs, state.cache, start=shared)
        # While the device works on the prompt.
        stop_ids = sorted(answer.stop_ids)
        state.begin(answer.settings, inputs.ids[0], stop_ids, inputs.next_positions)
        masks = None
        if answer.matcher is not None:
            from qwencli.engine.constrained import fill_masks

            held = state.hold_logits()
            fill_masks([(answer.matcher, 0)], held.host)
            masks = held.sent(1)
        state.sample_first(logits, masks)
        self._prefix_cache.remember(keys)
        return vision, keys

    def chunks(self, answer: ResponseBuilder, load_s: float) -> Iterator[GenerationChunk]:
        """Yield each token's text, and the result with the last chunk.

        However the request ends, the cache afterwards holds what it is remembered to hold.
        """
        if self._graphs is not None:
            self._graphs.at_once = answer.bypass_caches
        # First of all: captures that a request is the first to need are part of its prefill.
        clock = EventTimer(self._effective.device)
        pictures = PictureKeys(answer.prompt)
        vision, effective, speculation = yield from self._round(answer, pictures, clock)
        while (between := answer.next_round()) is not None:
            yield between
            more, effective, drafted = yield from self._round(answer, pictures, clock)
            vision, speculation = vision + more, _together(speculation, drafted)
        yield answer.finish(clock, vision, effective, load_s, speculation)

    def _round(
        self, answer: ResponseBuilder, pictures: PictureKeys, clock: EventTimer
    ) -> Generator[GenerationChunk, None, _Round]:
        """One round of decoding (see `response`); returns vision's marks, the modes that ran, and
        what drafts did."""
        state, first_slot = self._state, len(answer.current_prompt.input_ids)
        steps = answer.settings.max_new_tokens - 1
        before = len(answer.token_ids)
        with torch.inference_mode():
            state.kind = kind_of(answer.settings)
            strategy, effective = self._strategy_for(answer)
            if answer.matcher is not None:
                state.hold_logits()
                state.kind = SamplerKind.LOGITS
            strategy.begin(clock, first_slot, first_slot + steps)
        try:
            with span("prefill"):
                vision, keys = self._prefill(answer, pictures, clock)
            if answer.matcher is None:
                tokens = self._decode(clock, strategy, steps)
            else:
                tokens = self._decode_constrained(clock, strategy, steps, answer.matcher)
            for token_id, mark in tokens:
                yield answer.add(token_id, mark)
                if answer.round_over:
                    break
        except BaseException:
            # Steps that are still running write into slots after the prompt only.
            self._prefix_cache.forget_after(first_slot)
            raise
        # The last token has not been fed, so its slot is not written.
        self._prefix_cache.remember([*keys, *answer.token_ids[before:-1]])
        return vision, effective, strategy.result()

    def _strategy_for(self, answer: ResponseBuilder) -> tuple[DecodeStrategy, EffectiveConfig]:
        """How this request takes its steps, and the modes that are then true."""
        if self._speculator is None:
            return AutoregressiveDecode(self._stepper, self._state), self._effective
        # A drawn token is not known to be right before it is drawn, nor one before its mask is.
        drawn = kind_of(answer.settings) not in LIKELIEST
        off = "off: sampling" if drawn else "off: schema" if answer.matcher is not None else None
        if off is not None:
            effective = replace(self._effective, speculate=off)
            return AutoregressiveDecode(self._stepper, self._state), effective
        return self._speculator.strategy(), self._effective

    def _decode(
        self, clock: EventTimer, strategy: DecodeStrategy, steps: int
    ) -> Iterator[tuple[int, Mark]]:
        """The first token and `steps` more, as the host gets to read them.

        Tokens that one step chose come with the same mark.
        """
        token_copy = self._token_copy
        token_copy.begin()
        with torch.inference_mode():
            token_copy.store(self._state.token, clock)
        # Every step gives a token at least.
        unread, given, read = 1, 0, 0
        while given <= steps:
            with torch.inference_mode():
                while unread <= token_copy.max_inflight_steps and given + unread <= steps:
                    with span("decode step"):
                        token_copy.store(strategy.step(), clock)
                    unread += 1
            with span("wait for token"):
                values, mark = token_copy.read(read)
            unread, read = unread - 1, read + 1
            if read > 1:
                values = strategy.tokens(values, token_copy.mark(read - 2), mark)
            for token in values:
                yield token, mark
                given += 1

    def _decode_constrained(
        self, clock: EventTimer, strategy: DecodeStrategy, steps: int, matcher: TokenMatcher
    ) -> Iterator[tuple[int, Mark]]:
        """`_decode` of an answer that is held to a schema.

        While the device works on the logits of a step, the host reads the token before it and
        fills the mask of what may follow; the caller accepts each token that it is given.
        """
        from qwencli.engine.constrained import fill_masks

        state, token_copy = self._state, self._token_copy
        assert state.masks is not None, "the caller made room for them"
        kind, state.kind = state.kind, SamplerKind.LOGITS
        token_copy.begin()
        with torch.inference_mode():
            token_copy.store(state.token, clock)
        for given in range(steps + 1):
            with torch.inference_mode():
                if given < steps:
                    strategy.step()
            (token,), mark = token_copy.read(given)
            yield token, mark
            if given < steps:
                fill_masks([(matcher, 0)], state.masks.host)
                with torch.inference_mode():
                    state.choose_masked(kind)
                    token_copy.store(state.token, clock)


def _together(one: Speculation | None, other: Speculation | None) -> Speculation | None:
    """What drafts did in two rounds; what the time was like is told of the second, the answer."""
    if one is None or other is None:
        return one or other
    return replace(
        other,
        num_drafted=one.num_drafted + other.num_drafted,
        num_accepted=one.num_accepted + other.num_accepted,
    )


@torch.inference_mode()
def row_logits(model: QwenModel, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
    """`Generation.step_logits` of a model that runs in rows alone: each token is a decode step of
    one row, in pages and a state of its own."""
    count = pages_for(len(token_ids) + 1)
    cache, states = model.paged_cache(count + 1), model.recurrent_states(2)
    tables = torch.arange(1, count + 1, dtype=torch.int32, device=model.device)[None]
    slot = torch.ones(1, dtype=torch.int64, device=model.device)
    idle = torch.zeros(1, dtype=torch.bool, device=model.device)
    model.rope.reach(len(token_ids))
    for place, token in enumerate(token_ids):
        at = torch.tensor([place], device=model.device)
        one = torch.tensor([token], device=model.device)
        pages = DecodePages(tables, at, place + 1, slot, idle)
        hidden = model.decode_rows(one, at, cache, pages, states)
        yield model.decoder.logits(hidden, model.row_ops(1))[0]


class DecodeStrategy(Protocol):
    def begin(self, clock: EventTimer, first_slot: int, last_slot: int) -> None:
        """Prepare for a request whose first step feeds `first_slot`, and whose last token would
        get `last_slot`. Overwrites the decoding state."""

    def step(self) -> torch.Tensor:
        """Enqueue a step; returns the buffer that says what it chose."""

    def tokens(self, values: list[int], before: Mark, mark: Mark) -> list[int]:
        """The tokens of the next unread step, from its `values`.

        Args:
            before, mark: when the step before it and this one ended.
        """

    def result(self) -> Speculation | None: ...


class AutoregressiveDecode:
    """One token a step."""

    def __init__(self, stepper: Stepper, state: DecodeState) -> None:
        self._stepper, self._state = stepper, state
        self._slot = 0

    def begin(self, clock: EventTimer, first_slot: int, last_slot: int) -> None:
        self._stepper.prepare(first_slot, last_slot)
        self._slot = first_slot

    def step(self) -> torch.Tensor:
        self._stepper.run(self._slot)
        self._slot += 1
        return self._state.token

    def tokens(self, values: list[int], before: Mark, mark: Mark) -> list[int]:
        return values

    def result(self) -> Speculation | None:
        return None


class AsyncTokenCopy:
    """What steps have chosen, on its way from the device to the host.

    Args:
        capacity: steps of a request at most. width: numbers of a step at most.
    """

    def __init__(self, device: str, capacity: int, width: int) -> None:
        self._cuda = device.startswith("cuda")
        # A host that runs the steps itself has nothing to run ahead of.
        self.max_inflight_steps = MAX_INFLIGHT_STEPS if self._cuda else 0
        self._pinned: list[torch.Tensor] = []
        if self._cuda:
            ids = torch.zeros(capacity, width, dtype=torch.int64, pin_memory=True)
            self._pinned = list(ids)
        self._stored: list[torch.Tensor | list[int]] = []
        self._marks: list[Mark] = []

    def begin(self) -> None:
        self._stored, self._marks = [], []

    def store(self, values: torch.Tensor, clock: EventTimer) -> None:
        """Start copying `values` [up to width] to the host, and mark when they are there."""
        if self._cuda:
            row = self._pinned[len(self._stored)][: len(values)]
            self._stored.append(row.copy_(values, non_blocking=True))
        else:
            self._stored.append(values.tolist())
        self._marks.append(clock.mark())

    def mark(self, index: int) -> Mark:
        return self._marks[index]

    def read(self, index: int) -> tuple[list[int], Mark]:
        """Wait until what was stored as number `index` is on the host; returns it and its mark."""
        mark, stored = self._marks[index], self._stored[index]
        if self._cuda:
            mark.synchronize()
        return stored if isinstance(stored, list) else stored.tolist(), mark
