"""Prompts as the runner needs them, and chunks of several side by side on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from qwencli.config import SamplingParams
from qwencli.engine.cache.paged_kv import PAGE_SIZE, SCRATCH_PAGE, PackedPrompts, pages_for
from qwencli.engine.cache.recurrent_state import SCRATCH_SLOT
from qwencli.engine.device_memory import upload
from qwencli.engine.event_timer import Mark
from qwencli.engine.layers.vision_tower import PIECE, VisionFeatures, VisionPass, join_features
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import PromptPositions
from qwencli.engine.request import PromptChunk
from qwencli.engine.request import Sequence as ScheduledSequence

Tensor = torch.Tensor


@dataclass
class PromptVisual:
    """A picture or video of a prompt.

    Args:
        digest: of its content. first: which of the prompt's image tokens is its first.
        patches: dropped once it is encoded. ready: when they are there, where another stream than
            the model's makes them. features: from the first chunk on that needs them.
        encoding: of a large one, as far as steps have brought it.
    """

    grid: tuple[int, int, int]
    digest: bytes
    first: int
    num_tokens: int
    patches: Tensor | None
    ready: torch.cuda.Event | None = None
    features: VisionFeatures | None = None
    encoding: VisionPass | None = None

    def features_of(self, low: int, high: int) -> VisionFeatures:
        """Those of the prompt's image tokens from `low` to `high` that are its own."""
        assert self.features is not None, "encoded with the first chunk that needs it"
        own = slice(max(low - self.first, 0), high - self.first)
        layers = self.features.deepstack
        return VisionFeatures(self.features.embeds[own], tuple(layer[own] for layer in layers))


@dataclass
class RunnerPrompt:
    """A request's prompt as the runner needs it, on the host but for pictures.

    Args:
        ids: int64 [S]. visuals: in the order of their tokens; none once the prompt is through.
        vision: start and end of each run of the vision tower that its pictures were in.
        first_mask: the tokens that the answer may begin with, int32 [1, ceil(V/32)]; None = all.
        with_odds: whether it is told how likely the tokens of its answer were.
    """

    ids: Tensor
    layout: PromptPositions
    visuals: Sequence[PromptVisual]
    sampling: SamplingParams
    stop_ids: Sequence[int]
    vision: list[tuple[Mark, Mark]] = field(default_factory=list)
    first_mask: Tensor | None = None
    with_odds: bool = False

    @property
    def next_position(self) -> int:
        return len(self.ids) + self.layout.delta

    def image_tokens(self, start: int, stop: int) -> tuple[int, int]:
        """Which of the prompt's image tokens are among its tokens from `start` to `stop`."""
        low, high = torch.searchsorted(
            self.layout.visual_places, torch.tensor([start, stop])
        ).tolist()
        return low, high

    @property
    def large_visuals(self) -> list[tuple[int, int, int]]:
        """See `Sequence`."""
        places = self.layout.visual_places
        return [
            (int(places[each.first]), int(places[each.first + each.num_tokens - 1]) + 1, index)
            for index, each in enumerate(self.visuals)
            if math.prod(each.grid) > PIECE
        ]

    def visuals_of(self, low: int, high: int) -> list[PromptVisual]:
        """Those that have image tokens from `low` to `high`."""
        return [
            visual
            for visual in self.visuals
            if visual.first < high and visual.first + visual.num_tokens > low
        ]


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
