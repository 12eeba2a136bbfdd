"""Prefill and the vision tower as CUDA graphs: what `static-graph` runs before the first token.

A prompt of a few hundred tokens is a thousand and more operations that take the GPU less time than
the host needs to launch them, so the first token waits for the host: for its speed, for other
programs on its core, and for every other Python thread at each operation. As a graph the whole pass
is launched at once. A graph has one size, so a prompt is padded at its end to a bucket of lengths;
nothing before the end sees what is behind it, and what that leaves in the cache is overwritten
before it is read, as slots behind the last one in use always are.

A folder holds pictures of any size, so a graph of each would be captured more often than replayed.
The patches of a picture are padded to a bucket too, and flash attention reads on the device where
segments begin. The padding is segments of its own: nothing sees it, and nothing of it is returned.
A single large picture is attended to as one and not padded: that kernel is faster.

A capture takes as long as a few passes, and most sizes of a mixed folder never come again: one is
captured when it comes the second time. The first time the pass that would be captured runs operator
by operator, so that its result is that of the graph, bit for bit.

What is larger, starts within a cached sequence, or is a batch is run operator by operator; there
the GPU is what takes the time, or it is rare.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from qwencli.config import Attention
from qwencli.engine.cache.kv_cache import KVCache
from qwencli.engine.device_memory import upload
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.layers.decoder import DeepStack
from qwencli.engine.layers.vision_layout import EqualSegments, Grid
from qwencli.engine.layers.vision_tower import (
    Offsets,
    PreparedGrids,
    VisionFeatures,
    VisionTower,
)
from qwencli.engine.native.memory_plan import SIZES, GraphSizes
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import PromptInputs
from qwencli.engine.ops.attention import AttentionPlan, can_flash_decode, prompt_plan
from qwencli.models.shapes import VisionShape

Tensor = torch.Tensor

PATCH_BUCKET = 128
# Of larger single pictures each size has graphs of its own.
PADDED_PATCHES = 2048
# A few more than a session of single pictures can need.
GRAPHS_KEPT = 32


@dataclass(frozen=True)
class Size:
    """What a graph is made for: patches, and room for so many segments of full attention and of
    window attention; where it is `whole`, a single picture of exactly so many patches."""

    patches: int
    frames: int
    windows: int
    whole: bool = False


class VisionGraphs:
    """Encodes pictures with `tower`, in memory that all sizes share.

    Args:
        most: patches of a picture at most.
        due: whether a graph that is not there is to be captured now.
    """

    def __init__(
        self,
        tower: VisionTower,
        graphs: GraphRunner,
        dtype: torch.dtype,
        most: int,
        due: Callable[[Hashable], bool],
    ) -> None:
        self._tower, self._graphs, self._dtype, self._due = tower, graphs, dtype, due
        self.most_patches = most
        # Those that are graphs; last in, so that the first is the one not used for longest.
        self._sizes: dict[Size, None] = {}
        self._buffers: _Buffers | None = None
        self._filled: tuple[PreparedGrids, Size] | None = None

    @staticmethod
    def can_run(tower: VisionTower, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether torch's flash attention takes this tower's heads, of `dtype` on `device`."""
        heads, dim = tower.shape.num_heads, tower.shape.head_dim
        return can_flash_decode(heads, heads, dim, dtype, device)

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """As `VisionTower.encode`, of at most `most_patches` patches."""
        ready = self._tower.prepare(patches, grids)
        buffers = self._buffers = self._buffers or _Buffers(
            self._tower.shape, ready, self._dtype, self.most_patches
        )
        size = self._size(ready, len(patches))
        if self._filled is None or self._filled[0] is not ready:
            self._filled = None  # nor is it once this fails
            buffers.fill(ready, size, len(patches))
            self._filled = ready, size
        buffers.patches[: len(patches)].copy_(patches)
        if size in self._graphs or self._due(size):
            self._replay(size)
        else:
            self._pass(size)
        return buffers.copied(len(patches) // self._tower.shape.merge_area)

    def _replay(self, size: Size) -> None:
        if size not in self._graphs:
            self._graphs.capture(size, lambda: self._pass(size))
        self._graphs.replay(size)
        self._sizes.pop(size, None)
        self._sizes[size] = None
        if len(self._sizes) > GRAPHS_KEPT:
            dropped = next(iter(self._sizes))
            del self._sizes[dropped]
            self._graphs.drop(dropped)

    def _size(self, ready: PreparedGrids, patches: int) -> Size:
        filled = -(-patches // PATCH_BUCKET) * PATCH_BUCKET
        side = self._tower.shape.window_patches
        alone = ready.frames == (EqualSegments(1, patches),)
        if alone and side is None and patches > PADDED_PATCHES:
            return Size(patches, 1, 0, whole=True)
        windows = 0 if side is None else _room(ready.windows, side * side)
        return Size(filled, _room(ready.frames, filled), windows)

    def _pass(self, size: Size) -> None:
        assert self._buffers is not None, "made before the first picture is encoded"
        self._buffers.keep(self._tower.run(*self._buffers.view(size)))


class _Buffers:
    """What a tower reads and what it says, for `most` patches. `like` is any picture's, for types
    and widths."""

    def __init__(
        self, shape: VisionShape, like: PreparedGrids, dtype: torch.dtype, most: int
    ) -> None:
        cos, sin = like.rope
        self._shape = shape
        self._device = cos.device

        def zeros(*size: int, of: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=of, device=self._device)

        area, dim = self._shape.merge_area, cos.shape[-1]
        self.patches = zeros(most, self._shape.patch_elements, of=dtype)
        self._rope = tuple(zeros(1, most, 1, dim, of=of.dtype) for of in (cos, sin))
        self._positions = None
        if like.positions is not None:
            width = like.positions.shape[1]
            self._positions = zeros(most, width, of=like.positions.dtype)
        self._places = torch.arange(most // area, device=self._device)
        self._order, self._back = self._places.clone(), self._places.clone()
        # One segment of full attention a patch at most; offsets have an end.
        self._frames = zeros(2 * most + 1, of=torch.int32)
        self._windows = zeros(2 * most + 1, of=torch.int32)
        # Here and not where each graph would leave them: those would keep theirs.
        self._results = [
            zeros(most // area, self._shape.out_hidden_size, of=dtype)
            for _ in range(1 + len(self._shape.deepstack_layers))
        ]

    def keep(self, features: VisionFeatures) -> None:
        for result, made in zip(self._results, (features.embeds, *features.deepstack), strict=True):
            result[: len(made)].copy_(made)

    def copied(self, tokens: int) -> VisionFeatures:
        """A copy of one picture's features, without padding: the next picture overwrites them."""
        embeds, *deepstack = (result[:tokens].clone() for result in self._results)
        return VisionFeatures(embeds, tuple(deepstack))

    def fill(self, ready: PreparedGrids, size: Size, patches: int) -> None:
        """Put the layout of `patches` patches in, and segments of nothing behind them."""
        for buffer, new in zip(self._rope, ready.rope, strict=True):
            buffer[:, :patches].copy_(new)
        if self._positions is not None and ready.positions is not None:
            self._positions[:patches].copy_(ready.positions)
        tokens = patches // self._shape.merge_area
        for places, order in ((self._order, ready.order), (self._back, ready.back)):
            if order is not None:
                places[:tokens].copy_(order)
                places[tokens:].copy_(self._places[tokens:])
        view = self.view(size)[1]
        starts = [
            (segments.starts, _starts(of, size.patches, segments))
            for segments, of in ((view.frames, ready.frames), (view.windows, ready.windows))
            if isinstance(segments, Offsets)
        ]
        sent = upload([new for _, new in starts], self._device)
        for (buffer, _), new in zip(starts, sent, strict=True):
            buffer.copy_(new)

    def view(self, size: Size) -> tuple[Tensor, PreparedGrids]:
        """The parts that a graph of this size reads."""
        count, side = size.patches, self._shape.window_patches
        cos, sin = self._rope
        tokens = count // self._shape.merge_area
        ready = PreparedGrids(
            frames=(EqualSegments(1, count),)
            if size.whole
            else Offsets(self._frames[: size.frames + 1], count),
            windows=(),
            rope=(cos[:, :count], sin[:, :count]),
            positions=None if self._positions is None else self._positions[:count],
            order=None,
            back=None,
        )
        if side is not None:
            ready = replace(
                ready,
                windows=Offsets(self._windows[: size.windows + 1], side * side),
                order=self._order[:tokens],
                back=self._back[:tokens],
            )
        return self.patches[:count], ready


def _lengths(segments: Iterable[EqualSegments]) -> list[int]:
    return [run.length for run in segments for _ in range(run.count)]


def _room(segments: Sequence[EqualSegments] | Offsets, longest: int) -> int:
    """A power of two of segments, with those that fill a picture up to its class."""
    assert not isinstance(segments, Offsets), "of a picture's own layout"
    count = len(_lengths(segments)) + -(-PATCH_BUCKET // longest)
    return 1 << (count - 1).bit_length()


def _starts(segments: Sequence[EqualSegments] | Offsets, patches: int, room: Offsets) -> Tensor:
    """Where the segments begin, those up to `patches` behind them, and empty ones for the rest."""
    assert not isinstance(segments, Offsets), "of a picture's own layout"
    starts = [0]
    for length in _lengths(segments):
        starts.append(starts[-1] + length)
    while starts[-1] < patches:
        starts.append(min(starts[-1] + room.longest, patches))
    starts += [patches] * (len(room.starts) - len(starts))
    return torch.tensor(starts, dtype=torch.int32)


# Half a class is computed for nothing on average.
BUCKET = 64


class PrefillRunner(Protocol):
    """What runs prompts: a `QwenModel`, or graphs of one."""

    def encode_images(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """Features of pictures, from patches [N, patch elements] of all `grids` in order."""

    def prefill(self, inputs: PromptInputs, cache: KVCache, start: int = 0) -> Tensor:
        """Run the tokens from `start` on; logits [B, V] of the last ones."""


class PrefillGraphs:
    """Runs prompts of `model` into `cache`, a graph for each length class up to `sizes`.

    Every replay overwrites what the one before it returned, but for features, which are copies.
    With `at_once` sizes are captured when they come first: for requests that are measured, so that
    no later one pays for it.
    """

    def __init__(
        self, model: QwenModel, cache: KVCache, slots: int, sizes: GraphSizes = SIZES
    ) -> None:
        self._model, self._cache = model, cache
        self._longest = min(sizes.tokens, slots // BUCKET * BUCKET)
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
        self.at_once = True
        self._met: set[Hashable] = set()
        self._pictures: VisionGraphs | None = None
        tower, plain = model.vision, model.attention is Attention.SDPA
        if tower is not None and plain and VisionGraphs.can_run(tower, dtype, device):
            self._pictures = VisionGraphs(tower, self._graphs, dtype, sizes.patches, self._due)

    def prefill(self, inputs: PromptInputs, cache: KVCache, start: int = 0) -> Tensor:
        """As `QwenModel.prefill`."""
        assert cache is self._cache, "graphs write to the cache they were captured with"
        size = -(-inputs.length // BUCKET) * BUCKET
        if start > 0 or inputs.batch > 1 or size > self._longest:
            return self._model.prefill(inputs, cache, start)
        key = (size, self._take(inputs, size))
        if key not in self._graphs and not self._due(key):
            self._pass(*key)
        else:
            if key not in self._graphs:
                self._graphs.capture(key, lambda: self._pass(*key))
            self._graphs.replay(key)
        cache.length = inputs.length
        return self._logits[key]

    def _due(self, key: Hashable) -> bool:
        if self.at_once or key in self._met:
            return True
        self._met.add(key)
        return False

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
        heads, flash = model.shape.text.num_kv_heads, model.flash_prompts
        return prompt_plan(0, size, heads, model.dtype, model.device, flash=flash)

    def encode_images(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """As `QwenModel.encode_images`."""
        if self._pictures is None or len(patches) > self._pictures.most_patches:
            return self._model.encode_images(patches, grids)
        return self._pictures.encode(patches, grids)
