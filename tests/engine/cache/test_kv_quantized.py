"""Keys and values at one byte each: what is stored, what is read back, what it does to answers."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.config import Attention, Cache, DType, EngineName, KVDType
from qwencli.engine.cache.kv_cache import QuantizedKVCache
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.loading import weights
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.memory_plan import plan_memory
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.quant.quantized_tensor import Scheme, quantize_rows
from qwencli.errors import UnsupportedModeError
from qwencli.models.builtin import hub_config
from qwencli.models.memory import decode_bytes, native_kv_bytes
from qwencli.models.shape_reader import read_shape
from tests.chatting import answers_of_turns
from tests.checkpoints import engine_config
from tests.models.test_shape_reader import TEXT

CPU = torch.device("cpu")
SHAPE = read_shape({"model_type": "qwen2", **TEXT})
SCHEMES = [Scheme.INT8, Scheme.FP8]


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=30)
@given(size=st.floats(1e-6, 1e4), seed=st.integers(0, 99), outlier=st.sampled_from([1.0, 50.0]))
def test_rows_come_back_as_near_as_their_type_allows(
    scheme: Scheme, size: float, seed: int, outlier: float
) -> None:
    rows = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(seed)) * size
    rows[..., 5] *= outlier
    data, scale = quantize_rows(rows, scheme)
    error = (data.float() * scale[..., None] - rows).abs()
    if scheme is Scheme.INT8:
        most = scale[..., None] * 0.5001
    else:  # three bits after the point, and steps of 2^-9 near zero
        most = torch.maximum(rows.abs() * 2**-4, scale[..., None] * 2**-10) * 1.0001
    assert (error <= most).all()
    assert data.shape == rows.shape and scale.shape == rows.shape[:-1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_of_zeros_stays_zero(scheme: Scheme) -> None:
    data, scale = quantize_rows(torch.zeros(2, 8), scheme)
    assert scale.isfinite().all() and torch.equal(data.float(), torch.zeros(2, 8))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_leave_the_ones_before_them_alone(scheme: Scheme, dtype: torch.dtype) -> None:
    cache = QuantizedKVCache(SHAPE.text, 2, 16, dtype, CPU, scheme)
    size = (2, 9, 2 * SHAPE.text.num_kv_heads, SHAPE.text.head_dim)
    new = torch.randn(size, generator=torch.Generator().manual_seed(4)).to(dtype)
    whole = torch.cat(cache.write(1, new, torch.arange(9), 9), 1).clone()
    again = QuantizedKVCache(SHAPE.text, 2, 16, dtype, CPU, scheme)
    again.write(1, new[:, :5], torch.arange(5), 5)
    pieces = torch.cat(again.write(1, new[:, 5:], torch.arange(5, 9), 9), 1)
    assert torch.equal(whole, pieces)
    assert whole.dtype == dtype
    assert (whole - new.transpose(1, 2)).abs().max() < 0.2


def model(kv: Scheme | None) -> QwenModel:
    loaded = weights.dummy(SHAPE, torch.float32, CPU)
    scaled = {name: t * 5 if t.dim() > 1 else t for name, t in loaded.tensors.items()}
    return QwenModel(SHAPE, weights.LoadedWeights(scaled, (), {}), 64, kv=kv)


@torch.inference_mode()
def logits(kv: Scheme | None) -> torch.Tensor:
    """After a prompt of 20 tokens, and after one more."""
    own = model(kv)
    cache = own.static_cache()
    prompt = own.prepare([ModelPrompt([int(i) for i in range(3, 23)])])
    first = own.prefill(prompt, cache)
    at = torch.tensor([20])
    second = own.decode_step(torch.tensor([9]), at, at, cache, AttentionPlan(21, None))
    return torch.cat((first, second)).log_softmax(-1)


@pytest.mark.parametrize(("scheme", "most"), [(Scheme.INT8, 5e-3), (Scheme.FP8, 5e-2)])
def test_logits_move_little_and_do_move(scheme: Scheme, most: float) -> None:
    exact, other = logits(None), logits(scheme)
    divergence = (exact.exp() * (exact - other)).sum(-1)
    assert 0 < float(divergence.max()) < most


def native(folder, **wanted):
    return NativeEngine(engine_config(folder, engine=EngineName.NATIVE, **wanted))


@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.EAGER])
@pytest.mark.parametrize("kv", [KVDType.INT8, KVDType.FP8])
def test_a_chat_reuses_its_prefix_with_equal_answers(checkpoint, kv, attention):
    with native(checkpoint("qwen3_vl"), kv_dtype=kv, attention=attention) as engine:
        assert engine.effective.kv_dtype == {"int8": "int8", "fp8": "fp8-e4m3"}[kv]
        reused, anew = (answers_of_turns(engine, 24, forget=forget) for forget in (False, True))
    assert reused == anew


def test_modes_that_cannot_say_so_and_name_one_that_can(checkpoint):
    with pytest.raises(UnsupportedModeError, match="--kv-dtype int8 cannot run") as caught:
        native(checkpoint("qwen3_vl"), kv_dtype=KVDType.INT8, cache=Cache.DYNAMIC).load()
    assert "--cache static" in caught.value.hint
    with pytest.raises(UnsupportedModeError, match="--kv-dtype fp8 cannot run"):
        TransformersEngine(engine_config(checkpoint("qwen3_vl"), kv_dtype=KVDType.FP8))


@pytest.mark.parametrize("kv", [KVDType.INT8, KVDType.FP8])
def test_nearly_twice_the_tokens_fit(kv):
    def longest(kv_dtype):
        return plan_memory(
            hub_config("qwen3-vl-4b"), "qwen3-vl-4b", dtype=DType.BFLOAT16, model_limit=262144,
            wanted="auto", free_bytes=20 * 2**30, kv_dtype=kv_dtype,
        ).max_seq_len  # fmt: skip

    assert 1.8 < longest(kv) / longest(KVDType.AUTO) < 2


def test_bytes_are_those_of_the_tensors():
    cache = QuantizedKVCache(SHAPE.text, 1, 10, torch.bfloat16, CPU, Scheme.FP8)
    stored = sum(t.nbytes for t in (*cache.layers, *cache.scales))
    assert stored == 10 * native_kv_bytes(SHAPE, True, 2)
    plain, small = (decode_bytes(SHAPE, "none", 2, 1000, kv) for kv in ("bfloat16", "int8"))
    saved = 1000 * (native_kv_bytes(SHAPE, False, 2) - native_kv_bytes(SHAPE, True, 2))
    assert plain - small == saved


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compiled_step_sees_what_it_has_just_written(scheme: Scheme) -> None:
    cache = QuantizedKVCache(SHAPE.text, 1, 8, torch.float32, CPU, scheme)
    new = torch.randn(1, 1, 2 * SHAPE.text.num_kv_heads, SHAPE.text.head_dim)

    @functools.partial(torch.compile, backend="aot_eager", dynamic=False)
    def seen(slot: torch.Tensor) -> torch.Tensor:
        keys, values = cache.write(0, new, slot, 8)
        return torch.cat((keys, values), 1)

    try:
        compiled = seen(torch.tensor([3]))
    finally:
        torch.compiler.reset()
    assert torch.equal(compiled, torch.cat(cache.write(0, new, torch.tensor([3]), 8), 1))
    assert (compiled[:, :, 3] - new[0, 0]).abs().max() < 0.2
