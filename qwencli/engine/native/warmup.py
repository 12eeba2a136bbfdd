"""Has torch load its kernels and libraries while weights load, not in the first request.

Torch loads each kernel when it is first called, and cuBLAS sets itself up then: 0.35 s of the first
request's 0.42 s on an H200 (docs/experiments/2026-11-30-first-token.md). So a model of the same
widths with one layer and few tokens to choose from sees a picture, reads a prompt and draws a token
beside the load. Its answer is thrown away; it has the memory that caches will take, and is gone
before they do.

cuBLAS has a kernel for each few numbers of rows, which is loaded when it is first chosen: most of
what the first picture of a size waited for. While the load goes on, prompts and pictures of each
length class run too.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from qwencli.config import SamplingParams
from qwencli.engine.cache.kv_cache import KVCache
from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.layers.vision_layout import Grid
from qwencli.engine.layers.vision_tower import VisionFeatures
from qwencli.engine.loading import weights
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prefill_graphs import (
    BUCKET,
    PADDED_PATCHES,
    PATCH_BUCKET,
    GraphSizes,
    PrefillGraphs,
    PrefillRunner,
)
from qwencli.engine.native.prompt_inputs import Prompt
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import specs
from qwencli.tracing import span

VOCAB_SIZE = 1024
IMAGE, VIDEO, VISION_START, VISION_END, WORD = range(5)
# Patches along each side of the picture, before a square of them becomes a token: 512x512 pixels.
SIDE, WORDS, SLOTS = 32, 16, 1024
# What the small model works in at most, for that picture; and what must be free beside what it
# works in for every size: torch keeps what is given back, and caches may not fit into its pieces.
WORKING_BYTES, SPARE_BYTES = 64 * 2**20, 2 * 2**30
# Of a picture larger than those whose sizes are padded: it is attended to by another kernel.
LARGE_GRID = (1, 64, 64)
SAMPLINGS = (
    SamplingParams(do_sample=False, max_new_tokens=2),
    SamplingParams(do_sample=False, max_new_tokens=2, repetition_penalty=1.2),
    SamplingParams(max_new_tokens=2, seed=0),
)
MakeModel = Callable[[ModelShape, weights.LoadedWeights, int], QwenModel]


def small_shape(shape: ModelShape) -> ModelShape:
    """A model of the same widths with one layer, one block and a small vocabulary."""
    text = replace(
        shape.text,
        num_layers=1,
        vocab_size=VOCAB_SIZE,
        mixers=shape.text.mixers[:1],
        mtp_layers=0,
        draft_head=False,
    )
    vision = shape.vision
    if vision is not None:
        vision = replace(
            vision,
            depth=1,
            deepstack_layers=(0,) if vision.deepstack_layers else (),
            full_attention_layers=(0,) if vision.full_attention_layers else (),
        )
    return replace(
        shape,
        text=text,
        vision=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


class WarmUp:
    """Runs the small model in a thread of its own.

    Args:
        make: a model of a shape, its weights and so many slots, as the engine makes its own.
        sizes: of prompts and pictures that run as graphs, each as long as its length class; None
            where there are no graphs.
        room_bytes: that nothing uses before `wait` returns.
    """

    def __init__(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        device: torch.device,
        make: MakeModel,
        *,
        sizes: GraphSizes | None,
        room_bytes: int,
    ) -> None:
        self._shape, self._dtype, self._device = small_shape(shape), dtype, device
        self._make, self._sizes = make, sizes
        needed = sum(spec.elements for spec in specs(self._shape)) * dtype.itemsize
        self._fits = needed + WORKING_BYTES <= room_bytes
        self._has_room = needed + SPARE_BYTES + self._all_sizes_bytes() <= room_bytes
        self._waited_for = threading.Event()
        self.note = ""
        # No daemon: one that comes back from torch while a process ends, as after weights that
        # cannot be read, aborts it.
        self._thread = threading.Thread(target=self._run, name="warm-up")
        self._thread.start()

    def wait(self) -> None:
        """Until it is over, which is soon: sizes that have not run are left out. Whatever went
        wrong is in `note`: requests then load what is missing."""
        self._waited_for.set()
        self._thread.join()

    def _all_sizes_bytes(self) -> int:
        """What prompts and pictures of all sizes are worked on in, one at a time."""
        if self._sizes is None:
            return 0
        text, vision = self._shape.text, self._shape.vision
        values = self._sizes.tokens * (3 * text.intermediate_size + 10 * text.hidden_size)
        if vision is not None:
            wide = vision.intermediate_size + 10 * vision.hidden_size + vision.patch_elements
            values += self._sizes.patches * wide
        return values * self._dtype.itemsize

    def _run(self) -> None:
        try:
            if self._fits:
                with span("warm up"), torch.inference_mode():
                    self._answer()
        except Exception as error:  # noqa: BLE001 - nothing depends on it
            self.note = f"{type(error).__name__}: {error}"

    def _answer(self) -> None:
        shape, device, text = self._shape, self._device, self._shape.text
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        sizes = self._sizes
        slots = max(SLOTS, sizes.tokens if sizes is not None else 0)
        model = self._make(shape, weights.dummy(shape, self._dtype, device), slots)
        cache = prompts = None
        if not text.rows_only:
            cache = model.static_cache()
            if sizes is not None:
                prompts = PrefillGraphs(model, cache, slots, sizes)
                prompts.at_once = False
        runner: PrefillRunner = prompts or model
        visuals, ids = [], [WORD] * WORDS
        features = None
        if shape.vision is not None:
            visual = Visual((1, SIDE, SIDE))
            features = self._see(runner, visual.grid)
            tokens = visual.num_tokens(shape.vision.merge_size)
            ids = [VISION_START, *[IMAGE] * tokens, VISION_END, *ids]
            visuals.append(visual)
        if cache is None:
            return  # of models that run in rows alone, the picture is most of it
        inputs = model.prepare([Prompt(ids, visuals)], features)
        logits = runner.prefill(inputs, cache)
        state = DecodeState(model, cache, slots)
        for sampling in SAMPLINGS:
            state.begin(sampling, inputs.ids[0], [VOCAB_SIZE], inputs.next_positions)
            state.sample_first(logits)
        # A step but for its matrices, whose kernels are ours.
        model.decoder.embed(state.token)
        if sizes is not None and self._has_room:
            for run in self._of_each_size(model, runner, cache, sizes):
                if self._waited_for.is_set():
                    break
                run()
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _see(self, runner: PrefillRunner, grid: Grid) -> VisionFeatures:
        assert self._shape.vision is not None, "it has a tower"
        elements = self._shape.vision.patch_elements
        patches = torch.zeros(math.prod(grid), elements, dtype=self._dtype, device=self._device)
        return runner.encode_images(patches, [grid])

    def _of_each_size(
        self, model: QwenModel, runner: PrefillRunner, cache: KVCache, sizes: GraphSizes
    ) -> Iterator[Callable[[], object]]:
        """What runs a prompt or picture of each length class, small ones first."""

        def prompt(length: int) -> None:
            cache.truncate(0)
            runner.prefill(model.prepare([Prompt([WORD] * length, [])], None), cache)

        lengths = range(BUCKET, sizes.tokens + 1, BUCKET)
        tasks: list[tuple[int, Callable[[], object]]] = [
            (length, functools.partial(prompt, length)) for length in lengths
        ]
        vision = self._shape.vision
        if vision is not None:
            area = vision.merge_size**2
            grids = [
                (1, 2 * vision.merge_size, patches // (2 * vision.merge_size))
                for patches in range(PATCH_BUCKET, PADDED_PATCHES + 1, PATCH_BUCKET)
            ]
            if sizes.patches >= math.prod(LARGE_GRID):
                grids.append(LARGE_GRID)
            tasks += [
                (math.prod(grid) // area, functools.partial(self._see, runner, grid))
                for grid in grids
            ]
        return (run for _, run in sorted(tasks, key=lambda task: task[0]))
