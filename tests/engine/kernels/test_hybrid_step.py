"""A step of rows of a model with gated delta nets, in kernels, against plain operators."""

from __future__ import annotations

import functools

import pytest
import torch

from qwencli.config import Quantization, SamplingParams
from qwencli.engine.cache.paged_kv import DecodePages, pages_for
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import Prompt, lay_out
from qwencli.engine.prompt_batch import RunnerPrompt
from qwencli.engine.request import PromptChunk, Sequence
from qwencli.engine.runner import ModelRunner
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "qwen3_5",
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "patch_size": 4,
        "out_hidden_size": 128, "num_position_embeddings": 4,
    },
    "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}  # fmt: skip


def dummy(quantization: Quantization) -> tuple[ModelShape, weights.LoadedWeights]:
    """Random weights, larger ones than a load for speed has, gates and norms among them."""
    shape = read_shape(CONFIG)
    loaded = weights.dummy(shape, torch.float32, CPU, quantization)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in loaded.tensors.items():
        if name.endswith("norm"):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
        elif not name.endswith(("decay_log", "decay_bias")):
            tensor.mul_(5)
    return shape, loaded


@torch.inference_mode()
@pytest.mark.parametrize(
    ("rows", "quantization"),
    [
        (1, Quantization.NONE),
        (3, Quantization.NONE),
        (9, Quantization.NONE),
        (1, Quantization.INT8),
    ],
)
def test_steps_are_those_of_plain_operators(rows: int, quantization: Quantization) -> None:
    """Behind prompts of which one ends a page; one row of several is idle."""
    found = []
    for fused in (None, functools.partial(fused_ops, own_attention=True)):
        shape, loaded = dummy(quantization)
        model = QwenModel(shape, loaded, 200, fused=fused)
        runner = ModelRunner(model, 40, rows, 200, False, VisionCache(), num_states=rows + 1)
        lengths = [1 + (63 * row) % 100 for row in range(rows)]
        sequences, prompts, first = [], [], 1
        for row, length in enumerate(lengths):
            pages = list(range(first, first + pages_for(length + 4)))
            first += len(pages)
            ids = [(7 * row + 3 * place) % 60 for place in range(length)]
            layout = lay_out(shape, Prompt(ids))
            prompts.append(RunnerPrompt(torch.tensor(ids), layout, (), SamplingParams(), ()))
            sequences.append(Sequence(row, length, 4, row=row, pages=pages, state=row + 1))
        for sequence, prompt in zip(sequences, prompts, strict=True):
            chunk = PromptChunk(sequence, 0, sequence.num_prompt_tokens)
            logits = [runner._run_chunks([chunk], [prompt])]
        tables = torch.zeros(rows, 4, dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.pages)] = torch.tensor(sequence.pages)
        states = torch.arange(1, rows + 1)
        idle = torch.zeros(rows, dtype=torch.bool)
        if rows > 2:
            idle[-1] = True
        for ahead in range(2):
            at = torch.tensor(lengths) + ahead
            tokens = (at * 5) % 60
            pages = DecodePages(tables, at, max(lengths) + ahead + 1, states, idle)
            hidden = model.decode_rows(tokens, at, runner.cache, pages, runner.states)
            made = model.decoder.logits(hidden, model.row_ops(rows)).float()
            logits.append(made[~idle].clone())
        assert runner.states is not None
        found.append((logits, runner.states.recurrent[:, 1:].clone()))
    (plain, plain_states), (own, own_states) = found
    assert plain[1].abs().max() > 0.1, "logits that differ from each other"
    near = 2e-4 if quantization is Quantization.NONE else 5e-2
    for one, other in zip(plain, own, strict=True):
        assert (one - other).abs().max() <= near * one.abs().max()
    assert (plain_states - own_states).abs().max() <= near * plain_states.abs().max()
