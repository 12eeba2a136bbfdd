"""Gated DeltaNet against transformers, and its ways to the same state against each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qwencli.engine.cache.paged_kv import PackedPrompts
from qwencli.engine.ops import gated_delta as gd

Tensor = torch.Tensor
K_HEADS, V_HEADS, K_DIM, V_DIM, RING, SLOTS = 2, 4, 16, 32, 8, 5
CHANNELS = 2 * K_HEADS * K_DIM + V_HEADS * V_DIM


def make_layer(seed: int = 0) -> gd.GatedDelta:
    make = torch.Generator().manual_seed(seed)
    return gd.GatedDelta(
        k_heads=K_HEADS,
        v_heads=V_HEADS,
        k_dim=K_DIM,
        v_dim=V_DIM,
        conv=torch.randn(CHANNELS, gd.TAPS, generator=make),
        a_log=torch.rand(V_HEADS, generator=make).mul(16).log(),
        dt_bias=torch.rand(V_HEADS, generator=make),
        norm=torch.rand(V_DIM, generator=make),
        eps=1e-6,
    )


def make_inputs(tokens: int, seed: int = 1) -> gd.DeltaInputs:
    make = torch.Generator().manual_seed(seed)
    sizes = (CHANNELS, V_HEADS * V_DIM, V_HEADS, V_HEADS)
    return gd.DeltaInputs(*(torch.randn(tokens, size, generator=make) for size in sizes))


def part_of(inputs: gd.DeltaInputs, tokens: slice) -> gd.DeltaInputs:
    return gd.DeltaInputs(inputs.qkv[tokens], inputs.z[tokens], inputs.a[tokens], inputs.b[tokens])


def make_state() -> gd.DeltaState:
    """As others left it."""
    return gd.DeltaState(
        torch.full((SLOTS, RING, CHANNELS), 7.0), torch.full((SLOTS, V_HEADS, K_DIM, V_DIM), 7.0)
    )


def make_rows(slots: list[int], positions: list[int], idle: list[bool]) -> gd.DeltaRows:
    return gd.DeltaRows(torch.tensor(slots), torch.tensor(positions), torch.tensor(idle))


def packed(lengths: list[int], contexts: list[int]) -> PackedPrompts:
    def starts(counts: list[int]) -> Tensor:
        return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)

    seen = [length + context for length, context in zip(lengths, contexts, strict=True)]
    return PackedPrompts(lengths, contexts, starts(lengths), starts(seen), None, False)


def decoded(
    inputs: gd.DeltaInputs, layer: gd.GatedDelta, state: gd.DeltaState, slot: int = 1
) -> Tensor:
    steps = [
        gd.delta_decode(
            part_of(inputs, slice(n, n + 1)), layer, state, make_rows([slot], [n], [False])
        )
        for n in range(len(inputs.qkv))
    ]
    return torch.cat(steps)


class Given(torch.nn.Module):
    """A projection whose result is known."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: Tensor) -> Tensor:
        return self.result


def test_the_layer_is_that_of_transformers() -> None:
    """With the projections replaced by the identity, which leaves all that is done here."""
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    layer, inputs = make_layer(), make_inputs(150)
    config = SimpleNamespace(
        hidden_size=1, linear_num_value_heads=V_HEADS, linear_num_key_heads=K_HEADS,
        linear_key_head_dim=K_DIM, linear_value_head_dim=V_DIM, linear_conv_kernel_dim=gd.TAPS,
        hidden_act="silu", rms_norm_eps=layer.eps, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = modeling.Qwen3_5GatedDeltaNet(config, 0)
    theirs.conv1d.weight.data = layer.conv[:, None]
    theirs.A_log.data, theirs.dt_bias.data = layer.a_log, layer.dt_bias
    theirs.norm.weight.data = layer.norm
    for name in ("qkv", "z", "a", "b"):
        setattr(theirs, f"in_proj_{name}", Given(getattr(inputs, name)[None]))
    theirs.out_proj = torch.nn.Identity()
    with torch.no_grad():
        expected = theirs(torch.zeros(1, 150, 1))[0]
    ours = gd.delta_prefill(inputs, layer, make_state(), packed([150], [0]), torch.tensor([2]))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(inputs, layer, make_state()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 2, 64, 65])
