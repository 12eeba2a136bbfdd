"""Has torch load its kernels and libraries while weights load, not in the first request.

Torch loads each kernel when it is first called, and cuBLAS sets itself up then: 0.35 s of the first
request's 0.42 s on an H200 (docs/experiments/2026-11-30-first-token.md). So a model of the same
widths with one layer and few tokens to choose from sees a picture, reads a prompt and draws a token
beside the load. Its answer is thrown away; it has the memory that caches will take, and is gone
before they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from qwencli.config import SamplingParams
from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.loading import weights
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prefill_graphs import PrefillGraphs, PrefillRunner
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import specs
from qwencli.tracing import span

VOCAB_SIZE = 1024
IMAGE, VIDEO, VISION_START, VISION_END, WORD = range(5)
# Patches along each side of the picture, before a square of them becomes a token: 512x512 pixels.
SIDE, WORDS, SLOTS = 32, 16, 1024
# What the small model works in at most.
WORKING_BYTES = 64 * 2**20
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
        graphs: whether prompts are as long as their length class, as graphs of them are.
        room_bytes: that nothing uses before `wait` returns.
    """

    def __init__(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        device: torch.device,
        make: MakeModel,
        *,
        graphs: bool,
        room_bytes: int,
    ) -> None:
        self._shape, self._dtype, self._device = small_shape(shape), dtype, device
        self._make, self._graphs = make, graphs
        needed = sum(spec.elements for spec in specs(self._shape)) * dtype.itemsize
        self._fits = needed + WORKING_BYTES <= room_bytes
        self.note = ""
        # No daemon: one that comes back from torch while a process ends, as after weights that
        # cannot be read, aborts it.
        self._thread = threading.Thread(target=self._run, name="warm-up")
        self._thread.start()

    def wait(self) -> None:
        """Until it is over. Whatever went wrong is in `note`: the first request then loads what
        is missing."""
        self._thread.join()

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
        model = self._make(shape, weights.dummy(shape, self._dtype, device), SLOTS)
        cache = prompts = None
        if not text.rows_only:
            cache = model.static_cache()
            if self._graphs:
                prompts = PrefillGraphs(model, cache, SLOTS)
                prompts.at_once = False
        runner: PrefillRunner = prompts or model
        visuals, ids = [], [WORD] * WORDS
        features = None
        if shape.vision is not None:
            visual = Visual((1, SIDE, SIDE))
            patches = torch.zeros(
                SIDE * SIDE, shape.vision.patch_elements, dtype=self._dtype, device=device
            )
            features = runner.encode_images(patches, [visual.grid])
            tokens = visual.num_tokens(shape.vision.merge_size)
            ids = [VISION_START, *[IMAGE] * tokens, VISION_END, *ids]
            visuals.append(visual)
        if cache is None:
            return  # of models that run in rows alone, the picture is most of it
        inputs = model.prepare([ModelPrompt(ids, visuals)], features)
        logits = runner.prefill(inputs, cache)
        state = DecodeState(model, cache, SLOTS)
        for sampling in SAMPLINGS:
            state.begin(sampling, inputs.ids[0], [VOCAB_SIZE], inputs.next_positions)
            state.sample_first(logits)
        # A step but for its matrices, whose kernels are ours.
        model.decoder.embed(state.token)
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()
