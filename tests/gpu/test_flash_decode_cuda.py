"""torch's flash attention for one query and for prompts: what it computes, and that one graph
serves a bucket."""

from __future__ import annotations

import pytest
import torch

from qwencli.config import Attention, Cache, EngineName, Kernels, SamplingOptions
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.attention import (
    AttentionPlan,
    Spans,
    can_flash_decode,
    eager,
    prompt_plan,
    sdpa,
)
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, picture

CUDA = torch.device("cuda")
MODERN = torch.cuda.get_device_capability() >= (8, 0)


def test_every_gpu_since_ampere_has_it_in_half_precision_alone():
    assert can_flash_decode(32, 8, 128, torch.bfloat16, CUDA) == MODERN
    assert not can_flash_decode(32, 8, 128, torch.float32, CUDA)


@pytest.mark.skipif(not MODERN, reason="flash attention needs compute capability 8.0")
@torch.inference_mode()
@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (8, 8)])
@pytest.mark.parametrize("length", [1, 2, 128, 129, 1000, 4096])
def test_it_sees_the_slots_in_use_in_a_replayed_graph(heads, length):
    num_heads, kv_heads = heads
    generator = torch.Generator(CUDA).manual_seed(2)
    cache = torch.randn(
        1, 2 * kv_heads, 4100, 128, device=CUDA, dtype=torch.bfloat16, generator=generator
    )
    keys, values = cache.narrow(2, 0, 4096).chunk(2, 1)
    qkv = torch.randn(
        1, 1, num_heads + 8, 128, device=CUDA, dtype=torch.bfloat16, generator=generator
    )
    q = qkv.narrow(2, 0, num_heads)
    spans = Spans.on(CUDA)
    plan = AttentionPlan(4096, None, spans=spans)
    spans.slots[1] = 7
    sdpa(q, keys, values, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sdpa(q, keys, values, plan)
    spans.slots[1] = length
    graph.replay()
    seen = [x.narrow(2, 0, length) for x in (keys, values)]
    half = eager(q, *seen, AttentionPlan(length, None)).float()
    exact = eager(q.double(), *(x.double() for x in seen), AttentionPlan(length, None))
    error, theirs = ((x.double() - exact).norm() / exact.norm() for x in (out, half))
    assert out.shape == exact.shape
    assert float(error) <= max(1.5 * float(theirs), 4e-3)


@pytest.mark.skipif(not MODERN, reason="flash attention needs compute capability 8.0")
@torch.inference_mode()
@pytest.mark.parametrize("heads", [(32, 8), (16, 16), (7, 1)])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 300), (129, 64), (500, 1), (3, 1021)])
def test_a_prompt_behind_a_prefix_sees_what_is_before_it(heads, start, length):
    num_heads, kv_heads = heads
    generator = torch.Generator(CUDA).manual_seed(3)
    cache = torch.randn(
        2, 2 * kv_heads, 2048, 128, device=CUDA, dtype=torch.bfloat16, generator=generator
    )
    keys, values = cache.narrow(2, 0, start + length).chunk(2, 1)
    qkv = torch.randn(
        2, length, num_heads + 8, 128, device=CUDA, dtype=torch.bfloat16, generator=generator
    )
    q = qkv.narrow(2, 0, num_heads)
    out = sdpa(q, keys, values, prompt_plan(start, length, kv_heads, q.dtype, CUDA, flash=True))
    masked = prompt_plan(start, length, kv_heads, torch.float64, CUDA)
    exact = eager(q.double(), keys.double(), values.double(), masked)
    assert out.shape == exact.shape
    assert float((out - exact).norm() / exact.norm()) <= 4e-3


@pytest.mark.skipif(not MODERN, reason="flash attention needs compute capability 8.0")
def test_a_graph_decodes_with_it_across_length_classes_like_a_step_without(checkpoint):
    request = GenerationRequest(
        (user_message("Describe this image.", (picture(),)),),
        SamplingOptions(do_sample=False, max_new_tokens=400),
        ignore_eos=True,
    )
    answers = []
    for cache in (Cache.STATIC_GRAPH, Cache.STATIC):
        config = engine_config(
            checkpoint("qwen3_vl"), engine=EngineName.NATIVE, device="cuda",
            attention=Attention.SDPA, kernels=Kernels.TORCH, cache=cache,
        )  # fmt: skip
        with NativeEngine(config) as engine:
            assert engine._generation._model.flash_decode
            answers.append(engine.generate(request))
    graph, plain = (answer.token_ids for answer in answers)
    assert answers[0].effective.attention == "sdpa"
    # In bfloat16 a near tie may go the other way once; before it the words are the same.
    same = next((i for i, (a, b) in enumerate(zip(graph, plain, strict=True)) if a != b), 400)
    assert same >= 16
