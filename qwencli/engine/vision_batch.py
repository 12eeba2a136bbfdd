"""Pictures of a batch: those that are new are encoded together, large ones a few blocks a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.graphs import Pass, RunPass, pieces
from qwencli.engine.layers.vision_tower import VisionFeatures
from qwencli.engine.native.model import QwenModel
from qwencli.engine.request import PromptChunk
from qwencli.engine.runner_prompt import PromptVisual, RunnerPrompt
from qwencli.models.shapes import ModelShape

Tensor = torch.Tensor
# Pictures of one size from which on more at a time are no faster.
MOST_PICTURES = 8


class BatchVision:
    """The vision tower of one model, and what it has said before.

    Args:
        cache: features of pictures that came before.
        graphs: whether `run_pass` may hand out a graph's own memory.
    """

    def __init__(
        self,
        model: QwenModel,
        cache: VisionCache,
        run_pass: RunPass,
        graphs: bool,
    ) -> None:
        self.model, self._vision_cache = model, cache
        self._run_pass, self._graphs = run_pass, graphs

    def encode(
        self, chunks: Sequence[PromptChunk], prompts: Sequence[RunnerPrompt], clock: EventTimer
    ) -> None:
        """Have the features of all pictures in these chunks; those that are new are encoded
        together."""
        wanted = [
            (prompt, visual)
            for chunk, prompt in zip(chunks, prompts, strict=True)
            for visual in prompt.visuals_of(*prompt.image_tokens(chunk.start, chunk.stop))
            if visual.features is None
        ]
        if not wanted:
            return
        ran: dict[int, tuple[Mark, Mark]] = {}

        def encode(missing: list[int]) -> list[VisionFeatures]:
            start = clock.mark()
            made = self._encode_together([wanted[index][1] for index in missing])
            span = start, clock.mark()
            ran.update({id(wanted[index][0]): span for index in missing})
            return made

        found = self._vision_cache.features([visual.digest for _, visual in wanted], encode)
        for (prompt, visual), features in zip(wanted, found, strict=True):
            visual.features, visual.patches = features, None
            if id(prompt) in ran:
                prompt.vision.append(ran.pop(id(prompt)))

    @torch.inference_mode()
    def encode_some(self, prompt: RunnerPrompt, index: int, tokens: int, clock: EventTimer) -> bool:
        """Bring a large picture some blocks further, which take about as long as so many tokens of
        a prompt; returns whether its features are there."""
        visual, tower = prompt.visuals[index], self.model.vision
        assert tower is not None and visual.patches is not None, "it is not encoded yet"
        found = self._vision_cache.get(visual.digest)
        if found is None:
            start = clock.mark()
            if visual.encoding is None:
                patches = self._received(visual)
                visual.encoding = tower.begin(patches, tower.prepare(patches, [visual.grid]))
            blocks = blocks_worth(self.model.shape, math.prod(visual.grid), tokens)
            made = visual.encoding.advance(blocks)
            prompt.vision.append((start, clock.mark()))
            if made is None:
                return False
            (found,) = self._vision_cache.features([visual.digest], lambda _: [made])
        visual.features, visual.patches, visual.encoding = found, None, None
        return True

    def _received(self, visual: PromptVisual) -> Tensor:
        """A picture's patches on the device."""
        assert visual.patches is not None, "they are there until it is encoded"
        if visual.ready is not None:  # made on another stream, whose memory it goes back to
            stream = torch.cuda.current_stream(self.model.device)
            stream.wait_event(visual.ready)
            visual.patches.record_stream(stream)
        return visual.patches.to(self.model.device)

    def _encode_together(self, visuals: Sequence[PromptVisual]) -> list[VisionFeatures]:
        """Run the vision tower over pictures of any sizes, packed; one by one where no result may
        depend on what else is there, and in pieces that come again where those become graphs."""
        invariant = self.model.batch_invariant
        if len(visuals) == 1 or not (invariant or self._graphs):
            return self._encode_packed(visuals)
        made: dict[int, VisionFeatures] = {}
        together = pieces([visual.grid for visual in visuals], MOST_PICTURES)
        for places in [[place] for place in range(len(visuals))] if invariant else together:
            features = self._encode_packed([visuals[place] for place in places])
            made.update(zip(places, features, strict=True))
        return [made[place] for place in range(len(visuals))]

    def _encode_packed(self, visuals: Sequence[PromptVisual]) -> list[VisionFeatures]:
        invariant = self.model.batch_invariant
        patches = []
        for visual in visuals:
            # Libraries look at where in memory a matrix begins: a copy of it begins like any other.
            patches.append(self._received(visual).to(self.model.dtype, copy=invariant))
        together = patches[0] if len(patches) == 1 else torch.cat(patches)
        grids, tower = tuple(each.grid for each in visuals), self.model.vision
        assert tower is not None, "a text model has no pictures"

        def make() -> Pass:
            ready = tower.prepare(together, grids)

            def work(given: Sequence[Tensor]) -> Sequence[Tensor]:
                made = tower.run(given[0], ready)
                return made.embeds, *made.deepstack

            return work

        layers = self._run_pass(("pictures", grids), [together], make)
        sizes = [visual.num_tokens for visual in visuals]
        if len(visuals) == 1 and not self._graphs:
            return [VisionFeatures(layers[0], tuple(layers[1:]))]
        # Copies: one picture that is kept must not hold the memory of all, nor a graph's.
        parts = zip(*(layer.split_with_sizes(sizes) for layer in layers), strict=True)
        return [
            VisionFeatures(embeds.clone(), tuple(layer.clone() for layer in deepstack))
            for embeds, *deepstack in parts
        ]


def blocks_worth(shape: ModelShape, patches: int, tokens: int) -> int:
    """Blocks of the vision tower over one picture that take about as long as the decoder takes for
    so many tokens; one at least. Attention is taken to run at half the speed of products."""
    tower, text = shape.vision, shape.text
    assert tower is not None, "only models with a tower have pictures"
    width = tower.hidden_size
    ups = 3 if tower.gated_mlp else 2
    block = patches * (4 * width**2 + ups * width * tower.intermediate_size)
    block += 2 * 2 * patches**2 * width
    layer = 2 * text.q_size + 2 * text.kv_size + 3 * text.intermediate_size
    worth: int = tokens * text.num_layers * text.hidden_size * layer // block
    return max(1, worth)
