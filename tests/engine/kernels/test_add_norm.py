"""The kernel that ends and begins blocks of a vision tower, against the plain operators."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.kernels.add_norm import AddNorm
from qwencli.engine.ops.decoder_ops import add_norm


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 144), (3, 1152)])
def test_sum_and_norm_are_those_of_the_plain_operators(dtype, biased, updated, rows, width):
    torch.manual_seed(rows)
    hidden, update = torch.randn(2, rows, width).to(dtype)
    weight, bias = (torch.randn(2, width) + torch.tensor([[1.0], [0.0]])).to(dtype)
    sums, norms = [], []
    for run in (add_norm, AddNorm()):
        into = hidden.clone()
        norms.append(run(into, update if updated else None, weight, bias if biased else None, 1e-6))
        sums.append(into)
    # Triton's interpreter cuts off where a GPU rounds.
    atol = 1e-5 if dtype is torch.float32 else 3e-2
    for found, expected in ((sums[1], sums[0]), (norms[1], norms[0])):
        torch.testing.assert_close(found, expected, atol=atol, rtol=atol)
