"""The fused kernels against the plain operators, through whole models, in Triton's interpreter."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwencli.config import Quantization, SamplingParams
from qwencli.engine.kernels import fused_ops as fused_module
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.kernels.tiles import AttentionTiles, GemvTiles, MatrixKind
from qwencli.engine.loading import weights
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import Fused, QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.models.shape_reader import read_shape
from tests.engine.native.tiny import CASES, VOCAB, configs

CPU = torch.device("cpu")
SLOTS = 160


def wide_tiles(matrix: MatrixKind) -> GemvTiles:
    """Few programs: the interpreter takes milliseconds for each."""
    return GemvTiles(64, 128, 1)


OWN = functools.partial(fused_ops, own_attention=True, tiles_of=wide_tiles)
TORCH_ATTENTION = functools.partial(fused_ops, own_attention=False, tiles_of=wide_tiles)


@pytest.fixture(autouse=True)
def two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of a sequence, so that they join."""
    monkeypatch.setattr(fused_module, "attention_tiles", lambda *_: AttentionTiles(64, 2, 1))


def model_of(
    config: dict[str, Any], fused: Fused | None, quantization: Quantization = Quantization.NONE
) -> QwenModel:
    shape = read_shape(config)
    loaded = weights.dummy(shape, torch.float32, CPU, quantization)
    scaled = {
        name: t * 5 if t.std() > 0 and t.dim() > 1 else t + 0.1 * torch.arange(len(t)) / len(t)
        for name, t in loaded.tensors.items()
    }
    matrices = {name: replace(m, scale=m.scale * 5) for name, m in loaded.matrices.items()}
    return QwenModel(shape, weights.LoadedWeights(scaled, (), matrices), SLOTS, fused=fused)


def prompt_of(length: int) -> list[int]:
    return [int(i) for i in torch.randint(0, VOCAB - 20, (length,), generator=_generator())]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@torch.inference_mode()
def logits_of(model: QwenModel, length: int, steps: int) -> torch.Tensor:
    """Logits [steps, V] of steps fed with fixed tokens after a prompt of `length`."""
    inputs = model.prepare([ModelPrompt(prompt_of(length), [])])
    cache = model.static_cache()
    model.prefill(inputs, cache)
    positions = inputs.next_positions.clone()
    rows = []
    for step in range(steps):
        plan = AttentionPlan(cache.length + 1, None)
        slot = torch.tensor([cache.length])
        rows.append(model.decode_step(torch.tensor([7 + step]), positions, slot, cache, plan)[0])
        rows[-1] = rows[-1].clone()
        cache.length += 1
        positions += 1
    return torch.stack(rows)


# Heads that only fill a group up to a power of two have no weights; what they give is not stored.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
@settings(
    max_examples=2,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_steps_give_the_logits_of_the_plain_operators(family: str, data: st.DataObject) -> None:
    config = data.draw(configs(family, data.draw(st.sampled_from(CASES))))
    length = data.draw(st.sampled_from((1, 2, 130)))
    own = data.draw(st.booleans())
    plain = logits_of(model_of(config, None), length, 3)
    fused = logits_of(model_of(config, OWN if own else TORCH_ATTENTION), length, 3)
    assert (plain - fused).abs().max() <= 1e-4 * plain.abs().max()


NARROW: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


# 192 columns are groups of 64, 96 of 32, and 72 are neither groups nor blocks of a vector.
@pytest.mark.parametrize("quantization", [q for q in Quantization if q is not Quantization.NONE])
def test_quantized_steps_give_the_logits_of_the_matrices_read_back(
    quantization: Quantization,
) -> None:
    narrow = 96 if quantization is Quantization.INT4 else 72
    config = NARROW | {"intermediate_size": narrow}
    plain = logits_of(model_of(config, None, quantization), 5, 2)
    fused = logits_of(model_of(config, OWN, quantization), 5, 2)
    # The kernels round the vector as well: to float16 for fp8, else to 8 bits.
    most = 2e-3 if quantization is Quantization.FP8 else 0.04
    assert (plain - fused).abs().max() <= most * plain.abs().max()


@torch.inference_mode()
def tokens_of(model: QwenModel, sampling: SamplingParams, stop_ids: list[int]) -> DecodeState:
    inputs = model.prepare([ModelPrompt(prompt_of(20), [])])
    state = DecodeState(model, model.static_cache(), SLOTS)
    state.begin(sampling, inputs.ids[0], stop_ids, inputs.next_positions)
    state.sample_first(model.prefill(inputs, state.cache))
    return state


@torch.inference_mode()
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_positions_and_the_end_are_those_of_the_plain_operators(
    penalty: float,
) -> None:
    from tests.models.test_shape_reader import TEXT

    sampling = SamplingParams(do_sample=False, repetition_penalty=penalty, max_new_tokens=40)
    states = [
        tokens_of(model_of({"model_type": "qwen2", **TEXT}, fused), sampling, [])
        for fused in (None, OWN)
    ]
    chosen: list[list[int]] = [[], []]
    for step in range(6):
        for own, state in zip(chosen, states, strict=True):
            plan = AttentionPlan(20 + step + 1, None)
            state.advance(state.kind, plan)
            own.append(int(state.token))
    assert chosen[0] == chosen[1]
    plain, fused = states
    for name in ("slot", "position", "step", "done"):
        assert torch.equal(getattr(plain, name), getattr(fused, name)), name
    if penalty != 1.0:
        assert torch.equal(plain.sampler.seen, fused.sampler.seen)

    # Once a stop token has been chosen, further steps change nothing.
    fused.stop_ids[0] = fused.token
    fused.done.fill_(True)
    before = [int(t) for t in (fused.token, fused.slot, fused.position, fused.step)]
    fused.advance(fused.kind, AttentionPlan(SLOTS, None))
    assert [int(t) for t in (fused.token, fused.slot, fused.position, fused.step)] == before


@torch.inference_mode()
def test_a_stop_token_ends_the_answer() -> None:
    from tests.models.test_shape_reader import TEXT

    sampling = SamplingParams(do_sample=False, max_new_tokens=40)
    config = {"model_type": "qwen2", **TEXT}
    state = tokens_of(model_of(config, OWN), sampling, [])
    state.advance(state.kind, AttentionPlan(SLOTS, None))
    second = int(state.token)
    state = tokens_of(model_of(config, OWN), sampling, [250, second])
    assert not bool(state.done)
    state.advance(state.kind, AttentionPlan(SLOTS, None))
    assert int(state.token) == second and bool(state.done)


def test_steps_through_experts_give_the_logits_of_the_plain_operators() -> None:
    """Layers with experts hand nothing over to the next one, nor take it."""
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = NARROW | experts | {"model_type": "qwen3_moe", "mlp_only_layers": [0]}
    plain = logits_of(model_of(config, None), 2, 2)
    fused = logits_of(model_of(config, TORCH_ATTENTION), 2, 2)
    assert (plain - fused).abs().max() <= 1e-4 * plain.abs().max()
