"""A step of rows of a model with gated delta nets, in kernels, against plain operators."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from qwencli.config import Quantization, SamplingParams
from qwencli.engine.cache.paged_kv import DecodePages, pages_for
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.event_timer import EventTimer
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt, lay_out
from qwencli.engine.request import PromptChunk, Sequence
from qwencli.engine.runner import ModelRunner
from qwencli.engine.runner_prompt import RunnerPrompt
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


def dummy(
    quantization: Quantization, head: bool = False
) -> tuple[ModelShape, weights.LoadedWeights]:
    """Random weights, larger ones than a load for speed has, gates and norms among them.

    Args:
        head: whether the model has one that drafts.
    """
    shape = read_shape(CONFIG)
    shape = shape.with_draft_head() if head else shape
    loaded = weights.dummy(shape, torch.float32, CPU, quantization)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in loaded.tensors.items():
        if name.endswith("norm"):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
        elif not name.endswith(("decay_log", "decay_bias")):
            tensor.mul_(5)
    return shape, loaded


def requests_of(
    shape: ModelShape, texts: list[list[int]], new_tokens: int
) -> tuple[list[Sequence], list[RunnerPrompt]]:
    """Of these prompts, a row, pages and a state each."""
    sequences, prompts, first = [], [], 1
    sampling = SamplingParams(do_sample=False, max_new_tokens=new_tokens)
    for row, ids in enumerate(texts):
        pages = list(range(first, first + pages_for(len(ids) + new_tokens)))
        first += len(pages)
        layout = lay_out(shape, ModelPrompt([0] * len(ids)))
        prompts.append(RunnerPrompt(torch.tensor(ids), layout, (), sampling, ()))
        sequences.append(Sequence(row, len(ids), new_tokens, row=row, pages=pages, state=row + 1))
    return sequences, prompts


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
        model.rope.reach(200)
        runner = ModelRunner(model, 40, rows, 200, False, VisionCache(), num_states=rows + 1)
        lengths = [1 + (63 * row) % 100 for row in range(rows)]
        texts = [[(7 * row + 3 * at) % 60 for at in range(lengths[row])] for row in range(rows)]
        sequences, prompts = requests_of(shape, texts, 4)
        for sequence, prompt in zip(sequences, prompts, strict=True):
            chunk = PromptChunk(sequence, 0, sequence.num_prompt_tokens)
            logits = [runner.prompts.run([chunk], [prompt]).logits]
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


# Drafts in a row that are right, of each row in each step of 4 tokens; the last row's answer ends
# within a step.
RIGHT = [(3, 0, 1), (0, 2, 3)]
TEXTS = [[(7 * row + 3 * at) % 60 for at in range(length)] for row, length in enumerate((5, 62, 2))]
LIMITS = (20, 20, 6)


def begun(
    fused: bool, texts: list[list[int]], head: bool = False
) -> tuple[ModelRunner, list[Sequence], list[RunnerPrompt]]:
    """Rows whose prompts have just run."""
    shape, loaded = dummy(Quantization.NONE, head)
    own = functools.partial(fused_ops, own_attention=True) if fused else None
    model = QwenModel(shape, loaded, 200, fused=own)
    model.rope.reach(200)
    runner = ModelRunner(model, 20, 3, 150, False, VisionCache(), 4, with_drafts=True)
    sequences, prompts = requests_of(shape, texts, 20)
    for sequence, prompt, limit in zip(sequences, prompts, LIMITS, strict=False):
        sequence.max_new_tokens, sequence.num_scheduled = limit, 1
        prompt.sampling = replace(prompt.sampling, max_new_tokens=limit)
    chunks = [PromptChunk(each, 0, each.num_prompt_tokens) for each in sequences]
    runner.prefill(chunks, prompts, EventTimer("cpu"))
    return runner, sequences, prompts


@functools.cache
def plain_answers() -> list[list[int]]:
    runner, sequences, prompts = begun(False, TEXTS)
    answers = [[token] for token in runner.state.token.tolist()]
    for _ in range(9):
        for each in sequences:
            each.num_scheduled += 1
        given = runner.decode(sequences, prompts, 0, EventTimer("cpu")).read()
        for answer, token in zip(answers, given, strict=True):
            answer.append(token)
    return answers


@torch.inference_mode()
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "kernels"])
def test_steps_that_check_drafts_leave_the_states_of_a_prompt(fused: bool) -> None:
    """Of the prompt and what was accepted of the answer."""
    answers = plain_answers()
    runner, sequences, prompts = begun(fused, TEXTS)
    assert runner.state.drafts is not None and runner.states is not None
    found = [[token] for token in runner.state.token.tolist()]
    for right in RIGHT:
        drafts = runner.state.drafts.input_ids
        for row, (answer, count) in enumerate(zip(answers, right, strict=True)):
            ahead = torch.tensor(answer[len(found[row]) :][:3])
            ahead[count:] = (ahead[count:] + 1) % 60
            drafts[row, 1 : 1 + len(ahead)] = ahead
        for each in sequences:
            each.num_scheduled += 4
        copy = runner.verify(sequences, prompts, 4, 0, EventTimer("cpu"))
        for tokens, (_, given) in zip(found, copy.read(), strict=True):
            tokens += given
    assert [len(tokens) for tokens in found] == [6, 5, 6]
    for tokens, answer in zip(found, answers, strict=True):
        assert tokens == answer[: len(tokens)]
    texts = [ids + tokens[:-1] for ids, tokens in zip(TEXTS, found, strict=True)]
    again, _, _ = begun(False, texts)
    assert again.states is not None
    ring = runner.states.conv.shape[2]
    for row, text in enumerate(texts):
        last = [place % ring for place in range(len(text) - 3, len(text))]
        for one, other in (
            (runner.states.recurrent[:, row + 1], again.states.recurrent[:, row + 1]),
            (runner.states.conv[:, row + 1, last], again.states.conv[:, row + 1, last]),
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_head_drafts_in_kernels_what_it_does_in_plain_operators() -> None:
    """For a lone row, whose tokens are as many as the kernels of a step take."""
    found = []
    for fused in (False, True):
        runner, sequences, prompts = begun(fused, TEXTS[:1], head=True)
        assert runner.state.drafts is not None
        sequences[0].num_scheduled += 1
        told = [*runner.decode(sequences, prompts, 0, EventTimer("cpu")).read()]
        sequences[0].num_scheduled += 3
        told += runner.verify(sequences, prompts, 3, 0, EventTimer("cpu")).read()[0][1]
        assert runner._head is not None
        found.append((told, runner._head.done.tolist(), runner._head.hidden.clone()))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-3)
