"""Prompts and pictures as CUDA graphs: how `static-graph` runs what comes before the first token.

A prompt of a few hundred tokens is a thousand and more operations that take the GPU less time than
the host needs to ask for them, so the first token waits for the host: for its speed, for other
programs on its core, and for every other Python thread at each operation. As a graph the whole pass
is asked for at once. A graph has one size, so a prompt is filled up at its end to a length class;
nothing before the end sees what is behind it, and what that leaves in the cache is overwritten
before it is read, as slots behind the last one in use always are. Pictures: `picture_graphs`.

What is long, starts within a cached sequence, or is a batch is run operator by operator; there the
GPU is what takes the time, or it is rare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from qwencli.config import Attention
from qwencli.engine.cache.kv_cache import KVCache
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.layers.decoder import DeepStack
from qwencli.engine.layers.vision_layout import Grid
from qwencli.engine.layers.vision_tower import VisionFeatures
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import PromptInputs
from qwencli.engine.native.vision_graphs import MOST_PATCHES, VisionGraphs
from qwencli.engine.ops.attention import AttentionPlan, prompt_plan

Tensor = torch.Tensor

# Beyond it the GPU takes longer than the host.
LONGEST = 1024
# Half a class is computed for nothing on average.
BUCKET = 64


class PrefillRunner(Protocol):
    """What runs prompts: a `QwenModel`, or graphs of one."""

    def encode_images(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures: ...

    def prefill(self, inputs: PromptInputs, cache: KVCache, start: int = 0) -> Tensor: ...


class PrefillGraphs:
    """Runs prompts of `model` into `cache`, a graph for each length class.

    Graphs are captured when they are needed first. Every replay overwrites what the one before it
    returned, but for features, which are copies.
    """

    def __init__(self, model: QwenModel, cache: KVCache, slots: int) -> None:
        self._model, self._cache = model, cache
        self._longest = min(LONGEST, slots // BUCKET * BUCKET)
        # That package may take lengths from the host.
        self._able = model.attention is not Attention.FLASH
        shape, device, dtype = model.shape.text, model.device, model.dtype

        def rows(*width: int) -> Tensor:
            return torch.zeros(self._longest, *width, dtype=dtype, device=device)

        self._hidden = rows(shape.hidden_size)
        self._rope = (rows(1, shape.head_dim), rows(1, shape.head_dim))
        layers = 0 if model.shape.vision is None else len(model.shape.vision.deepstack_layers)
        self._deepstack = [rows(shape.hidden_size) for _ in range(layers)]
        self._slots = torch.arange(self._longest, device=device)
        self._last = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits: dict[tuple[int, bool], Tensor] = {}
        self._graphs = GraphRunner(device)
        self._pictures: VisionGraphs | None = None
        tower, plain = model.vision, model.attention is Attention.SDPA
        if tower is not None and plain and VisionGraphs.can_run(tower, dtype, device):
            self._pictures = VisionGraphs(tower, self._graphs, dtype)

    def prefill(self, inputs: PromptInputs, cache: KVCache, start: int = 0) -> Tensor:
        """As `QwenModel.prefill`."""
        assert cache is self._cache, "graphs write to the cache they were captured with"
        size = -(-inputs.length // BUCKET) * BUCKET
        if not self._able or start > 0 or inputs.batch > 1 or size > self._longest:
            return self._model.prefill(inputs, cache, start)
        key = (size, self._take(inputs, size))
        if key not in self._graphs:
            self._graphs.capture(key, lambda: self._pass(*key))
        self._graphs.replay(key)
        cache.length = inputs.length
        return self._logits[key]

    def _take(self, inputs: PromptInputs, size: int) -> bool:
        """Put a prompt where its graph reads it; returns whether layers add features to it."""
        length = inputs.length
        torch.index_select(
            self._model.decoder.embedding, 0, inputs.ids[0], out=self._hidden[:length]
        )
        for row, table in zip(self._rope, self._model.rope.at(inputs.positions), strict=True):
            row[:length].copy_(table[0])
        self._last.fill_(length - 1)
        visual = inputs.visual_slice(0, length)
        if visual is None:
            return False
        places, embeds, deepstack = visual
        self._hidden.index_copy_(0, places, embeds)
        for row, feature in zip(self._deepstack, deepstack.features, strict=True):
            row[:size].zero_().index_copy_(0, places, feature)
        return bool(deepstack.features)

    def _pass(self, size: int, deepstack: bool) -> None:
        model, slots = self._model, self._slots[:size]
        features = [row[:size] for row in self._deepstack] if deepstack else []
        cos, sin = self._rope
        hidden = model.prompt_hidden(
            # A copy: layers overwrite it, and the rows behind a prompt must not grow from one
            # replay to the next.
            self._hidden[:size].clone(),
            (cos[None, :size], sin[None, :size]),
            slots,
            self._plan(size),
            self._cache,
            DeepStack(slots, features) if deepstack else None,
        )
        logits = model.prompt_logits(hidden.index_select(0, self._last))
        self._logits[size, deepstack] = logits

    def _plan(self, size: int) -> AttentionPlan:
        model = self._model
        heads, flash = model.shape.text.num_kv_heads, model.flash_decode
        return prompt_plan(0, size, heads, model.dtype, model.device, flash=flash)

    def encode_images(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """As `QwenModel.encode_images`."""
        if self._pictures is None or len(patches) > MOST_PATCHES:
            return self._model.encode_images(patches, grids)
        return self._pictures.encode(patches, grids)
