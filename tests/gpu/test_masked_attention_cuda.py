"""Prompts behind a prefix where attention takes a mask: no flash attention in float32."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.ops.attention import eager, prompt_plan, sdpa

CUDA = torch.device("cuda")
START = 18


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [(4, 2), (32, 8), (7, 1)])
@pytest.mark.parametrize("length", [2, 33, 64, 65, 129, 257, 300])
def test_each_query_sees_its_own_slot_and_all_before(dtype, heads, length):
    """A single query may be left of the last block that torch's kernel works on."""
    num_heads, kv_heads = heads
    generator = torch.Generator(CUDA).manual_seed(4)

    def drawn(*size):
        return torch.randn(*size, dtype=dtype, device=CUDA, generator=generator)

    kv_len = START + length
    keys, values = drawn(1, 2 * kv_heads, 512, 64).narrow(2, 0, kv_len).chunk(2, dim=1)
    q = drawn(1, length, num_heads, 64)
    plan = prompt_plan(START, length, kv_heads, dtype, CUDA)
    exact_plan = prompt_plan(START, length, kv_heads, torch.float64, CUDA)
    exact = eager(q.double(), keys.double(), values.double(), exact_plan)
    for attention in (sdpa, eager):
        found = attention(q, keys, values, plan).double()
        error = (found - exact).flatten(0, 1).norm(dim=1) / exact.flatten(0, 1).norm(dim=1)
        assert float(error.max()) < (1e-2 if dtype is torch.float16 else 1e-4)
