"""The native model against `transformers`: random tiny models of every family, in float32."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from qwencli.config import Attention
from qwencli.engine.native.model import QwenModel
from tests.engine.native import reference, tiny
from tests.engine.native.decoding import decode

STEPS = 64
TOLERANCE = 1e-4
MAX_SEQ_LEN = 512

# Derandomized: a pair of logits closer than float noise would otherwise fail a run now and then.
parity = settings(
    max_examples=2,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def run_reference(
    config: dict[str, Any], rows: list[tiny.Row], folder: Path
) -> tuple[dict[Attention, QwenModel], list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Build both models; the reference generates.

    Returns ours for each attention, the patches, and the reference's tokens [B, STEPS] and logits.
    """
    theirs = reference.reference_model(config)
    theirs.save_pretrained(folder)
    models = {
        attention: reference.saved_model(theirs, folder, MAX_SEQ_LEN, attention)
        for attention in (Attention.SDPA, Attention.EAGER)
    }
    ours = models[Attention.SDPA]
    vision = ours.shape.vision
    patches = reference.pixels(rows, vision.patch_elements if vision else 0)
    inputs = reference.native_inputs(ours, rows, patches)
    kwargs = reference.reference_inputs(config["model_type"], inputs, rows, patches)
    out = theirs.generate(
        **kwargs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return models, patches, out.sequences[:, inputs.length :], list(out.logits)


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for step, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            mine, expected, atol=TOLERANCE, rtol=0, msg=lambda m, s=step: f"step {s}: {m}"
        )
        first, second = expected.topk(2).values.unbind(-1)
        decided = first - second > 2 * TOLERANCE
        assert torch.equal(mine.argmax(-1)[decided], expected.argmax(-1)[decided])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "case"),
    [
        *itertools.product(tiny.FAMILIES, tiny.CASES),
        *zip(tiny.SPARSE, (tiny.CASES[1], tiny.CASES[3]), strict=True),
    ],
    ids=lambda value: f"batch {value.batch}" if isinstance(value, tiny.Case) else value,
)
@torch.inference_mode()
def test_prompt_and_64_tokens_equal_the_reference(family: str, case: tiny.Case) -> None:
    """With each attention of ours; the reference is the same, and runs once."""
    least = case is tiny.CASES[0]
    examples = itertools.count()

    @settings(parity, max_examples=2 if least else 1)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        config = data.draw(tiny.configs(family, case))
        rows = data.draw(tiny.batches(family, case))
        # The first is the least there is, and the same but for its batch: once for each family.
        assume(next(examples) or least)
        with tempfile.TemporaryDirectory() as folder:
            models, patches, tokens, expected = run_reference(config, rows, Path(folder))
        for model in models.values():
            assert model.unused_tensors == ()
            inputs = reference.native_inputs(model, rows, patches)
            assert inputs.batch == case.batch
            assert (inputs.left_pads is not None) == (case.batch > 1)
            static = decode(model, inputs, model.static_cache(inputs.batch), tokens)
            assert_same(static, expected)
            dynamic = decode(model, inputs, model.dynamic_cache(inputs.batch), tokens)
            for mine, same in zip(static, dynamic, strict=True):
                torch.testing.assert_close(mine, same, atol=1e-5, rtol=0)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@torch.inference_mode()
def test_several_images_encoded_together_equal_the_reference_tower(family: str) -> None:
    @settings(parity, max_examples=8)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        config = data.draw(tiny.configs(family, data.draw(st.sampled_from(tiny.CASES))))
        sides = st.integers(1, 6).map(lambda n: n * tiny.MERGE)
        grid = st.tuples(st.integers(1, 2), sides, sides)
        grids = data.draw(st.lists(grid, min_size=2, max_size=4))
        theirs = reference.reference_model(config)
        with tempfile.TemporaryDirectory() as folder:
            model = reference.native_model(theirs, Path(folder), MAX_SEQ_LEN)
        assert model.vision is not None
        count = sum(t * h * w for t, h, w in grids)
        patches = torch.randn(count, model.vision.shape.patch_elements)
        expected = theirs.model.visual(patches, grid_thw=torch.tensor(grids))
        # The second call runs from the kept layout.
        for features in (model.encode_images(patches, grids), model.encode_images(patches, grids)):
            torch.testing.assert_close(
                features.embeds, expected.pooler_output, atol=1e-5, rtol=1e-5
            )
            layers = getattr(expected, "deepstack_features", None) or []
            for mine, layer in zip(features.deepstack, layers, strict=True):
                torch.testing.assert_close(mine, layer, atol=1e-5, rtol=1e-5)

    check()
