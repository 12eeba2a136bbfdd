"""Kernels of Gated DeltaNet on a CUDA device, of the size that models have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.engine.cache.paged_kv import PackedPrompts
from qwencli.engine.kernels import gated_delta as kernels
from qwencli.engine.kernels.chunked_delta import ChunkedDelta
from qwencli.engine.kernels.fused_ops import Launch
from qwencli.engine.ops import gated_delta as gd

Tensor = torch.Tensor
CUDA = torch.device("cuda")
K_HEADS, DIM, RING, SLOTS = 4, 128, 12, 12
# Value heads for each key head, as models of 0.8B, 9B and 27B have.
GROUPS = (1, 2, 3)
STEP = kernels.DeltaStep(Launch.on(CUDA).options)


def make_layer(group: int, dtype: torch.dtype) -> gd.GatedDelta:
    torch.manual_seed(group)
    v_heads = group * K_HEADS
    channels = (2 * K_HEADS + v_heads) * DIM
    return gd.GatedDelta(
        K_HEADS, v_heads, DIM, DIM,
        torch.randn(channels, gd.TAPS, device=CUDA).mul(0.5).to(dtype),
        torch.rand(v_heads, device=CUDA).mul(16).log(),
        torch.rand(v_heads, device=CUDA),
        torch.rand(DIM, device=CUDA),
        1e-6,
    )  # fmt: skip


def make_inputs(layer: gd.GatedDelta, tokens: int, dtype: torch.dtype) -> gd.DeltaInputs:
    values = layer.v_heads * DIM
    sizes = [len(layer.conv), values, layer.v_heads, layer.v_heads]
    wide = torch.randn(tokens, sum(sizes), device=CUDA).to(dtype)
    return gd.DeltaInputs(*wide.split(sizes, 1))


def make_state(layer: gd.GatedDelta, dtype: torch.dtype) -> gd.DeltaState:
    make = torch.Generator(CUDA).manual_seed(7)
    conv = torch.randn(SLOTS, RING, len(layer.conv), device=CUDA, generator=make)
    states = torch.randn(SLOTS, layer.v_heads, DIM, DIM, device=CUDA, generator=make)
    return gd.DeltaState(conv.to(dtype), states * 0.1)


def rows_of(count: int) -> gd.DeltaRows:
    """The last one is idle, where there are several."""
    slots = torch.randperm(SLOTS, device=CUDA)[:count]
    idle = torch.arange(count, device=CUDA) == max(count - 1, 1)
    return gd.DeltaRows(slots, torch.arange(count, device=CUDA) * 3, idle)


def packed(lengths: list[int], contexts: list[int]) -> PackedPrompts:
    def starts(counts: list[int]) -> Tensor:
        return torch.tensor([0, *counts], device=CUDA).cumsum(0).to(torch.int32)

    seen = [length + context for length, context in zip(lengths, contexts, strict=True)]
    return PackedPrompts(lengths, contexts, starts(lengths), starts(seen), None, False)


def in_float32(
    inputs: gd.DeltaInputs, layer: gd.GatedDelta, state: gd.DeltaState
) -> tuple[gd.DeltaInputs, gd.GatedDelta, gd.DeltaState]:
    return (
        gd.DeltaInputs(*(each.float() for each in vars(inputs).values())),
        replace(layer, conv=layer.conv.float()),
        gd.DeltaState(state.conv.float(), state.recurrent.clone()),
    )


def assert_near(found: Tensor, expected: Tensor, limit: float) -> None:
    """By the length of the difference: of a value that happens to be small more is rounded off."""
    assert found.isfinite().all()
    off = (found.float() - expected.float()).norm() / expected.float().norm()
    assert off < limit, f"off by {off:.5f}"


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("cut", [kernels.WHOLE, kernels.IN_PARTS])
def test_steps_of_rows_are_those_of_the_plain_operators(count, cut, group, dtype):
    step = kernels.DeltaStep(Launch.on(CUDA).options, cut)
    layer, rows = make_layer(group, dtype), rows_of(count)
    inputs, state, before = (
        make_inputs(layer, count, dtype), make_state(layer, dtype), make_state(layer, dtype),
    )  # fmt: skip
    plain = in_float32(inputs, layer, state)
    expected = gd.delta_decode(*plain, rows)
    found = step.decode(inputs, layer, state, rows)
    busy = ~rows.idle
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    assert_near(found[busy], expected[busy], limit)
    assert_near(state.recurrent[rows.slots], plain[2].recurrent[rows.slots], limit)
    idle = rows.slots[rows.idle]
    assert torch.equal(state.recurrent[idle], before.recurrent[idle])
    assert torch.equal(state.conv.float(), plain[2].conv)


@torch.inference_mode()
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("tokens", [2, 4, 8])
def test_what_was_accepted_is_what_steps_do(tokens, group):
    """Within rounding: steps that check drafts add up in another order than those that do not."""
    dtype = torch.bfloat16
    layer, rows = make_layer(group, dtype), rows_of(3)
    inputs = make_inputs(layer, 3 * tokens, dtype)
    state, one_by_one = make_state(layer, dtype), make_state(layer, dtype)
    keys, values = (layer.k_heads, layer.k_dim), (layer.v_heads, layer.v_dim)
    updates = gd.DeltaUpdates.empty(1, 3, 8, keys, values, CUDA).shaped(3, tokens)
    found = STEP.verify(inputs, layer, state, rows, updates.of_layer(0))
    # The last one is idle.
    accepted = torch.tensor([tokens, 1, 0], device=CUDA)
    after = rows.positions + accepted
    kernels.adopt_accepted(updates, state.recurrent[None], rows.slots, after, accepted)
    for token in range(tokens):
        own = gd.DeltaInputs(*(each[token::tokens] for each in vars(inputs).values()))
        idle = rows.idle | (token >= accepted)
        step = gd.DeltaRows(rows.slots, rows.positions + token, idle)
        result = STEP.decode(own, layer, one_by_one, step)
        assert_near(found[token::tokens][~idle], result[~idle], 1e-4)
    assert_near(state.recurrent, one_by_one.recurrent, 1e-6)
    assert torch.equal(
        state.recurrent[rows.slots[2]], make_state(layer, dtype).recurrent[rows.slots[2]]
    )


@torch.inference_mode()
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_prompts_are_those_of_the_plain_operators(group, alike):
    dtype = torch.bfloat16
    lengths, contexts = [100, 1, 300, 64, 129], [0, 5, 0, 64, 1]
    layer = make_layer(group, dtype)
    inputs = make_inputs(layer, sum(lengths), dtype)
    if alike:  # tokens of a plain part of a picture, written whole and kept
        same = inputs.qkv[:1] + 0.05 * inputs.qkv
        inputs = replace(inputs, qkv=same, a=inputs.a - 9, b=inputs.b + 9)
    state, slots = make_state(layer, dtype), torch.randperm(SLOTS, device=CUDA)[:5]
    plain = in_float32(inputs, layer, state)
    prompts = packed(lengths, contexts)
    expected = gd.delta_prefill(*plain, prompts, slots)
    found = ChunkedDelta()(inputs, layer, state, prompts, slots)
    assert_near(found, expected, 3e-2 if alike else 1e-2)
    assert_near(state.recurrent[slots], plain[2].recurrent[slots], 3e-2 if alike else 1e-2)
    assert torch.equal(state.conv.float(), plain[2].conv)


@torch.inference_mode()
def test_steps_after_a_prompt_go_on_from_its_state():
    dtype = torch.bfloat16
    layer = make_layer(2, dtype)
    inputs, state, by_steps = (
        make_inputs(layer, 90, dtype), make_state(layer, dtype), make_state(layer, dtype),
    )  # fmt: skip
    slot = torch.tensor([3], device=CUDA)
    parts = [gd.DeltaInputs(*(x[:80] for x in vars(inputs).values()))]
    results = [ChunkedDelta()(parts[0], layer, state, packed([80], [0]), slot)]
    no = torch.zeros(1, dtype=torch.bool, device=CUDA)
    expected = []
    for token in range(90):
        own = gd.DeltaInputs(*(x[token : token + 1] for x in vars(inputs).values()))
        rows = gd.DeltaRows(slot, torch.tensor([token], device=CUDA), no)
        expected.append(STEP.decode(own, layer, by_steps, rows))
        if token >= 80:
            results.append(STEP.decode(own, layer, state, rows))
    assert_near(torch.cat(results), torch.cat(expected), 1e-2)
    assert_near(state.recurrent[3], by_steps.recurrent[3], 1e-2)


@torch.inference_mode()
def test_a_graph_repeats_a_step_and_reads_its_rows_on_the_device():
    dtype = torch.bfloat16
    layer, rows = make_layer(2, dtype), rows_of(4)
    inputs, state = make_inputs(layer, 4, dtype), make_state(layer, dtype)
    STEP.decode(inputs, layer, make_state(layer, dtype), rows)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = STEP.decode(inputs, layer, state, rows)
    expected_state = make_state(layer, dtype)
    for _ in range(3):
        rows.slots.copy_(torch.randperm(SLOTS, device=CUDA)[:4])
        rows.positions.add_(1)
        graph.replay()
        expected = STEP.decode(inputs, layer, expected_state, rows)
        assert torch.equal(out, expected)
    assert torch.equal(state.recurrent, expected_state.recurrent)
