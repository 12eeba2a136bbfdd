from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.config import Attention
from qwencli.engine.ops import attention
from qwencli.engine.ops.attention import (
    ATTENTION,
    AttentionPlan,
    decode_mask,
    hidden_score,
    prompt_plan,
)
from tests import flash_attn_package

CPU = torch.device("cpu")


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, pads: list[int]
) -> torch.Tensor:
    """One query, one head at a time, from the definition."""
    out = torch.zeros_like(q)
    group = q.shape[2] // k.shape[1]
    for b in range(q.shape[0]):
        for s in range(q.shape[1]):
            for h in range(q.shape[2]):
                seen = slice(pads[b], start + s + 1)
                keys, values = k[b, h // group, seen], v[b, h // group, seen]
                weights = torch.softmax(keys @ q[b, s, h] / math.sqrt(q.shape[-1]), 0)
                out[b, s, h] = weights @ values
    return out.flatten(2)


def draw_case(data: st.DataObject, batch: int, length: int, start: int) -> list[torch.Tensor]:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    keys = torch.randn(2, batch, kv_heads, start + length + 3, 16)[..., : start + length, :]
    return [torch.randn(batch, length, kv_heads * group, 16), keys[0], keys[1]]


@pytest.mark.parametrize("name", [Attention.EAGER, Attention.SDPA])
@settings(max_examples=40)
@given(data=st.data())
def test_prompts_follow_the_definition(name: Attention, data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    start = data.draw(st.integers(0, 4)) if batch == 1 else 0
    pads = [0] * batch
    if batch > 1:
        pads = data.draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch))
    q, k, v = draw_case(data, batch, length, start)
    left_pads = torch.tensor(pads, dtype=torch.int32) if any(pads) else None
    plan = prompt_plan(start, length, k.shape[1], torch.float32, CPU, left_pads)
    got = ATTENTION[name](q, k, v, plan)
    assert got.isfinite().all()  # padding queries too: their keys must not poison later layers
    expected = plain(q, k, v, start, pads)
    for row, pad in enumerate(pads):
        torch.testing.assert_close(got[row, pad:], expected[row, pad:], atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(data=st.data())
def test_no_keys_have_stride_0_between_heads(data: st.DataObject) -> None:
    """torch's memory-efficient kernel takes that for a single query, of which one may be left of
    the last block: it then saw what the first one of all may see."""
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(2, 5))
    start = data.draw(st.integers(0, 4)) if batch == 1 else 0
    q, k, v = draw_case(data, batch, length, start)

    theirs = F.scaled_dot_product_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **modes: Any) -> torch.Tensor:
        assert 0 not in (k.stride(1), v.stride(1))
        return theirs(q, k, v, **modes)

    plan = prompt_plan(start, length, k.shape[1], torch.float32, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        got = ATTENTION[Attention.SDPA](q, k, v, plan)
    expected = plain(q, k, v, start, [0] * batch)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def lower_right(*arguments: Any) -> tuple[torch.Tensor]:
    """torch's flash attention as its signature and its causal rule are."""
    q, k, v, *spans, queries, keys, dropout, causal, debug = arguments
    assert spans == [None, None] and (queries, keys) == (q.shape[1], k.shape[1])
    assert (dropout, causal, debug) == (0.0, True, False)
    start = keys - queries
    heads = (x.transpose(1, 2) for x in (k, v))
    return (plain(q, *heads, start, [0] * len(q)).view(q.shape),)


@settings(max_examples=20)
@given(data=st.data())
def test_flash_attention_needs_no_mask_behind_a_prefix(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    start = data.draw(st.integers(0, 4))
    q, k, v = draw_case(data, batch, length, start)
    plan = prompt_plan(start, length, k.shape[1], torch.float32, CPU, flash=True)
    assert plan.mask is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "forward", lower_right)
        got = ATTENTION[Attention.SDPA](q, k, v, plan)
    expected = plain(q, k, v, start, [0] * batch)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_flash_attention_is_not_for_padded_rows() -> None:
    pads = torch.tensor([0, 1], dtype=torch.int32)
    plan = prompt_plan(0, 3, 1, torch.float32, CPU, pads, flash=True)
    assert plan.mask is not None and not plan.flash


@pytest.mark.parametrize("name", [Attention.EAGER, Attention.SDPA])
@settings(max_examples=30)
@given(data=st.data())
def test_a_step_over_a_longer_bucket_sees_its_own_slots_only(
    name: Attention, data: st.DataObject
) -> None:
    slot, beyond = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 5))
    q, k, v = draw_case(data, 2, 1, slot)
    pads = [0, data.draw(st.integers(0, slot))]
    left_pads = torch.tensor(pads, dtype=torch.int32) if any(pads) else None
    expected = plain(q, k, v, slot, pads)
    rest = torch.full((2, k.shape[1], beyond, 16), 50.0)  # old values of another request
    keys, values = torch.cat((k, rest), 2), torch.cat((v, rest), 2)
    slots = torch.arange(slot + 1 + beyond)
    mask = decode_mask(slots, torch.tensor([slot]), left_pads, torch.float32)
    got = ATTENTION[name](q, keys, values, AttentionPlan(len(slots), mask))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hidden_score_stays_finite_and_weighs_nothing(dtype: torch.dtype) -> None:
    scores = torch.tensor([-100.0, 0.0], dtype=dtype) + torch.tensor(
        [hidden_score(dtype), 0.0], dtype=dtype
    )
    assert scores.isfinite().all()
    assert torch.softmax(scores.float(), 0).tolist() == [0.0, 1.0]


