"""Prompts beside fused steps: matrices read back by the kernel, and the head of the steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.config import Quantization
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.ops.decoder_ops import prompt_ops, qk_norm_rope_store
from qwencli.engine.quant.quantized_tensor import QuantizedTensor
from tests.engine.kernels.test_fused_ops import NARROW, OWN, model_of, prompt_of

MODES = [mode for mode in Quantization if mode is not Quantization.NONE]


def prefilled(model: QwenModel, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and keys and values of all layers, of prompts of equal length."""
    cache = model.static_cache(len(prompts))
    logits = model.prefill(model.prepare([ModelPrompt(prompt) for prompt in prompts]), cache)
    return logits, torch.stack(list(cache.layers))


@torch.inference_mode()
@pytest.mark.parametrize("mode", Quantization)
def test_a_prompt_computes_with_the_matrices_that_plain_operators_read_back(
    mode: Quantization,
) -> None:
    prompts = [prompt_of(9), prompt_of(10)[1:]]
    plain_logits, plain = prefilled(model_of(NARROW, None, mode), prompts)
    model = model_of(NARROW, OWN, mode)
    # The heads' kernel rounds elsewhere: see test_heads.
    model.prompt_ops = prompt_ops(replace(model.step_ops, qk_norm_rope_store=qk_norm_rope_store))
    own_logits, own = prefilled(model, prompts)
    assert torch.equal(own, plain) and plain.abs().sum() > 0
    # The vector that a quantized head meets is rounded to eight bits.
    off = (own_logits - plain_logits).norm() / plain_logits.norm()
    assert off < 0.02
    assert (off > 0) == (mode is not Quantization.NONE)


@torch.inference_mode()
@pytest.mark.parametrize("mode", MODES)
def test_a_prompts_logits_are_those_of_a_steps_head(mode: Quantization) -> None:
    model = model_of(NARROW, OWN, mode)
    norm, head = model.decoder.norm, model.decoder.head
    # Rows that lie apart, as the last ones of several prompts do.
    hidden = torch.randn(6, 192, generator=torch.Generator().manual_seed(3))[::3]
    got = model.prompt_ops.norm_head(hidden, norm, head)
    kept = got.clone()
    assert torch.equal(got, model.step_ops.norm_head(hidden.clone(), norm, head))
    # A caller may keep them while steps run.
    cache = model.static_cache()
    zero = torch.tensor([0])
    model.decode_step(torch.tensor([3]), zero, zero, cache, AttentionPlan(1, None))
    assert torch.equal(got, kept)


@torch.inference_mode()
@pytest.mark.parametrize(("rows", "is_read_as_stored"), [(1, False), (8, False), (9, True)])
def test_a_quantized_head_is_read_back_for_more_rows_than_a_step_has(
    rows: int, is_read_as_stored: bool
) -> None:
    model = model_of(NARROW, OWN, Quantization.INT8)
    sizes: list[int] = []

    def noted(matrix: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(matrix.rows)
        return matrix.dequantize(dtype)

    ops = prompt_ops(replace(model.step_ops, dequantize=noted))
    hidden = torch.randn(rows, 192, generator=torch.Generator().manual_seed(4))
    logits = ops.norm_head(hidden, model.decoder.norm, model.decoder.head)
    assert sum(sizes) == (301 if is_read_as_stored else 0)
    head = model.decoder.head
    assert isinstance(head, QuantizedTensor)
    exact = model.decoder.norm(hidden) @ head.dequantize(torch.float32).t()
    assert (logits - exact).norm() < (1e-5 if is_read_as_stored else 0.02) * exact.norm()
