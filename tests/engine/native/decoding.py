"""Runs the native model token by token, as the generation half does without graphs."""

from __future__ import annotations

import torch

from qwencli.engine.cache.kv_cache import KVCache
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import PromptInputs
from qwencli.engine.ops.attention import AttentionPlan, decode_mask


def decode(
    model: QwenModel, inputs: PromptInputs, cache: KVCache, tokens: torch.Tensor
) -> list[torch.Tensor]:
    """Logits of the prompt and of each step, fed with the columns of `tokens` [B, steps]."""
    logits = [model.prefill(inputs, cache)]
    positions = inputs.next_positions.clone()
    for step in range(tokens.shape[1] - 1):
        slot = torch.tensor([cache.length])
        cache.length += 1
        mask = None
        if inputs.left_pads is not None:
            mask = decode_mask(torch.arange(cache.length), slot, inputs.left_pads, model.dtype)
        plan = AttentionPlan(cache.length, mask)
        logits.append(model.decode_step(tokens[:, step], positions, slot, cache, plan))
        positions += 1
    return logits
