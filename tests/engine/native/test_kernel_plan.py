"""Kernels that are planned are those that runs launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.config import Attention, Kernels, Quantization, SamplingParams, Speculate
from qwencli.engine.cache.paged_kv import PagePool, pages_for
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.event_timer import EventTimer
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.kernels.launches import Gpu, planning, recording
from qwencli.engine.loading import weights
from qwencli.engine.native.decode_state import DecodeState, EagerStepper
from qwencli.engine.native.kernel_plan import PlannedModel, plan_kernels
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.native.supported import fused_for
from qwencli.engine.request import PromptChunk, Sequence
from qwencli.engine.runner import ModelRunner
from qwencli.engine.runner_prompt import PromptLayouts
from qwencli.engine.spec_decode.policy import MOST_VERIFIED
from qwencli.engine.spec_decode.verify import EagerVerifier, verify_sizes
from qwencli.models.resolve import dummy_config, resolve_model
from qwencli.models.shape_reader import read_shape
from tests.engine.kernels.test_fused_ops import NARROW, model_of, prompt_of
from tests.engine.kernels.test_hybrid_step import dummy, requests_of

FUSED = fused_for(Kernels.TRITON, Attention.AUTO)
ROWS = 16
SLOTS = 128


def lone_requests(model: QwenModel) -> None:
    state = DecodeState(model, model.static_cache(), SLOTS, with_drafts=True)
    steppers = EagerStepper(state), EagerVerifier(state)
    for penalty in (1.0, 1.3):
        state.cache.truncate(0)
        inputs = model.prepare([ModelPrompt(prompt_of(40))])
        sampling = SamplingParams(do_sample=False, max_new_tokens=20, repetition_penalty=penalty)
        state.begin(sampling, inputs.ids[0], [], inputs.next_positions)
        state.sample_first(model.prefill(inputs, state.cache))
        steppers[0].run(40)
        for size in verify_sizes(Speculate.AUTO):
            steppers[1].run(41, size)
        state.hold_logits()
        state.kind = SamplerKind.LOGITS
        steppers[0].run(60)


def batch_of(model: QwenModel, rows: int, penalty: float) -> None:
    runner = ModelRunner(model, 1 + 2 * rows, ROWS, SLOTS, False, VisionCache(), with_drafts=True)
    pool, clock = PagePool(1 + 2 * rows), EventTimer("cpu")
    chunks, prompts = [], []
    for row in range(rows):
        ids = prompt_of(5 + row)
        sampling = SamplingParams(do_sample=False, max_new_tokens=9, repetition_penalty=penalty)
        sequence = Sequence(row, len(ids), 9, row=row, pages=pool.allocate(2))
        sequence.num_computed, sequence.num_scheduled = len(ids), 1
        chunks.append(PromptChunk(sequence, 0, len(ids)))
        prompts.append(
            PromptLayouts(model.shape).laid_out(
                Prompt(ids, None, 0.0, None, None), (), sampling, ()
            )
        )
    runner.prefill(chunks, prompts, clock)
    sequences = [chunk.sequence for chunk in chunks]
    runner.decode(sequences, prompts, 0, clock)
    if penalty == 1.0:
        runner.verify(sequences, prompts, 2, 0, clock)


@pytest.mark.parametrize("mode", [Quantization.NONE, Quantization.INT4])
def test_what_runs_launch_is_what_was_planned(mode: Quantization) -> None:
    """Lone requests and batches, with and without drafts and a penalty; nothing is computed."""
    model = model_of(NARROW, FUSED, mode)
    shape, dtype = model.shape, model.dtype
    with torch.inference_mode(), recording(runs=False) as launched:
        lone_requests(model)
        alone = set(launched)
        for rows in (1, 4, ROWS):
            for penalty in (1.0, 1.3):
                batch_of(model, rows, penalty)
    lone = PlannedModel(shape, dtype, mode, speculate=Speculate.AUTO, rows=0)
    planned = set(plan_kernels(lone, None))
    # The load launches it, and not a request.
    of_load = {each for each in planned if each.kernel == "quantize_int4_kernel"}
    assert bool(of_load) == (mode is Quantization.INT4)
    assert alone == planned - of_load
    together = PlannedModel(shape, dtype, mode, speculate=Speculate.AUTO, rows=ROWS)
    planned = set(plan_kernels(together, None))
    assert set(launched) <= planned
    # Batches of rows and drafts that were not run above are cut up otherwise.
    launched |= dict.fromkeys(of_load)
    assert {each.kernel for each in launched} == {each.kernel for each in planned}


def hybrid_requests(
    model: QwenModel, rows: int, with_drafts: bool, penalty: float, lengths: range
) -> None:
    most = pages_for(max(lengths) + 9)
    runner = ModelRunner(
        model, 1 + most * rows, rows, SLOTS, False, VisionCache(), rows + 1, with_drafts=with_drafts
    )
    texts = [[(7 * row + at) % 60 for at in range(lengths[row])] for row in range(rows)]
    sequences, prompts = requests_of(model.shape, texts, 9)
    sampling = SamplingParams(do_sample=False, max_new_tokens=9, repetition_penalty=penalty)
    prompts = [replace(each, sampling=sampling) for each in prompts]
    clock = EventTimer("cpu")
    chunks = [PromptChunk(each, 0, each.num_prompt_tokens) for each in sequences]
    runner.prefill(chunks, prompts, clock)
    runner.decode(sequences, prompts, 0, clock)
    if with_drafts and penalty == 1.0 and rows * 4 <= MOST_VERIFIED:
        runner.verify(sequences, prompts, 4, 0, clock)


@pytest.mark.parametrize(
    ("mode", "with_drafts"),
    [(Quantization.NONE, False), (Quantization.NONE, True), (Quantization.INT4, False)],
)
def test_a_hybrid_launches_on_a_gpu_what_was_planned(mode: Quantization, with_drafts: bool) -> None:
    """It runs in rows alone, may draft with its own head, and keeps states; nothing is computed.
    Tensors of the host stand for those of the GPU."""
    gpu, dtype = Gpu((9, 0), 132), torch.bfloat16
    shape, _ = dummy(mode, head=with_drafts)
    loaded = weights.dummy(shape, dtype, torch.device("cpu"), mode)
    speculate = Speculate.MTP if with_drafts else Speculate.OFF
    with torch.inference_mode(), planning(gpu) as launched:
        model = QwenModel(shape, loaded, SLOTS, fused=FUSED)
        for rows in (1, 4, ROWS):
            hybrid_requests(model, rows, with_drafts, 1.0, range(5, 5 + rows))
            hybrid_requests(model, rows, with_drafts, 1.3, range(16, 16 + 4 * rows, 4))
            if rows == 1:
                alone = set(launched)
    lone = PlannedModel(shape, dtype, mode, speculate=speculate, rows=0)
    assert alone <= set(plan_kernels(lone, gpu))
    together = PlannedModel(shape, dtype, mode, speculate=speculate, rows=ROWS)
    assert set(launched) <= set(plan_kernels(together, gpu))
    assert {"delta_step_kernel", "decode_attention_kernel"} <= {each.kernel for each in alone}


def test_a_plan_asks_for_no_gpu_and_says_the_same_again() -> None:
    model = model_of(NARROW, FUSED, Quantization.NONE)
    planned = PlannedModel(model.shape, torch.bfloat16, Quantization.FP8)
    gpu = Gpu((9, 0), 132)
    found = plan_kernels(planned, gpu)
    assert found == plan_kernels(planned, gpu)
    assert found != plan_kernels(planned, Gpu((8, 6), 82))
    assert {"tiled_gemm_kernel", "quantize_rows_kernel"} <= {each.kernel for each in found}


def test_layers_with_experts_are_planned_for_every_number_of_rows() -> None:
    shape = read_shape(
        NARROW | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    )
    found = plan_kernels(PlannedModel(shape, torch.float32, rows=ROWS), None)
    names = [each.kernel for each in found]
    assert {"route_kernel", "experts_down_kernel", "sort_pairs_kernel"} <= set(names)
    tiles = {dict(each.arguments)["TOKENS"] for each in found if "grouped" in each.kernel}
    assert tiles == {16, 32, 64}, "few rows of an expert, and many"


@pytest.mark.parametrize(
    ("name", "head"), [("qwen3-vl-2b", 64), ("qwen3-vl-8b", 72), ("qwen2.5-vl-3b", 80)]
)
def test_attention_of_pictures_side_by_side_is_planned(name: str, head: int) -> None:
    shape = read_shape(dummy_config(resolve_model(name, offline=True)))
    found = plan_kernels(PlannedModel(shape, torch.bfloat16), Gpu((9, 0), 132))
    flash = [dict(each.arguments) for each in found if each.kernel == "flash_attention_kernel"]
    assert [each["D"] for each in flash if not each["CAUSAL"]] == [head]


@pytest.mark.parametrize("mode", [mode for mode in Quantization if mode is not Quantization.NONE])
def test_what_a_load_warms_up_with_is_planned_whatever_the_weights_are(mode: Quantization) -> None:
    """Its weights are not quantized: what prompts and pictures launch then."""
    shape = read_shape(dummy_config(resolve_model("qwen3-vl-2b", offline=True)))
    plain = PlannedModel(shape, torch.bfloat16, speculate=Speculate.OFF)
    gpu = Gpu((9, 0), 132)
    found = set(plan_kernels(replace(plain, quantization=mode), gpu))
    steps = ("decode_attention_kernel", "gemm_float16_kernel", "gemv_kernel")
    others = (*steps, "quantize_activation_kernel")
    wanted = {each for each in plan_kernels(plain, gpu) if each.kernel not in others}
    assert {"swiglu_kernel", "flash_attention_kernel"} <= {each.kernel for each in wanted}
    assert wanted <= found
