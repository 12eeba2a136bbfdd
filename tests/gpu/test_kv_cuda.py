"""Quantized keys and values on a real GPU: the compiled kernel against the plain operators."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from qwencli.config import (
    Cache,
    DType,
    EngineConfig,
    EngineName,
    Kernels,
    KVDType,
)
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.loading import weights
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.model import QwenModel
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from tests.chatting import answers_of_turns
from tests.checkpoints import picture
from tests.gpu.test_kernels_cuda import ask
from tests.models.test_shape_reader import TEXT

CUDA = torch.device("cuda")
KINDS = [KVDType.INT8, KVDType.FP8]
SCHEMES = {KVDType.INT8: Scheme.INT8, KVDType.FP8: Scheme.FP8}


def engine(kv, kernels=Kernels.AUTO, **wanted):
    config = EngineConfig(
        resolve_model("scenes"), engine=EngineName.NATIVE, device="cuda", kv_dtype=kv
    )
    return NativeEngine(replace(config, kernels=kernels, **wanted))


@pytest.mark.parametrize("kv", KINDS)
def test_the_bundled_model_says_the_same_in_kernels_of_our_own(kv):
    results = []
    for kernels in (Kernels.TORCH, Kernels.TRITON):
        with engine(kv, kernels, dtype=DType.FLOAT32) as loaded:
            results.append(loaded.generate(ask((picture(),), 100)))
    assert results[0].token_ids == results[1].token_ids
    assert {r.effective.kv_dtype for r in results} == {SCHEMES[kv].value}
    assert [r.effective.attention for r in results] == ["sdpa", "triton"]


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("cache", [Cache.STATIC, Cache.STATIC_COMPILE])
def test_other_caches_say_the_same(kv, cache):
    with engine(kv, Kernels.TORCH, dtype=DType.FLOAT32) as loaded:
        expected = loaded.generate(ask((picture(),), 60)).token_ids
    with engine(kv, cache=cache, dtype=DType.FLOAT32) as loaded:
        assert loaded.generate(ask((picture(),), 60)).token_ids == expected


@pytest.mark.parametrize("kv", KINDS)
def test_a_next_turn_reads_the_prefix_that_steps_have_written(kv):
    """The kernel's bytes and those of the prompt's operators are interchangeable."""
    with engine(kv, dtype=DType.FLOAT32) as loaded:
        reused, anew = (answers_of_turns(loaded, 32, forget=forget) for forget in (False, True))
    assert reused == anew


@torch.inference_mode()
@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("length", [0, 1, 31, 32, 700, 1025, 4000])
def test_logits_in_bfloat16_are_near_those_of_the_plain_operators(kv, length):
    text = TEXT | {"hidden_size": 1024, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape = read_shape({"model_type": "qwen3", **text, "head_dim": 128})
    logits = []
    for fused in (None, functools.partial(fused_ops, own_attention=True)):
        loaded = weights.dummy(shape, torch.bfloat16, CUDA)
        model = QwenModel(shape, loaded, 4100, fused=fused, kv=SCHEMES[kv])
        cache = model.static_cache()
        generator = torch.Generator(CUDA).manual_seed(1)
        size = (1, 4100, 16, 128)
        old = torch.randn(size, device=CUDA, generator=generator).to(torch.bfloat16)
        for layer in range(len(cache.layers)):
            cache.write(layer, old, torch.arange(4100, device=CUDA), 1)
        at = torch.tensor([length], device=CUDA)
        token = torch.tensor([77], device=CUDA)
        step = model.decode_step(token, at, at, cache, AttentionPlan(length + 1, None))
        logits.append(step[0].double())
    plain, own = (row / row.norm() for row in logits)
    assert not torch.isnan(own).any()
    # Three bits of mantissa: where an e4m3 is rounded apart it is an eighth of its value apart.
    assert float((plain - own).norm()) < 0.04
