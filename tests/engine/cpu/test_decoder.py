"""The CPU's own decode step against the reference operators, which it must equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from qwencli.config import Attention
from qwencli.engine.cpu import attention as host_attention
from qwencli.engine.cpu import decoder as cpu_decoder
from qwencli.engine.cpu.attention import GRAIN
from qwencli.engine.cpu.decoder import CpuDecoder
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.models.shape_reader import read_shape
from tests.engine.native import tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-4
MAX_SEQ_LEN = 3 * GRAIN + 5
ONE_KV_HEAD: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}


def random_model(config: dict[str, Any], attention: Attention) -> QwenModel:
    """Every tensor random, norms and biases too."""
    torch.manual_seed(0)
    shape = read_shape(config)
    loaded = weights.dummy(shape, torch.float32, CPU)
    for tensor in loaded.tensors.values():
        tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return QwenModel(shape, loaded, MAX_SEQ_LEN, attention)


@pytest.fixture(params=["one core", "teams"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as small, or nothing does, whatever the machine."""
    monkeypatch.setattr(cpu_decoder, "_teams_are_quick", lambda: False)
    for module in (cpu_decoder, host_attention):
        monkeypatch.setattr(module, "ONE_CORE_VALUES", 2**30 if request.param == "one core" else 0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
@pytest.mark.parametrize("case", tiny.CASES, ids=lambda case: f"groups of {case.groups}")
@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.EAGER])
def test_steps_equal_the_reference(family: str, attention: Attention, case: tiny.Case) -> None:
    @settings(max_examples=1, derandomize=True, database=None)
    @given(config=tiny.configs(family, case))
    @torch.inference_mode()
    def check(config: dict[str, Any]) -> None:
        model = random_model(config, attention)
        caches = [model.static_cache(), model.static_cache()]
        host = CpuDecoder(model.decoder, model.rope, caches[1], attention, True)
        for layer in caches[1].layers:
            layer.fill_(9.0)  # what another request left behind
        # A long prompt, whose steps cross two lengths of views, and then a short one.
        for length, steps in ((2 * GRAIN - 2, GRAIN + 4), (3, 4)):
            inputs = model.prepare([ModelPrompt(range(1, length + 1))])
            for cache in caches:
                cache.truncate(0)
                model.prefill(inputs, cache)
            for slot in range(length, length + steps):
                token, position = slot * 7 % model.shape.text.vocab_size, slot - 1
                expected = model.decode_step(
                    torch.tensor([token]),
                    torch.tensor([position]),
                    torch.tensor([slot]),
                    caches[0],
                    AttentionPlan(slot + 1, None),
                )
                got = host.logits(token, position, slot)
                torch.testing.assert_close(got, expected[0], atol=TOLERANCE, rtol=0)
        written = [cache.layers[-1][:, :, : length + steps] for cache in caches]
        torch.testing.assert_close(*written, atol=TOLERANCE, rtol=0)

    check()


@torch.inference_mode()
def test_attention_changes_hands_where_the_context_gets_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step before the change, the first after it, and one of a shorter context again."""
    monkeypatch.setattr(host_attention, "ONE_CORE_VALUES", 2 * 64 * 8)  # eight slots
    model = random_model(ONE_KV_HEAD, Attention.SDPA)
    caches = [model.static_cache(), model.static_cache()]
    host = CpuDecoder(model.decoder, model.rope, caches[1], Attention.SDPA, True)
    for slot in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 7):
        at = torch.tensor([slot])
        expected = model.decode_step(at, at, at, caches[0], AttentionPlan(slot + 1, None))
        torch.testing.assert_close(
            host.logits(slot, slot, slot), expected[0], atol=TOLERANCE, rtol=0
        )


@torch.inference_mode()
def test_attention_stands_scores_that_no_exponential_holds() -> None:
    model = random_model({**ONE_KV_HEAD, "model_type": "qwen2"}, Attention.SDPA)
    for layer in model.decoder.layers:
        assert isinstance(layer.qkv, torch.Tensor)
        layer.qkv.mul_(30.0)  # scores of several hundred
    host = CpuDecoder(model.decoder, model.rope, model.static_cache(), Attention.SDPA, True)
    for slot in range(4):
        assert host.logits(slot, slot, slot).isfinite().all()


@torch.inference_mode()
def test_the_last_slot_of_the_cache_can_be_used() -> None:
    model = random_model(ONE_KV_HEAD, Attention.SDPA)
    host = CpuDecoder(model.decoder, model.rope, model.static_cache(), Attention.SDPA, True)
    assert host.logits(1, MAX_SEQ_LEN - 1, MAX_SEQ_LEN - 1).isfinite().all()