def test_prompts_side_by_side_and_in_parts_leave_what_steps_leave(cut: int) -> None:
    layer, first, second = make_layer(), make_inputs(70), make_inputs(10, seed=2)
    by_steps, by_chunks = make_state(), make_state()
    expected = torch.cat((decoded(first, layer, by_steps, 3), decoded(second, layer, by_steps, 1)))

    def run(parts: list[gd.DeltaInputs], lengths: list[int], contexts: list[int]) -> Tensor:
        both = gd.DeltaInputs(
            *(torch.cat([getattr(p, name) for p in parts]) for name in ("qkv", "z", "a", "b"))
        )
        slots = torch.tensor([3, 1])[: len(lengths)]
        return gd.delta_prefill(both, layer, by_chunks, packed(lengths, contexts), slots)

    begun = run([part_of(first, slice(cut))], [cut], [0])
    rest = run([part_of(first, slice(cut, None)), second], [70 - cut, 10], [cut, 0])
    torch.testing.assert_close(torch.cat((begun, rest)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_chunks.recurrent, by_steps.recurrent, rtol=1e-4, atol=1e-4)
    after = make_rows([3, 1], [70, 10], [False, False])
    token = make_inputs(2, seed=3)
    torch.testing.assert_close(
        gd.delta_decode(token, layer, by_chunks, after),
        gd.delta_decode(token, layer, by_steps, after),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
def test_rejected_drafts_leave_no_trace(accepted: int) -> None:
    layer, inputs = make_layer(), make_inputs(14)
    by_steps, by_drafts = make_state(), make_state()
    expected = decoded(inputs, layer, by_steps)
    decoded(part_of(inputs, slice(5)), layer, by_drafts)
    # A row beside it is idle.
    rows = make_rows([1, 2], [5, 3], [False, True])
    wrong = make_inputs(8, seed=4)
    for name in ("qkv", "z", "a", "b"):
        getattr(wrong, name)[:accepted] = getattr(inputs, name)[5 : 5 + accepted]
    keys, values = (layer.k_heads, layer.k_dim), (layer.v_heads, layer.v_dim)
    made = gd.DeltaUpdates.empty(1, 1, 9, keys, values, torch.device("cpu"))
    updates = made.shaped(2, 4)
    out = gd.delta_verify(wrong, layer, by_drafts, rows, updates.of_layer(0))
    torch.testing.assert_close(out[:accepted], expected[5 : 5 + accepted])
    before = by_drafts.recurrent.clone()
    counts = torch.tensor([accepted, 0])
    after = rows.positions + counts
    gd.adopt_accepted(updates, by_drafts.recurrent[None], rows.slots, after, counts)
    assert torch.equal(by_drafts.recurrent[2:], before[2:])
    # Goes on as if nothing had been drafted.
    for n in range(5 + accepted, 14):
        own = part_of(inputs, slice(n, n + 1))
        step = gd.delta_decode(own, layer, by_drafts, make_rows([1], [n], [False]))
        torch.testing.assert_close(step, expected[n : n + 1])
    torch.testing.assert_close(by_drafts.recurrent[1], by_steps.recurrent[1])


def test_idle_rows_keep_their_states() -> None:
    layer, state = make_layer(), make_state()
    before = gd.DeltaState(state.conv.clone(), state.recurrent.clone())
    gd.delta_decode(make_inputs(2), layer, state, make_rows([1, 4], [9, 2], [True, False]))
    others = [0, 1, 2, 3]
    assert torch.equal(state.conv[others], before.conv[others])
    assert torch.equal(state.recurrent[others], before.recurrent[others])
    assert not torch.equal(state.recurrent[4], before.recurrent[4])
