"""Attention over a quantized cache: the kernel against the plain operators, which read it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwencli.engine.cache.kv_cache import QuantizedKVCache
from qwencli.engine.kernels import fused_ops as fused_module
from qwencli.engine.kernels.tiles import AttentionTiles
from qwencli.engine.native.model import Fused
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan, decode_mask
from qwencli.engine.ops.decoder_ops import Step
from qwencli.engine.quant.quantized_tensor import Scheme
from tests.engine.kernels.test_fused_ops import OWN, model_of, prompt_of
from tests.engine.kernels.test_skinny_gemm import config, relative

SCHEMES = [Scheme.INT8, Scheme.FP8]


@pytest.fixture(autouse=True)
def two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of a sequence, so that they join."""
    monkeypatch.setattr(fused_module, "attention_tiles", lambda *_: AttentionTiles(64, 2, 1))


@torch.inference_mode()
def answer(
    shape: dict[str, Any], fused: Fused | None, scheme: Scheme | None, prompt: list[int], size: int
) -> tuple[torch.Tensor, QuantizedKVCache]:
    """Logits [S, V] of two steps of `size` tokens after the prompt, and the cache."""
    model = model_of(shape, fused)
    model.kv = scheme
    inputs = model.prepare([ModelPrompt(prompt)])
    cache = model.static_cache()
    model.prefill(inputs, cache)
    positions, rows = inputs.next_positions.clone(), []
    for start in range(0, 2 * size, size):
        fed = torch.arange(20 + start, 20 + start + size)
        slots = torch.arange(cache.length, cache.length + size)
        cache.length += size
        mask = decode_mask(torch.arange(cache.length), slots, None, torch.float32)
        plan = AttentionPlan(cache.length, mask)
        rows.append(model.decode_step(fed, positions, slots[:1], cache, plan).clone())
        positions += size
    return torch.cat(rows), cache


# Lanes that only fill up to a power of two have no weights; what they give is not stored.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "length", "size", "scheme"),
    [
        (4, 2, 64, 70, 1, Scheme.INT8),
        (4, 2, 64, 70, 4, Scheme.FP8),
        (3, 1, 32, 2, 1, Scheme.FP8),
        (3, 1, 32, 2, 4, Scheme.INT8),
        (5, 1, 128, 120, 1, Scheme.INT8),
        (5, 1, 128, 120, 4, Scheme.FP8),
    ],
)
def test_steps_store_and_read_what_the_plain_operators_do(
    heads: int, kv_heads: int, dim: int, length: int, size: int, scheme: Scheme
) -> None:
    shape, prompt = config(heads, kv_heads, dim), prompt_of(length)
    exact, _ = answer(shape, None, None, prompt, size)
    plain, cache = answer(shape, None, scheme, prompt, size)
    own, other = answer(shape, OWN, scheme, prompt, size)
    # A key that lies between two stored values may fall on either side in either, and what comes
    # after it moves a little then.
    for left, right in zip(cache.layers, other.layers, strict=True):
        apart = (left.float() != right.float()).sum(dim=-1)
        assert int(apart.sum()) <= 8
    for left, right in zip(cache.scales, other.scales, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=0)
    assert relative(own, plain) < 2e-3
    assert relative(plain, exact) > 3 * relative(own, plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keys_of_zeros_and_of_any_size_are_stored(scheme: Scheme) -> None:
    shape = config(2, 1, 32)
    model = model_of(shape, OWN)
    model.kv = scheme
    with torch.inference_mode():
        cache = model.static_cache()
        layer = model.decoder.layers[0]
        at = torch.tensor([0])
        qkv = torch.zeros(1, 4 * 32)
        qkv[0, 96:] = torch.linspace(-3e4, 3e4, 32)  # the value; its key is zeros
        step = Step(
            batch=1, length=1, rope=None, slots=at, plan=AttentionPlan(1, None), cache=cache,
            attention=model._attend, ops=model.step_ops, positions=at,
        )  # fmt: skip
        seen = model.step_ops.attend(qkv, layer, step).view(2, 32)
    keys, values = (row.float()[0, 0] for row in cache.layers[0][:, :, :1].split(1, dim=1))
    assert torch.equal(keys[0], torch.zeros(32))
    stored = values[0] * cache.scales[0][0, 1, 0]
    torch.testing.assert_close(seen, stored.expand(2, 32), rtol=1e-5, atol=0)
    assert float((stored - qkv[0, 96:]).abs().max()) < 3e4 * (0.005 if scheme == "int8" else 0.04)
