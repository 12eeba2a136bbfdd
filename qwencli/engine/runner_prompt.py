"""Prompts as the runner needs them, laid out on the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from qwencli.config import SamplingParams
from qwencli.engine.constrained import TokenMatcher, fill_masks
from qwencli.engine.event_timer import Mark
from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.layers.vision_tower import PIECE, VisionFeatures, VisionPass
from qwencli.engine.native.prompt_inputs import ModelPrompt, PromptPositions, lay_out
from qwencli.errors import InputError
from qwencli.models.shapes import ModelShape

Tensor = torch.Tensor
# Layouts of prompts that are kept, and the longest of those.
LAYOUTS_KEPT, LAYOUT_TOKENS = 32, 4096


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
        """Features of its image tokens among the prompt's tokens from `low` to `high`."""
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
        with_logprobs: whether it is told how likely the tokens of its answer were.
        measured: how long it takes is told of all that are like it: see `bypass_caches` of
            `GenerationRequest`.
    """

    ids: Tensor
    layout: PromptPositions
    visuals: Sequence[PromptVisual]
    sampling: SamplingParams
    stop_ids: Sequence[int]
    vision: list[tuple[Mark, Mark]] = field(default_factory=list)
    first_mask: Tensor | None = None
    with_logprobs: bool = False
    measured: bool = False

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
        """The pictures and videos that have image tokens from `low` to `high`."""
        return [
            visual
            for visual in self.visuals
            if visual.first < high and visual.first + visual.num_tokens > low
        ]


class PromptLayouts:
    """Makes a `RunnerPrompt` of each prompt; several threads may ask at once."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        # By ids and pictures; nothing writes to what is in here.
        self._layouts: dict[
            tuple[tuple[int, ...], tuple[Visual, ...]], tuple[Tensor, PromptPositions]
        ] = {}

    def laid_out(
        self,
        prompt: Prompt,
        digests: Sequence[bytes],
        sampling: SamplingParams,
        stop_ids: Sequence[int],
        matcher: TokenMatcher | None = None,
        with_logprobs: bool = False,
        measured: bool = False,
    ) -> RunnerPrompt:
        """A prompt laid out, in the thread and on the stream that made its patches.

        Args:
            digests: of its pictures and videos.
            matcher: what the answer is held to, at its beginning.
            with_logprobs, measured: see `RunnerPrompt`.

        Raises:
            InputError: see `lay_out`; also pictures for a text model.
        """
        ids, layout = self._ids_and_positions(prompt)
        expected = prompt.num_image_tokens
        if len(layout.visual_places) != expected:
            raise InputError(
                f"the prompt has {len(layout.visual_places)} image tokens, its pictures {expected}",
                "give as many images as the prompt has places for",
            )
        visuals: list[PromptVisual] = []
        if prompt.inputs is not None:
            made = zip(digests, prompt.inputs.num_tokens, prompt.inputs.patches, strict=True)
            firsts = itertools.accumulate(prompt.inputs.num_tokens, initial=0)
            for grid, first, (digest, count, patches) in zip(
                prompt.grid_thw, firsts, made, strict=False
            ):
                made_here = torch.as_tensor(patches)
                ready = None
                if made_here.is_cuda:
                    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    ready.record(torch.cuda.current_stream(made_here.device))
                visuals.append(PromptVisual(grid, digest, first, count, made_here, ready))
        return RunnerPrompt(
            ids=ids,
            layout=layout,
            visuals=visuals,
            sampling=sampling,
            stop_ids=stop_ids,
            first_mask=self._first_mask(matcher),
            with_logprobs=with_logprobs,
            measured=measured,
        )

    def gone_on(
        self,
        prompt: RunnerPrompt,
        ids: Sequence[int],
        sampling: SamplingParams,
        stop_ids: Sequence[int],
        matcher: TokenMatcher | None,
    ) -> RunnerPrompt:
        """A prompt whose tokens are run, with others behind them: `ids` are those of both."""
        layout, before = prompt.layout, len(prompt.ids)
        positions = torch.arange(before, len(ids)) + layout.delta
        layout = replace(
            layout, positions=torch.cat((layout.positions, positions.expand(3, -1)), 1)
        )
        return replace(
            prompt,
            ids=torch.tensor(ids),
            layout=layout,
            visuals=(),
            sampling=sampling,
            stop_ids=stop_ids,
            first_mask=self._first_mask(matcher),
        )

    def _first_mask(self, matcher: TokenMatcher | None) -> Tensor | None:
        if matcher is None:
            return None
        words = -(-self._shape.text.vocab_size // 32)
        mask = torch.full((1, words), -1, dtype=torch.int32)
        fill_masks([(matcher, 0)], mask)
        return mask

    def _ids_and_positions(self, prompt: Prompt) -> tuple[Tensor, PromptPositions]:
        """Ids and layout; pictures of one size that are asked about in the same words share them.
        Raises as `lay_out`."""
        key = tuple(prompt.input_ids), prompt.visuals
        found = self._layouts.get(key)
        if found is None:
            layout = lay_out(self._shape, ModelPrompt(prompt.input_ids, prompt.visuals))
            found = torch.tensor(prompt.input_ids), layout
            if len(key[0]) <= LAYOUT_TOKENS:
                if len(self._layouts) >= LAYOUTS_KEPT:
                    self._layouts.clear()
                self._layouts[key] = found
        return found
