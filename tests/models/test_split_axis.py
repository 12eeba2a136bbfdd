"""Along which axis several GPUs could share each tensor: a share is that of a narrower model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwencli.models.builtin import hub_config
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import specs

SHARES = 2


def share_of(shape: ModelShape) -> ModelShape:
    """What one of several GPUs would have: fewer heads, narrower feed-forwards, fewer words."""
    text = shape.text
    delta, moe = text.delta, text.moe
    if delta is not None:
        heads = delta.num_k_heads // SHARES, delta.num_v_heads // SHARES
        delta = replace(delta, num_k_heads=heads[0], num_v_heads=heads[1])
    if moe is not None:
        moe = replace(
            moe,
            intermediate_size=moe.intermediate_size // SHARES,
            shared_intermediate_size=moe.shared_intermediate_size // SHARES,
        )
    text = replace(
        text,
        vocab_size=text.vocab_size // SHARES,
        num_heads=text.num_heads // SHARES,
        num_kv_heads=text.num_kv_heads // SHARES,
        intermediate_size=text.intermediate_size // SHARES,
        delta=delta,
        moe=moe,
    )
    return replace(shape, text=text)


@pytest.mark.parametrize(
    "alias",
    ["qwen3.5-9b", "qwen3.5-35b-a3b", "qwen3-vl-4b", "qwen3-vl-30b-a3b", "qwen2.5-vl-7b"],
)
def test_a_share_is_the_tensors_of_a_narrower_model(alias: str) -> None:
    whole = read_shape(hub_config(alias))
    if whole.text.mtp_layers:
        whole = whole.with_draft_head()
    axes = set()
    for spec, share in zip(specs(whole), specs(share_of(whole)), strict=True):
        axes.add(spec.split_axis)
        expected = list(spec.shape)
        if spec.split_axis is not None:
            expected[spec.split_axis] //= SHARES
        assert (share.name, list(share.shape)) == (spec.name, expected)
        # So has each of those that it is stacked of.
        for part, less in zip(spec.parts, share.parts, strict=True):
            sizes = [part.rows, part.columns]
            if spec.split_axis is not None:
                sizes[spec.split_axis] //= SHARES
            assert [less.rows, less.columns] == sizes, part.name
    assert axes == {None, 0, 1}
