"""The head that drafts tokens, in kernels, against plain operators."""

from __future__ import annotations

import functools

import pytest
import torch

from qwencli.config import Quantization
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.layers.draft_head import draft_projection
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.spec_decode.mtp import ChosenTokens, draft
from qwencli.models.shape_reader import read_shape
from tests.engine.kernels.test_hybrid_step import CONFIG
from tests.engine.kernels.test_skinny_gemm import WITH_IDLE_LANES

CPU = torch.device("cpu")
SIZE, DRAFTS = 2, 2


def drafting_model(quantization: Quantization, fused: bool) -> QwenModel:
    shape = read_shape(CONFIG).with_draft_head()
    loaded = weights.dummy(shape, torch.float32, CPU, quantization)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in loaded.tensors.items():
        if "norm" in name:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
        elif not name.endswith(("decay_log", "decay_bias")):
            tensor.mul_(5)
    own = functools.partial(fused_ops, own_attention=True) if fused else None
    model = QwenModel(shape, loaded, 200, fused=own)
    model.rope.reach(200)
    assert model.draft_head is not None
    if not fused:  # in 4 bits, as kernels have it
        model.draft_head._projection = draft_projection(model.decoder.head)
    return model


@torch.inference_mode()
@WITH_IDLE_LANES
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize(
    ("rows", "quantization"),
    [
        (1, Quantization.NONE),
        (2, Quantization.INT4),
        (5, Quantization.NONE),
    ],
)
def test_drafts_are_those_of_plain_operators(rows: int, quantization: Quantization) -> None:
    """Behind a step of two tokens a row, one of which took none of them as it was over. With five
    rows the first pass has more of them than a step has few."""
    slot = torch.tensor([5, 70, 130, 9, 64])[:rows]
    count = torch.tensor([2, 1, 0, 1, 2])[:rows]
    tables = torch.arange(1, 1 + 3 * rows, dtype=torch.int32).view(rows, 3)
    found = []
    for fused in (False, True):
        model = drafting_model(quantization, fused)
        generator = torch.Generator().manual_seed(7)
        cache = model.paged_cache(1 + 3 * rows)
        pool = cache.layers[model.shape.text.draft_layer]
        pool.copy_(torch.randn(pool.shape, generator=generator))
        hidden = torch.randn(rows * SIZE, model.shape.text.hidden_size, generator=generator)
        chosen = torch.randint(0, 60, (rows, SIZE), generator=generator)
        step = ChosenTokens(hidden, chosen, count, slot, slot, tables, int(slot.max()) + SIZE)
        given: list[torch.Tensor] = []

        def choose(logits: torch.Tensor, ahead: int, given: list[torch.Tensor] = given):
            given.append(logits.float().clone())
            return (torch.arange(len(logits)) * 11 + 5 * ahead) % 60

        draft(model, cache, step, DRAFTS, choose)
        found.append((torch.stack(given), pool.clone()))
    (plain, stored), (own, own_stored) = found
    assert plain.abs().max() > 0.1, "logits that differ from each other"
    near = 2e-4 if quantization is Quantization.NONE else 5e-2
    # Kernels round the vectors that 4 bits multiply.
    assert (plain - own).abs().max() <= max(near, 2e-2) * plain.abs().max()
    assert (stored - own_stored).abs().max() <= near * stored.abs().max()
