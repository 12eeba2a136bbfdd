"""Kernels whose bits do not depend on the rows, in Triton's interpreter; see also tests/gpu."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwencli.engine.kernels.batch_invariant import ROWS, batch_invariant_ops, product
from qwencli.engine.quant.quantized_tensor import Scheme
from tests.engine.kernels.test_fused_ops import OWN
from tests.engine.ops.test_batch_invariant import QUANTIZED, Rows, model_of, texts_of

SMALL = QUANTIZED | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SMALL |= {"head_dim": 32, "vocab_size": 290}


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's product rounds by a row's place in the tile, which a matrix unit does not."""

    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        return np.add.reduce(a[:, :, None].astype(dtype) * b[None].astype(dtype), axis=1)

    monkeypatch.setattr(np, "matmul", matmul)


@torch.inference_mode()
@pytest.mark.parametrize(("depth", "width"), [(96, 70), (160, 33)])
def test_a_rows_product_has_the_same_bits_among_any_others(depth: int, width: int) -> None:
    generator = torch.Generator().manual_seed(depth)
    x = torch.randn(ROWS + 3, depth, generator=generator)
    matrix = torch.randn(width, depth, generator=generator).t()
    whole = product(x, matrix)
    torch.testing.assert_close(whole, x @ matrix, rtol=1e-4, atol=1e-4)
    for rows in (1, 2, 8, 9, ROWS):
        assert torch.equal(product(x[:rows], matrix), whole[:rows])
        assert torch.equal(product(x[-rows:], matrix), whole[-rows:])


@torch.inference_mode()
@pytest.mark.parametrize("kv", [None, Scheme.FP8])
def test_tokens_give_the_same_bits_in_a_mix_and_nearly_the_reference(kv: Scheme | None) -> None:
    """A long row beside short ones, cut prompts, and steps of several rows."""
    texts = texts_of([5, 67, 9])
    model = model_of(SMALL, kv=kv, fused=OWN, batch_invariant=batch_invariant_ops)
    assert model.reads_lengths
    mix = Rows(model, texts)
    mix.prompts([(2, 3), (1, 66)])
    mix.step([1, 2])
    mix.prompts([(0, 4)])
    mix.step([2, 0, 1])
    found = mix.finish()
    reference = Rows(model_of(SMALL, kv=kv), texts).finish()
    for text, own, near in zip(texts, found, reference, strict=True):
        (alone,) = Rows(model, [text]).finish()
        assert torch.equal(own, alone)
        torch.testing.assert_close(own, near, rtol=2e-2, atol=2e-3)
