"""Chunks of several prompts side by side: packed on the device, and run through all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from qwencli.engine.cache.paged_kv import (
    PAGE_SIZE,
    SCRATCH_PAGE,
    PackedPrompts,
    PagedKVCache,
    pages_for,
)
from qwencli.engine.cache.recurrent_state import SCRATCH_SLOT, RecurrentStates
from qwencli.engine.device_memory import upload
from qwencli.engine.graphs import RunPass, pieces
from qwencli.engine.layers.decoder import DeepStack
from qwencli.engine.layers.vision_tower import VisionFeatures, join_features
from qwencli.engine.native.model import QwenModel
from qwencli.engine.request import PromptChunk
from qwencli.engine.request import Sequence as ScheduledSequence
from qwencli.engine.runner_prompt import RunnerPrompt

Tensor = torch.Tensor
# Equal prompts from which on more at a time are no faster.
MOST_PROMPTS = 16


@dataclass
class PackedBatch:
    """The tensors of some prompt chunks side by side, on the device.

    Args:
        behind: int64 [chunks], the token behind each, where the prompt has one.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    places: Tensor
    prompts: PackedPrompts
    features: VisionFeatures | None
    last: Tensor = field(repr=False)
    behind: Tensor = field(repr=False)


def pack_prompts(
    model: QwenModel, chunks: Sequence[PromptChunk], prompts: Sequence[RunnerPrompt]
) -> PackedBatch:
    """Lay chunks of prompts side by side, and send them to the device in one copy."""
    ids, positions, slots, places, seen = [], [], [], [], []
    features: list[VisionFeatures] = []
    starts, context_starts, last, behind_ids = [0], [0], [], []
    behind = any(chunk.start > 0 for chunk in chunks)
    for chunk, prompt in zip(chunks, prompts, strict=True):
        start, stop, first = chunk.start, chunk.stop, starts[-1]
        own = _slots_of(chunk.sequence.pages, stop)
        ids.append(prompt.ids[start:stop])
        positions.append(prompt.layout.positions[:, start:stop])
        slots.append(own[start:])
        if behind:
            seen.append(own)
        low, high = prompt.image_tokens(start, stop)
        if high > low:
            places.append(prompt.layout.visual_places[low:high] - start + first)
            features += [each.features_of(low, high) for each in prompt.visuals_of(low, high)]
        starts.append(first + stop - start)
        context_starts.append(context_starts[-1] + stop)
        behind_ids.append(int(prompt.ids[stop]) if stop < len(prompt.ids) else 0)
        if chunk.is_last:
            last.append(starts[-1] - 1)
    none = torch.zeros(0, dtype=torch.int64)
    host = [
        torch.cat(ids),
        torch.cat(positions, 1),
        torch.cat(slots),
        torch.cat(places) if places else none,
        torch.cat(seen) if seen else none,
        torch.tensor(starts),
        torch.tensor(context_starts),
        torch.tensor(last, dtype=torch.int64),
        torch.tensor(behind_ids),
    ]
    if model.batch_invariant:
        seen_pages = [chunk.sequence.pages[: pages_for(chunk.stop)] for chunk in chunks]
        tables = [torch.tensor(pages) for pages in seen_pages]
        host.append(pad_sequence(tables, True, SCRATCH_PAGE))
    keeps_states = model.shape.text.delta is not None
    if keeps_states:
        host.append(torch.tensor([state_of(chunk.sequence) for chunk in chunks]))
    sent = upload(host, model.device)
    return PackedBatch(
        ids=sent[0],
        positions=sent[1],
        slots=sent[2],
        places=sent[3],
        prompts=PackedPrompts(
            lengths=[chunk.stop - chunk.start for chunk in chunks],
            contexts=[chunk.start for chunk in chunks],
            starts=sent[5].to(torch.int32),
            context_starts=sent[6].to(torch.int32),
            slots=sent[4] if behind else None,
            flash=model.flash_decode,
            tables=sent[9].to(torch.int32) if model.batch_invariant else None,
            states=sent[-1] if keeps_states else None,
        ),
        features=join_features(features) if features else None,
        last=sent[7],
        behind=sent[8],
    )


def state_of(sequence: ScheduledSequence) -> int:
    """The slot of what a sequence that runs keeps beside its pages."""
    return SCRATCH_SLOT if sequence.state is None else sequence.state


def _slots_of(pages: Sequence[int], count: int) -> Tensor:
    """The pool's slots of the first `count` tokens of a sequence, int64."""
    offsets = torch.arange(PAGE_SIZE)
    used = torch.tensor(pages[: pages_for(count)])
    return (used[:, None] * PAGE_SIZE + offsets).flatten()[:count]


