"""Steps of several tokens as compiled and captured: equal answers, no races."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from qwencli.config import (
    Cache,
    DType,
    EngineConfig,
    EngineName,
    Kernels,
    Quantization,
    SamplingOptions,
    SamplingParams,
    Speculate,
)
from qwencli.engine.kernels import fused_ops as fused_module
from qwencli.engine.kernels.activation_buffers import ActivationConsumer
from qwencli.engine.kernels.fused_ops import FusedOps, Launch, fused_ops
from qwencli.engine.kernels.tiles import default_tiles
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.attention import AttentionPlan, decode_mask
from qwencli.engine.ops.decoder_ops import RMSNorm
from qwencli.engine.quant.quantized_tensor import quantize
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model
from tests.checkpoints import ALONE, VISION_FAMILIES, engine_config, picture
from tests.engine.kernels.test_gemv_quantized import MADE, rounded
from tests.gpu.test_kernels_cuda import wide_model, wide_shape

CUDA = torch.device("cuda")
OWN = functools.partial(fused_ops, own_attention=True)


def ask(images, tokens, penalty=1.0):
    sampling = SamplingOptions(do_sample=False, max_new_tokens=tokens, repetition_penalty=penalty)
    message = user_message("one two one two one two one two", tuple(images))
    return GenerationRequest((message,), sampling, ignore_eos=True)


@pytest.mark.parametrize("penalty", [1.0, 1.1])
@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.TRITON])
@pytest.mark.parametrize("family", ALONE)
def test_same_tokens_as_plain_steps_in_float32(checkpoint, family, kernels, penalty):
    images = (picture(),) if family in VISION_FAMILIES else ()
    config = engine_config(
        checkpoint(family), engine=EngineName.NATIVE, device="cuda", dtype=DType.FLOAT32
    )
    config = replace(config, kernels=kernels)
    with NativeEngine(config) as engine:
        expected = engine.generate(ask(images, 300, penalty))
    for speculate in (Speculate.ONE, Speculate.THREE, Speculate.SEVEN, Speculate.AUTO):
        with NativeEngine(replace(config, speculate=speculate)) as engine:
            for _ in range(2):
                result = engine.generate(ask(images, 300, penalty))
                assert result.token_ids == expected.token_ids, speculate
        assert result.speculation is not None and result.speculation.net_gain is not None
        assert result.effective.speculate == speculate.value
        # Where drafts do not pay, `auto` may stop before one was right.
        drafts = speculate is not Speculate.AUTO and penalty == 1.0
        assert not drafts or result.speculation.num_accepted > 0


def test_the_eager_cache_reads_slots_that_the_host_does_not_know_yet(checkpoint):
    config = engine_config(
        checkpoint("qwen3"), engine=EngineName.NATIVE, device="cuda", dtype=DType.FLOAT32
    )
    config = replace(config, cache=Cache.STATIC)
    answers = []
    for speculate in (Speculate.OFF, Speculate.SEVEN):
        with NativeEngine(replace(config, speculate=speculate)) as engine:
            answers.append([engine.generate(ask((), tokens)).token_ids for tokens in (40, 200)])
    assert answers[0] == answers[1]


def test_the_end_of_the_context_and_of_short_answers(checkpoint):
    config = engine_config(
        checkpoint("qwen3"), engine=EngineName.NATIVE, device="cuda", dtype=DType.FLOAT32
    )
    with NativeEngine(config) as engine:
        whole = engine.generate(ask((), 60))
    length = whole.num_prompt_tokens + 60
    config = replace(config, speculate=Speculate.SEVEN, max_seq_len=length)
    with NativeEngine(config) as engine:
        for tokens in (60, 1, 2, 3, 9, 17, 60):
            assert engine.generate(ask((), tokens)).token_ids == whole.token_ids[:tokens]


def test_the_bundled_model_says_the_same():
    config = EngineConfig(resolve_model("scenes"), device="cuda", dtype=DType.FLOAT32)
    answers = []
    for speculate in (Speculate.OFF, Speculate.THREE, Speculate.AUTO):
        with NativeEngine(replace(config, speculate=speculate)) as engine:
            answers.append([engine.generate(ask((picture(),), 100)).token_ids for _ in range(2)])
    assert answers[0] == answers[1] == answers[2]


@torch.inference_mode()
@pytest.mark.parametrize("quantization", Quantization)
@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 127, 700, 4000])
def test_logits_of_several_tokens_are_those_of_one_at_a_time(length, size, quantization):
    """True widths, bfloat16, every storage of weights."""
    model = wide_model(OWN, quantization)
    generator = torch.Generator(CUDA)
    found = []
    for at_once in (1, size):
        cache = model.static_cache()
        for layer in cache.layers:
            layer.normal_(0, 0.5, generator=generator.manual_seed(1))
        rows = []
        for first in range(length, length + size, at_once):
            at = torch.tensor([first], device=CUDA)
            tokens = torch.arange(first, first + at_once, device=CUDA) - length + 70
            plan = AttentionPlan(first + at_once, None)
            rows.append(model.decode_step(tokens, at, at, cache, plan).double())
        logits = torch.cat(rows)
        found.append(logits / logits.norm(dim=1, keepdim=True))
    assert not torch.isnan(found[1]).any()
    assert float((found[0] - found[1]).norm(dim=1).max()) < 0.03


@torch.inference_mode()
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("length", [1, 700, 4000])
def test_logits_of_several_tokens_are_those_of_the_plain_operators(length, size):
    tokens = torch.arange(70, 70 + size, device=CUDA)
    found = []
    for fused in (None, OWN):
        model = wide_model(fused)
        cache = model.static_cache()
        generator = torch.Generator(CUDA).manual_seed(1)
        for layer in cache.layers:
            layer.normal_(0, 0.5, generator=generator)
        at = torch.tensor([length], device=CUDA)
        slots = torch.arange(length, length + size, device=CUDA)
        mask = decode_mask(torch.arange(length + size, device=CUDA), slots, None, model.dtype)
        plan = AttentionPlan(length + size, mask)
        logits = model.decode_step(tokens, at, at, cache, plan).double()
        found.append(logits / logits.norm(dim=1, keepdim=True))
    assert float((found[0] - found[1]).norm(dim=1).max()) < 0.03


@torch.inference_mode()
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("quantization", Quantization)
def test_overlapped_launches_give_the_same_bits_for_thousands_of_steps(
    quantization, size, monkeypatch
):
    """A kernel that reads before its turn would read the poison of the step before."""
    if not Launch.on(CUDA).dependent:
        pytest.skip("this GPU launches kernels one after the other")
    apart = replace(Launch.on(CUDA), dependent=False)
    sampling = SamplingParams(do_sample=False, max_new_tokens=8000, repetition_penalty=1.05)

    def run():
        model = wide_model(OWN, quantization)
        own = model.step_ops.norm_qkv.__self__
        state = DecodeState(model, model.static_cache(), 9000, with_drafts=True)
        prompt = torch.randint(0, 4096, (600,), generator=torch.Generator().manual_seed(2))
        state.begin(sampling, prompt.to(CUDA), [], torch.tensor([600], device=CUDA))
        state.done.fill_(True)
        state.verify_masked(state.kind, size, 9000)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            state.verify_masked(state.kind, size, 9000)
            between = (
                *own._projected.values(),
                own._attended,
                own._activated,
                own._parts.sums,
                own._parts.row_max,
            )
            for buffer in (*between, *own._skinny_gemm.buffers()):
                buffer.fill_(float("nan"))
        state.begin(sampling, prompt.to(CUDA), [], torch.tensor([600], device=CUDA))
        state.token.fill_(5)
        for layer in state.cache.layers:
            layer.zero_()
        steps = []
        for _ in range(1000):
            graph.replay()
            steps.append(state.drafts.verify_output.clone())
        return torch.stack(steps).tolist(), state.drafts.ids.clone(), int(state.slot)

    overlapped = run()
    monkeypatch.setattr(fused_module.Launch, "on", classmethod(lambda cls, device: apart))
    serial = run()
    assert overlapped[0] == serial[0]
    assert torch.equal(overlapped[1], serial[1])
    assert overlapped[2] == serial[2]
    # Every step gives a token, and they are not all the same.
    assert all(count >= 1 for count, *_ in serial[0])
    assert len({tuple(step) for step in serial[0]}) > 10


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.TRITON])
def test_steps_of_a_request_are_replayed_and_not_captured(checkpoint, kernels):
    config = engine_config(
        checkpoint("qwen3"), engine=EngineName.NATIVE, device="cuda", dtype=DType.FLOAT32
    )
    config = replace(config, kernels=kernels, speculate=Speculate.AUTO)
    with NativeEngine(config) as engine:
        first = [engine.generate(ask((), 200)) for _ in range(2)]
        free = torch.cuda.memory_allocated()
        again = engine.generate(ask((), 200))
        assert torch.cuda.memory_allocated() == free
    assert first[0].token_ids == again.token_ids
    assert again.token_gpu_ms is not None
    assert all(a < b for a, b in itertools.pairwise(again.token_t_s))


@torch.inference_mode()
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("scheme", [*MADE, None])
def test_products_of_several_vectors_and_what_they_hand_on(scheme, splits):
    """Columns shared by several programs included; the same bits every time."""
    generator = torch.Generator(CUDA).manual_seed(5)

    def made(*size):
        return torch.randn(size, device=CUDA, generator=generator).to(torch.bfloat16)

    def matrix_of(weight):
        return weight.t() if scheme is None else quantize(weight.float(), scheme)

    def product(x, matrix):
        if scheme is None:
            return x.double() @ matrix.double()
        vectors = torch.stack([rounded(row.float(), scheme) for row in x]).double()
        return vectors @ matrix.dequantize(torch.float64).t()

    shape = wide_shape().text
    hidden, columns = shape.hidden_size, shape.intermediate_size
    own = FusedOps(
        shape,
        torch.zeros(1, 2, 128, device=CUDA),
        torch.bfloat16,
        CUDA,
        lambda kind: replace(default_tiles(kind), splits=splits),
    )
    matrix, following = matrix_of(made(hidden, columns)), matrix_of(made(512, hidden))
    norm = RMSNorm(1 + 0.1 * made(hidden), 1e-6)
    x, start = made(5, columns), made(5, hidden)
    wanted = product(x, matrix) + start.double()
    found = []
    for _ in range(20):
        y, z = start.clone(), torch.zeros(5, 512, device=CUDA, dtype=torch.bfloat16)
        own._gemv(
            x,
            ActivationConsumer(None, matrix),
            y,
            after=ActivationConsumer(norm, following),
            add=True,
        )
        own._gemv(y, ActivationConsumer(norm, following), z)
        found.append((y, z))
    assert all(torch.equal(y, found[0][0]) and torch.equal(z, found[0][1]) for y, z in found)
    y, z = found[0]
    assert float((y - wanted).norm() / wanted.norm()) < 5e-3
    length = (y.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    after = product(y.float() * norm.weight.float(), following) * length
    assert float((z - after).norm() / after.norm()) < 5e-3
