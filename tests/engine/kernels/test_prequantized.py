"""The kernels on weights of pre-quantized checkpoints: equal to the matrices read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwencli.engine.loading import weights
from qwencli.engine.native.model import Fused, QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.models.quant_formats import packed_format
from qwencli.models.shape_reader import read_shape
from tests.engine.kernels import test_skinny_gemm as several
from tests.engine.kernels.test_fused_ops import CPU, OWN, SLOTS
from tests.engine.quant.packed_formats import FORMATS
from tests.engine.quant.test_prequantized import TEXT, tensors_of, write

# One of each way through the kernels: zeros or none, groups or rows, a table, columns in an order
# of their own, each type of scales.
NAMES = (
    "awq g64", "gptq desc_act", "gptq 8", "gptq 8 sym desc_act", "ct int4", "ct int8 asym",
    "ct fp8", "fp8 blocks", "bnb nf4", "bnb int8",
)  # fmt: skip


def loaded_from(folder: Path, name: str) -> weights.LoadedWeights:
    """A checkpoint in one of FORMATS, written to `folder` and loaded."""
    config, writer, arguments, _ = FORMATS[name]
    packed, _ = tensors_of(TEXT, writer, arguments)
    return weights.load(
        write(folder, packed),
        read_shape(TEXT),
        torch.float32,
        CPU,
        packed=packed_format({"quantization_config": config}),
    )


@torch.inference_mode()
def logits_of(loaded: weights.LoadedWeights, fused: Fused | None) -> torch.Tensor:
    model = QwenModel(read_shape(TEXT), loaded, SLOTS, fused=fused)
    inputs = model.prepare([ModelPrompt([5, 9, 33, 70, 2, 41], [])])
    cache = model.static_cache()
    model.prefill(inputs, cache)
    plan = AttentionPlan(cache.length + 1, None)
    slot = torch.tensor([cache.length])
    return model.decode_step(torch.tensor([7]), inputs.next_positions, slot, cache, plan)[0]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_give_the_logits_of_the_matrices_read_back(tmp_path: Path, name: str) -> None:
    loaded = loaded_from(tmp_path, name)
    plain, fused = logits_of(loaded, None), logits_of(loaded, OWN)
    # Every product rounds its vector to 8 bits, and random weights pass that on undamped.
    assert (plain - fused).norm() <= 0.05 * plain.norm()


@pytest.mark.parametrize("name", ["awq g64", "gptq desc_act", "gptq 8", "fp8 blocks", "bnb nf4"])
def test_steps_of_several_tokens_give_what_those_of_one_give_or_the_plain_operators(
    tmp_path: Path, name: str
) -> None:
    """Kinds that their kernel does not read as stored are read back, and not rounded at all."""
    loaded = loaded_from(tmp_path, name)
    as_stored = name == "awq g64"
    expected, found = (
        several.logits_of(
            QwenModel(read_shape(TEXT), loaded, SLOTS, fused=ops), [[5, 9, 33]], [[7, 70, 2]], size
        )
        for ops, size in ((OWN, 1) if as_stored else (None, 3), (OWN, 3))
    )
    # What is rounded is multiplied in float16: now and then a later value meets the next step.
    assert several.relative(found, expected) <= (0.02 if as_stored else 1e-4)