class PromptEnds(NamedTuple):
    """What prompts come to: `logits` [n, V] of their last tokens, and `hidden` [n, hidden] of those
    for a head that drafts, where there is one; of chunks that do not end nothing of use."""

    logits: Tensor
    hidden: Tensor | None = None

    def each(self, do: Callable[[Tensor], Tensor]) -> PromptEnds:
        """`do` with both."""
        return PromptEnds(do(self.logits), None if self.hidden is None else do(self.hidden))


class PromptPasses:
    """Runs prompts of one model through all its layers, as many side by side as a step has.

    Args:
        has_head: whether hidden states are kept for a head that drafts, which runs along.
        graphs: whether `run_pass` may hand out a graph's own memory.
    """

    def __init__(
        self,
        model: QwenModel,
        cache: PagedKVCache,
        states: RecurrentStates | None,
        run_pass: RunPass,
        *,
        has_head: bool,
        graphs: bool,
    ) -> None:
        self.model, self.cache, self.states = model, cache, states
        self._run_pass, self._has_head, self._graphs = run_pass, has_head, graphs

    def run(self, chunks: Sequence[PromptChunk], prompts: Sequence[RunnerPrompt]) -> PromptEnds:
        """What those that end come to, in their order. Equal prompts run in pieces that become
        graphs."""
        parts = [list(range(len(chunks)))]
        if self._graphs and len(chunks) > 1:
            keys = [
                (chunk.start, chunk.stop, chunk.is_last, prompt.image_tokens(0, chunk.stop))
                for chunk, prompt in zip(chunks, prompts, strict=True)
            ]
            parts = pieces(keys, MOST_PROMPTS)
        made: list[PromptEnds] = []
        order: list[int] = []
        for part in parts:
            packed = pack_prompts(
                self.model, [chunks[index] for index in part], [prompts[index] for index in part]
            )
            ended = PromptEnds(*self._run_packed(packed))
            last = [index for index in part if chunks[index].is_last]
            if last:
                # A copy: the next pass takes the memory of this one.
                made.append(ended if len(parts) == 1 else ended.each(torch.clone))
                order += last
        if len(made) == 1:
            return made[0]
        if made:
            hidden = [each.hidden for each in made if each.hidden is not None]
            logits = torch.cat([each.logits for each in made])
            ended = PromptEnds(logits, torch.cat(hidden) if hidden else None)
        places = sorted(range(len(order)), key=order.__getitem__)
        if places == list(range(len(order))):
            return ended
        (index,) = upload([torch.tensor(places)], self.model.device)
        return ended.each(lambda part: part.index_select(0, index))

    def _run_packed(self, packed: PackedBatch) -> Sequence[Tensor]:
        """All layers over packed prompts: see `PromptEnds`."""
        # What stays with a graph: nothing of these prompts but their lengths.
        like, features, behind = packed.prompts, packed.features, packed.prompts.slots
        has_pictures, has_context = features is not None, behind is not None
        has_head = self._has_head
        inputs = [packed.ids, packed.positions, packed.slots, packed.last]
        inputs += [packed.prompts.starts, packed.prompts.context_starts]
        inputs += [] if behind is None else [behind]
        inputs += [] if like.tables is None else [like.tables]
        inputs += [] if like.states is None else [like.states]
        inputs += [] if not self._has_head else [packed.behind]
        before = len(inputs)
        if features is not None:
            inputs += [packed.places, features.embeds, *features.deepstack]

        def work(given: Sequence[Tensor]) -> Sequence[Tensor]:
            ids, positions, slots, last, starts, context_starts = given[:6]
            prompts = replace(
                like,
                starts=starts,
                context_starts=context_starts,
                slots=given[6] if has_context else None,
                tables=None if like.tables is None else given[6 + has_context],
                states=None if like.states is None else given[before - 1 - has_head],
            )
            hidden, deepstack = self.model.decoder.embed(ids), None
            if has_pictures:
                places, embeds, *layers = given[before:]
                hidden.index_copy_(0, places, embeds)
                deepstack = DeepStack(places, layers)
            model, following = self.model, hidden
            if has_head:
                following = hidden.roll(-1, 0)
                ends = (starts[1:] - 1).to(torch.int64)
                following.index_copy_(0, ends, model.decoder.embed(given[before - 1]))
            hidden = model.prefill_packed(
                hidden, positions, slots, self.cache, prompts, deepstack, self.states
            )
            if has_head:
                model.draft_head_packed(following, hidden, positions, slots, self.cache, prompts)
            if not len(last):
                return (hidden,)
            ended = hidden.index_select(0, last)
            logits = model.prompt_logits(ended)
            return (logits, ended) if has_head else (logits,)

        if has_context and self.states is not None:
            # Making a graph runs a pass more than once, and a state would take its tokens twice.
            return work(inputs)
        key = tuple(packed.prompts.lengths), tuple(packed.prompts.contexts), len(packed.last)
        pictures = 0 if features is None else len(packed.places)
        return self._run_pass(("prompts", *key, pictures), inputs, lambda: work)