@pytest.fixture
def package(tmp_path: Path) -> Iterator[None]:
    with flash_attn_package.installed(tmp_path):
        yield


def case_in_bf16(batch: int, length: int, start: int) -> list[torch.Tensor]:
    data = SimpleNamespace(draw=lambda strategy: 2)
    return [x.to(torch.bfloat16) for x in draw_case(data, batch, length, start)]  # type: ignore[arg-type]


@pytest.mark.usefixtures("package")
def test_flash_attention_is_called_as_its_documentation_says() -> None:
    flash = ATTENTION[Attention.FLASH]

    def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(got.float(), wanted.float(), atol=0.03, rtol=0.03)

    # A later piece of a prompt, a padded batch, and a step whose length is on the device.
    q, k, v = case_in_bf16(1, 3, 2)
    plan = prompt_plan(2, 3, 2, torch.bfloat16, CPU, flash=True)
    assert plan.mask is None
    close(flash(q, k, v, plan), plain(q, k, v, 2, [0]))
    q, k, v = case_in_bf16(2, 3, 0)
    pads = torch.tensor([0, 1], dtype=torch.int32)
    plan = prompt_plan(0, 3, 2, torch.bfloat16, CPU, pads)
    close(flash(q, k, v, plan)[1, 1:], plain(q, k, v, 0, [0, 1])[1, 1:])
    in_use = torch.tensor([2, 2], dtype=torch.int32)
    step = AttentionPlan(3, None, lengths=in_use, left_pads=pads)
    close(flash(q[:, :1], k, v, step), plain(q[:, :1], k, v, 1, [0, 1]))


@pytest.mark.usefixtures("package")
def test_a_compiled_step_calls_flash_attention_without_a_break() -> None:
    q, k, v = case_in_bf16(1, 1, 4)
    plan = AttentionPlan(5, None, lengths=torch.tensor([3], dtype=torch.int32))
    flash = ATTENTION[Attention.FLASH]
    compiled = torch.compile(lambda q: flash(q, k, v, plan) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), flash(q, k, v, plan) + 1)
    torch.library.opcheck(
        torch.ops.qwencli.flash_attn,
        (q, k.transpose(1, 2), v.transpose(1, 2), plan.lengths, None),
        test_utils=("test_schema", "test_faketensor"),
    )


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
) -> tuple[torch.Tensor, ...]:
    """torch's kernel for packed sequences, from its definition: q [N, H, D], k, v [M, KVH, D]."""
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32 and not dropout_p and not is_causal
    out = torch.zeros_like(q)
    for (q0, q1), (k0, k1) in zip(
        cum_seq_q.unfold(0, 2, 1).tolist(), cum_seq_k.unfold(0, 2, 1).tolist(), strict=True
    ):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        keys, values = (x[k0:k1].transpose(0, 1)[None] for x in (k, v))
        row = plain(q[None, q0:q1], keys, values, k1 - k0 - 1, [0])
        out[q0:q1] = row.view(q1 - q0, *q.shape[1:])
    return out, torch.empty(0)


def test_flash_decoding_sees_the_slots_that_the_device_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "forward", flash_forward)
    data = SimpleNamespace(draw=lambda strategy: 3)
    q, k, v = draw_case(data, 1, 1, 9)  # type: ignore[arg-type]
    spans = attention.Spans.on(CPU)
    spans.slots[1] = 6  # the slots after it are another request's
    got = ATTENTION[Attention.SDPA](q, k, v, AttentionPlan(10, None, spans=spans))
    torch.testing.assert_close(got, plain(q, k, v, 5, [0]), atol=1e-5, rtol=1e-5)


def test_only_a_gpu_has_torchs_flash_attention() -> None:
    assert not attention.can_flash_decode(32, 8, 128, torch.bfloat16, CPU)
