"""The fused decode kernels as compiled: equal results, no races, any length."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from qwencli.config import (
    Attention,
    DType,
    EngineConfig,
    EngineName,
    Kernels,
    Quantization,
    SamplingOptions,
)
from qwencli.engine.kernels import fused_ops as fused_module
from qwencli.engine.kernels.activation_buffers import ActivationConsumer
from qwencli.engine.kernels.fused_ops import FusedOps, Launch, fused_ops
from qwencli.engine.loading import weights
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.quant.quantized_tensor import Scheme, quantize
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from tests.checkpoints import ALONE, VISION_FAMILIES, engine_config, picture
from tests.engine.kernels.test_dequantize import DTYPES, assert_same_bits
from tests.engine.kernels.test_gemv_quantized import MADE, rounded
from tests.engine.quant.drawn_matrices import KINDS, drawn

CUDA = torch.device("cuda")


def ask(images, tokens):
    sampling = SamplingOptions(do_sample=False, max_new_tokens=tokens, repetition_penalty=1.1)
    return GenerationRequest(
        (user_message("Describe this image.", tuple(images)),), sampling, ignore_eos=True
    )


@pytest.mark.parametrize("attention", [Attention.AUTO, Attention.SDPA, Attention.EAGER])
@pytest.mark.parametrize("family", ALONE)
def test_same_tokens_as_plain_operators_in_float32(checkpoint, family, attention):
    images = (picture(),) if family in VISION_FAMILIES else ()
    results = []
    for kernels in (Kernels.TORCH, Kernels.TRITON):
        config = engine_config(
            checkpoint(family), engine=EngineName.NATIVE, device="cuda", dtype=DType.FLOAT32
        )
        with NativeEngine(replace(config, kernels=kernels, attention=attention)) as engine:
            results.append(engine.generate(ask(images, 200)))
    assert results[0].token_ids == results[1].token_ids
    assert [r.effective.kernels for r in results] == ["torch", "triton"]
    # Heads of 16 are too small for the kernel: attention stays with torch, and the result says so.
    named = Attention.SDPA if attention is Attention.AUTO else attention
    assert results[1].effective.attention == named.value


def test_the_bundled_model_says_the_same_in_kernels_of_our_own():
    results = []
    for kernels in (Kernels.TORCH, Kernels.TRITON):
        config = EngineConfig(resolve_model("scenes"), device="cuda", dtype=DType.FLOAT32)
        with NativeEngine(replace(config, kernels=kernels)) as engine:
            results.append(engine.generate(ask((picture(),), 100)))
    assert results[0].token_ids == results[1].token_ids
    assert results[1].effective.attention == "triton"


QUANTIZED = (Quantization.INT8, Quantization.FP8, Quantization.INT4)


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_quantized_kernels_are_near_to_the_matrices_read_back(quantization):
    """They round the vector as well, which costs little beside the rounding of the matrices."""
    text = "A large red circle on the left and a small blue star on the right."
    read = []
    for kernels in (Kernels.TORCH, Kernels.TRITON):
        config = EngineConfig(
            resolve_model("scenes"), device="cuda", dtype=DType.FLOAT32, quantization=quantization
        )
        with NativeEngine(replace(config, kernels=kernels)) as engine:
            read.append(np.stack(list(engine.log_probs(text, 32))))
    plain, own = read
    assert np.abs(plain - own).max() > 0  # it is another computation
    assert float((np.exp(plain) * (plain - own)).sum(axis=1).mean()) < 0.05


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "columns"), [(6144, 2560), (2560, 9728), (1111, 4864), (896, 896)]
)
@pytest.mark.parametrize("scheme", MADE)
def test_quantized_products_are_those_of_the_rounded_vector(scheme, rows, columns, dtype):
    generator = torch.Generator(CUDA).manual_seed(4)
    weight = torch.randn(rows, columns, device=CUDA, generator=generator)
    x = torch.randn(1, columns, device=CUDA, generator=generator).to(dtype)
    matrix, y = quantize(weight, scheme), torch.zeros(1, rows, device=CUDA)
    shape = wide_shape().text
    own = FusedOps(shape, torch.zeros(1, 2, 128, device=CUDA), dtype, CUDA)
    own._gemv(x, ActivationConsumer(None, matrix), y)
    exact = matrix.dequantize(torch.float64) @ rounded(x[0].float(), scheme).double()
    # Few bits of mantissa make ties, which the two may round apart.
    most = 1e-5 if dtype is torch.float32 and scheme is not Scheme.FP8 else 5e-3
    assert float((y[0] - exact).norm() / exact.norm()) < most
    gated = torch.zeros(1, rows // 2, device=CUDA)
    even = replace(matrix, data=matrix.data[: rows // 2 * 2], scale=matrix.scale[: rows // 2 * 2])
    own._gemv(x, ActivationConsumer(None, even), gated, gated=True)
    gate, up = exact[: rows // 2 * 2].chunk(2)
    wanted = torch.nn.functional.silu(gate) * up
    assert float((gated[0] - wanted).norm() / wanted.norm()) < 2 * most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1111, 4864), (19456, 2560), (37, 128)])
@pytest.mark.parametrize("name", KINDS)
def test_matrices_read_back_have_the_bits_of_plain_operators(name, rows, columns, dtype):
    assert_same_bits(drawn(KINDS[name], rows, columns, "cuda"), dtype)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rows_of_odd_length_are_read_back(name):
    assert_same_bits(drawn(KINDS[name], 777, 1001, "cuda"), torch.bfloat16)


def wide_shape(hidden=2560, layers=3):
    """True widths of a 4B model, few layers and words."""
    return read_shape(
        {
            "model_type": "qwen3",
            "vocab_size": 4096,
            "hidden_size": hidden,
            "intermediate_size": 9728,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
            "tie_word_embeddings": True,
        }
    )


def wide_model(fused, quantization=Quantization.NONE):
    shape = wide_shape()
    loaded = weights.dummy(shape, torch.bfloat16, CUDA, quantization)
    return QwenModel(shape, loaded, 9000, fused=fused)


@torch.inference_mode()
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_prompt_takes_no_more_memory_than_one_matrix_read_back(quantization):
    model = wide_model(functools.partial(fused_ops, own_attention=True), quantization)
    cache = model.static_cache()
    inputs = model.prepare([ModelPrompt([5, 6, 7, 8])])
    model.prefill(inputs, cache)  # compiles, and cuBLAS takes its workspace
    cache.length = 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.prefill(inputs, cache)
    torch.cuda.synchronize()
    gate_up = 2 * 9728 * 2560 * 2
    took = torch.cuda.max_memory_allocated() - before
    assert took < 1.1 * gate_up
    # Others multiply so few tokens as they are stored.
    assert took >= gate_up or quantization is not Quantization.INT8


@torch.inference_mode()
@pytest.mark.parametrize("length", [0, 1, 127, 128, 700, 1025, 4000, 8990])
def test_logits_are_as_near_to_float64_as_plain_operators_are(length):
    logits = []
    generator = torch.Generator(CUDA).manual_seed(1)
    for fused in (None, functools.partial(fused_ops, own_attention=True)):
        model = wide_model(fused)
        cache = model.static_cache()
        for layer in cache.layers:
            layer.normal_(0, 0.5, generator=generator.manual_seed(1))
        at = torch.tensor([length], device=CUDA)
        plan = AttentionPlan(length + 1, None)
        token = torch.tensor([77], device=CUDA)
        logits.append(model.decode_step(token, at, at, cache, plan)[0].double())
    plain, own = (row / row.norm() for row in logits)
    assert not torch.isnan(own).any()
    assert float((plain - own).norm()) < 0.03


@torch.inference_mode()
@pytest.mark.parametrize("quantization", Quantization)
def test_overlapped_launches_give_the_same_bits_for_thousands_of_steps(quantization, monkeypatch):
    """A kernel that reads before its turn would read the poison of the step before."""
    if not Launch.on(CUDA).dependent:
        pytest.skip("this GPU launches kernels one after the other")
    apart = replace(Launch.on(CUDA), dependent=False)

    def run(fused):
        model = wide_model(fused, quantization)
        cache = model.static_cache()
        own = model.step_ops.norm_qkv.__self__
        token = torch.tensor([5], device=CUDA)
        slot = torch.tensor([600], device=CUDA)
        plan = AttentionPlan(9000, None)
        model.decode_step(token, slot, slot, cache, plan)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model.decode_step(token, slot, slot, cache, plan)
            token.copy_(logits.argmax(-1))
            slot.add_(1)
            for buffer in (
                *own._projected.values(),
                own._attended,
                own._activated,
                own._parts.sums,
                own._parts.row_max,
            ):
                buffer.fill_(float("nan"))
        token.fill_(5)
        slot.fill_(600)
        for layer in cache.layers:
            layer.zero_()
        seen = []
        for _ in range(3000):
            graph.replay()
            seen.append(token.clone())
        return torch.cat(seen).tolist(), logits.clone()

    fused = functools.partial(fused_ops, own_attention=True)
    overlapped = run(fused)
    monkeypatch.setattr(fused_module.Launch, "on", classmethod(lambda cls, device: apart))
    serial = run(fused)
    assert overlapped[0] == serial[0]
    assert torch.equal(overlapped[1], serial[1])
    assert len(set(serial[0])) > 10
