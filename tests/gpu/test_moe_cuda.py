"""Mixtures of experts as compiled: equal results of all kinds of weights, in graphs, in engines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.config import DType, EngineName, Kernels, Quantization, SamplingOptions
from qwencli.engine.client import generate_many
from qwencli.engine.kernels.fused_ops import MAX_BATCH_ROWS, Launch
from qwencli.engine.kernels.moe import ExpertKernels
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.decoder_ops import RMSNorm, experts_residual
from qwencli.engine.quant.quantized_tensor import QuantizedTensor
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import MIXTURES, engine_config, picture
from tests.engine.kernels.test_moe import MAKE, layer_of

CUDA = torch.device("cuda")
# As wide as 30B-A3B and 35B-A3B, of fewer experts.
SIZES = [
    {"experts": 24, "top_k": 8, "hidden": 2048, "inner": 768},
    {"experts": 40, "top_k": 8, "hidden": 2048, "inner": 512, "shared": True},
]


def kernels_of(precision="tf32"):
    return ExpertKernels(MAX_BATCH_ROWS, CUDA, Launch.on(CUDA).options, precision)


def made(kind, dtype, **sizes):
    with CUDA:
        return layer_of(kind, dtype, **sizes)


def in_float32(layer):
    """The layer whose weights are those that the kernels multiply, read back."""

    def plain(matrix):
        if isinstance(matrix, QuantizedTensor):
            return matrix.dequantize(torch.float32).t()
        return matrix.float()

    routing = replace(layer.routing, router=layer.routing.router.float())
    return replace(
        layer,
        gate_up=plain(layer.gate_up),
        down=plain(layer.down),
        mlp_norm=RMSNorm(layer.mlp_norm.weight.float(), layer.mlp_norm.eps),
        routing=routing,
    )


def off(got, expected, hidden):
    """How far the update is from the right one, of its size; rows whose experts are as good as
    equally liked may take others."""
    wrong = (got.float() - expected).norm(dim=1)
    return (wrong / (expected - hidden.float()).norm(dim=1)).sort().values


@torch.inference_mode()
@pytest.mark.parametrize("sizes", SIZES, ids=["30b", "35b"])
@pytest.mark.parametrize("kind", MAKE)
def test_rows_are_near_float32(kind, sizes):
    layer, kernels = made(kind, torch.bfloat16, **sizes), kernels_of()
    exact = in_float32(layer)
    for rows in (1, 3, 8, 9, 64, 700):
        torch.manual_seed(rows)
        hidden = torch.randn(rows, 2048, device=CUDA).bfloat16()
        expected = experts_residual(hidden.float(), exact)
        ways = [kernels.many] if rows > MAX_BATCH_ROWS else [kernels.few, kernels.many]
        for way in ways:
            far = off(way(hidden.clone(), layer), expected, hidden)
            assert far[int(0.9 * (rows - 1))] < 0.03, (rows, way.__name__, far)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["none", "int4"])
def test_float32_is_float32(kind):
    layer = made(kind, torch.float32, **SIZES[1])
    hidden = torch.randn(20, 2048, device=CUDA)
    expected, kernels = experts_residual(hidden.clone(), layer), kernels_of("ieee")
    for way, rows in ((kernels.few, 8), (kernels.many, 20)):
        got = way(hidden[:rows].clone(), layer)
        torch.testing.assert_close(got, expected[:rows], atol=2e-3, rtol=2e-3)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_graphs_follow_the_tokens_to_other_experts(rows):
    layer, kernels = made("int4", torch.bfloat16, **SIZES[1]), kernels_of()
    way = kernels.few if rows <= MAX_BATCH_ROWS else kernels.many
    given = torch.randn(rows, 2048, device=CUDA).bfloat16()
    way(given.clone(), layer)
    held = given.clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        way(held, layer)
    for seed in range(5):
        torch.manual_seed(seed)
        other = torch.randn(rows, 2048, device=CUDA).bfloat16()
        held.copy_(other)
        graph.replay()
        assert torch.equal(held, way(other.clone(), layer))


def ask(family, text, new, images=1):
    pictures = (picture(), picture(96, 64))[:images] if "vision_config" in MIXTURES[family] else ()
    sampling = SamplingOptions(do_sample=False, max_new_tokens=new)
    return GenerationRequest((user_message(text, pictures),), sampling, ignore_eos=True)


@pytest.mark.parametrize("family", MIXTURES)
def test_engines_say_what_plain_operators_say(checkpoint, family):
    """In float32: alone, and in a batch of unequal rows that runs both ways of products."""
    requests = [ask(family, "What? " * (1 + n % 5), 6 + 3 * n, n % 3) for n in range(12)]
    settings = {"engine": EngineName.NATIVE, "device": "cuda", "dtype": DType.FLOAT32}
    config = engine_config(checkpoint(family), **settings)
    with NativeEngine(replace(config, kernels=Kernels.TORCH)) as engine:
        expected = [engine.generate(each).token_ids for each in requests]
    with NativeEngine(replace(config, kernels=Kernels.TRITON)) as engine:
        assert [engine.generate(each).token_ids for each in requests] == expected
        together = list(generate_many(engine, requests))
    assert [each.token_ids for each in together] == expected
    assert {each.effective.kernels for each in together} == {"triton"}


@pytest.mark.parametrize("mode", Quantization)
def test_a_row_is_the_same_beside_others(checkpoint, mode):
    """Batch-invariant runs, in bfloat16."""
    requests = [ask("qwen3_vl_moe", "What? " * (1 + n % 5), 12, n % 3) for n in range(10)]
    settings = {"engine": EngineName.NATIVE, "device": "cuda", "quantization": mode}
    config = engine_config(checkpoint("qwen3_vl_moe"), **settings, batch_invariant=True)
    with NativeEngine(config) as engine:
        alone = [engine.generate(each).token_ids for each in requests]
        together = [each.token_ids for each in generate_many(engine, requests)]
    assert together == alone
