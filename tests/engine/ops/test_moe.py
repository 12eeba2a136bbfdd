"""The reference of a mixture of experts against the block of transformers, in float32."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.engine.ops import moe
from qwencli.engine.ops.moe import Routing, choose_experts, mixture

HIDDEN, WIDTH = 24, 16


def block_of(config: dict[str, int]) -> torch.nn.Module:
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, **config}
    made = transformers.Qwen3_5MoeTextConfig(**sizes, experts_implementation="eager")
    block = Qwen3_5MoeSparseMoeBlock(made).float()
    torch.manual_seed(sum(config.values()))
    for parameter in block.parameters():
        parameter.data.normal_(0.0, 0.4)
    return block


@settings(max_examples=8, derandomize=True, database=None)
@given(data=st.data())
@torch.inference_mode()
def test_the_block_of_transformers_gives_the_same(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, count))
    width = data.draw(st.sampled_from((WIDTH, 2 * WIDTH, 10)))
    sizes = {"num_experts": count, "num_experts_per_tok": top_k}
    block = block_of(sizes | {"shared_expert_intermediate_size": width})
    weights = dict(block.state_dict())
    router = torch.cat((weights["gate.weight"], weights["shared_expert_gate.weight"]))
    gate_up = weights["experts.gate_up_proj"].flatten(0, 1)
    down = weights["experts.down_proj"].flatten(0, 1)
    own = torch.cat([weights[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up")])
    back = weights["shared_expert.down_proj.weight"]
    routing = Routing(router, count, top_k, True, 0, (own.t(), back.t()))
    if width == WIDTH:
        gate_up, down = torch.cat((gate_up, own)), torch.cat((down, back))
        routing = Routing(router, count, top_k, True, 1)
    x = torch.randn(data.draw(st.integers(1, 7)), HIDDEN)
    expected = block(x[None])[0]
    got = mixture(x, gate_up.t(), down.t(), routing)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_what_graphs_run_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert on all tokens, where nobody may ask which ones were chosen."""
    torch.manual_seed(0)
    router, x = torch.randn(5, HIDDEN), torch.randn(6, HIDDEN)
    gate_up, down = torch.randn(HIDDEN, 5 * 2 * WIDTH), torch.randn(WIDTH, 5 * HIDDEN)
    routing = Routing(router, 5, 2, False)
    expected = mixture(x, gate_up, down, routing)
    monkeypatch.setattr(moe, "HOST", "no device")
    torch.testing.assert_close(mixture(x, gate_up, down, routing), expected, atol=1e-3, rtol=0)


def test_weights_that_are_not_renormalized_are_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.5]])
    routing = Routing(torch.zeros(3, 1), 3, 2, False, 1)
    weights, experts = choose_experts(logits, routing)
    likes = logits[0, :3].softmax(0)
    assert experts.tolist() == [[1, 2, 3]]
    assert weights[0].tolist() == pytest.approx(
        [likes[1].item(), likes[2].item(), logits[0, 3].sigmoid().item()]
    )
