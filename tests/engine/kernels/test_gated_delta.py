"""Kernels of Gated DeltaNet against the plain operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.engine.kernels import gated_delta as kernels
from qwencli.engine.kernels.chunked_delta import ChunkedDelta
from qwencli.engine.ops import gated_delta as gd
from tests.engine.ops.test_gated_delta import (
    make_inputs,
    make_layer,
    make_rows,
    make_state,
    packed,
)

Tensor = torch.Tensor
CPU = torch.device("cpu")
# Triton's interpreter cuts off where a GPU rounds.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def options(num_warps):
    return {"PDL": False, "num_warps": num_warps}


STEP = kernels.DeltaStep(options)


def in_type(
    inputs: gd.DeltaInputs, layer: gd.GatedDelta, dtype: torch.dtype
) -> tuple[gd.DeltaInputs, gd.GatedDelta]:
    """Inputs side by side in one tensor, as one projection makes them."""
    parts = [inputs.qkv, inputs.z, inputs.a, inputs.b]
    wide = torch.cat(parts, 1).to(dtype).split([part.shape[1] for part in parts], 1)
    return gd.DeltaInputs(*wide), replace(layer, conv=layer.conv.to(dtype))


def state_in(dtype: torch.dtype) -> gd.DeltaState:
    state = make_state()
    drawn = torch.randn(state.conv.shape, generator=torch.Generator().manual_seed(5))
    return gd.DeltaState(drawn.to(dtype), state.recurrent.mul_(0.1))


def assert_same(found: gd.DeltaState, expected: gd.DeltaState, dtype: torch.dtype) -> None:
    assert torch.equal(found.conv, expected.conv)
    torch.testing.assert_close(
        found.recurrent, expected.recurrent, rtol=CLOSE[dtype], atol=CLOSE[dtype]
    )


@torch.inference_mode()
@pytest.mark.parametrize("cut", [kernels.WHOLE, kernels.IN_PARTS, kernels.StateCut(2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_rows_is_that_of_the_plain_operators(
    dtype: torch.dtype, cut: kernels.StateCut
) -> None:
    """Rows that begin, that go on, and one that is idle; states whole and cut up."""
    step = kernels.DeltaStep(options, cut)
    rows = make_rows([3, 1, 4, 2], [0, 2, 13, 6], [False, False, False, True])
    inputs, layer = in_type(make_inputs(4), make_layer(), dtype)
    expected_state, state = state_in(dtype), state_in(dtype)
    expected = gd.delta_decode(inputs, layer, expected_state, rows)
    found = step.decode(inputs, layer, state, rows)
    assert_same(state, expected_state, dtype)
    assert not found[3].any()
    torch.testing.assert_close(found[:3], expected[:3], rtol=CLOSE[dtype], atol=CLOSE[dtype])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 5])
def test_a_step_that_checks_drafts_is_that_of_the_plain_operators(
    dtype: torch.dtype, tokens: int
) -> None:
    rows = make_rows([3, 1, 2, 4], [1, 13, 6, 0], [False, False, True, False])
    busy = [0, 1, 3]
    inputs, layer = in_type(make_inputs(4 * tokens), make_layer(), dtype)
    states, results, kept = [], [], []
    accepted = torch.tensor([[tokens, 0], [1, 0], [0, 0], [2, 0]])[:, 0]
    for verify, adopt in (
        (gd.delta_verify, gd.adopt_accepted),
        (STEP.verify, kernels.adopt_accepted),
    ):
        keys, values = (layer.k_heads, layer.k_dim), (layer.v_heads, layer.v_dim)
        state = state_in(dtype)
        updates = gd.DeltaUpdates.empty(1, 1, 21, keys, values, CPU).shaped(4, tokens)
        own = updates.of_layer(0)
        out = verify(inputs, layer, state, rows, own)
        results.append(out.view(4, tokens, -1)[busy])
        states.append(state)
        kept.append(own)
        assert torch.equal(state.recurrent, state_in(dtype).recurrent)
        adopt(updates, state.recurrent[None], rows.slots, rows.positions + accepted, accepted)
    assert_same(states[1], states[0], dtype)
    torch.testing.assert_close(*results, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    for name in ("k", "delta", "g"):
        pair = [getattr(each, name)[busy] for each in kept]
        torch.testing.assert_close(*pair, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "alike"), [(torch.float32, False), (torch.float32, True), (torch.float16, False)]
)  # the interpreter multiplies no bfloat16
def test_prompts_are_those_of_the_plain_operators(dtype: torch.dtype, alike: bool) -> None:
    """One that begins and ends within a chunk, one that begins, and two that go on. Tokens that are
    alike and written whole are the hardest to solve for."""
    lengths, contexts, slots = [20, 70, 2, 65], [0, 0, 7, 1], torch.tensor([4, 1, 3, 2])
    drawn = make_inputs(sum(lengths))
    if alike:
        drawn = replace(drawn, qkv=drawn.qkv[:1].expand_as(drawn.qkv) + 0.1 * drawn.qkv)
        drawn = replace(drawn, a=drawn.a - 9, b=drawn.b + 9)
    inputs, layer = in_type(drawn, make_layer(), dtype)
    prompts = packed(lengths, contexts)
    expected_state, state = state_in(dtype), state_in(dtype)
    expected = gd.delta_prefill(inputs, layer, expected_state, prompts, slots)
    found = ChunkedDelta()(inputs, layer, state, prompts, slots)
    assert_same(state, expected_state, dtype)
    torch.testing.assert_close(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
