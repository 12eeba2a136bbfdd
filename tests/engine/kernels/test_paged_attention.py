"""Kernels of rows that share a pool of pages, against the plain operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from qwencli.config import Quantization, SamplingParams
from qwencli.engine.cache.paged_kv import PAGE_SIZE, DecodePages, PagedKVCache, PagePool, pages_for
from qwencli.engine.event_timer import EventTimer
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.kernels.paged_attention import PagedAttention
from qwencli.engine.kernels.qk_norm_rope import TOKENS, QkNormRopeStore
from qwencli.engine.kernels.swiglu import swiglu
from qwencli.engine.ops import decoder_ops
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.ops.decoder_ops import Layer, RMSNorm, Step, qk_norm_rope_store
from qwencli.engine.ops.paged_attention import paged_attention
from qwencli.engine.request import PromptChunk, Sequence
from qwencli.engine.runner import ModelRunner
from qwencli.models.shapes import TextShape
from tests.engine.kernels.test_fused_ops import NARROW, OWN, model_of, prompt_of
from tests.engine.kernels.test_qk_norm_rope import angles, drawn

CPU = torch.device("cpu")


@torch.inference_mode()
@pytest.mark.parametrize("processors", [1, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 64), (5, 5, 16)])
def test_rows_of_any_length_attend_as_with_plain_operators(processors, heads, kv_heads, dim):
    """Few processors: no splits; many: more splits than a short row has pages."""
    lengths = torch.tensor([1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE - 5], dtype=torch.int32)
    pages = PagePool(20)
    tables = torch.zeros(len(lengths), 4, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        taken = pages.allocate(pages_for(length))
        assert taken is not None
        tables[row, : len(taken)] = torch.tensor(taken[::-1])
    pool = drawn(20 * PAGE_SIZE, 2 * kv_heads, dim)
    # As in the projection: other heads lie between the rows.
    q = drawn(len(lengths), heads + 2 * kv_heads, dim, seed=2)[:, :heads]
    seen = DecodePages(tables, lengths, 3 * PAGE_SIZE)
    expected, got = paged_attention(q, pool, seen), PagedAttention(processors)(q, pool, seen)
    assert (got - expected).abs().max() <= 1e-5
    alone = torch.cat(
        [
            paged_attention(
                q[row : row + 1],
                pool,
                DecodePages(tables[row : row + 1], lengths[row : row + 1], int(lengths[row])),
            )
            for row in range(len(lengths))
        ]
    )
    assert (alone - expected).abs().max() <= 1e-6


@torch.inference_mode()
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(1, TOKENS + 5), (5, 1)])
def test_heads_are_stored_in_pages_and_stay_where_they_are(normed, batch, length):
    shape = cast(TextShape, SimpleNamespace(num_kv_heads=2, head_dim=32, num_layers=1))
    norm = RMSNorm(1 + 0.3 * drawn(6, 32, seed=4), 1e-6)
    layer = cast(
        Layer,
        SimpleNamespace(index=0, num_heads=4, num_kv_heads=2, qk_norm=norm if normed else None),
    )
    slots = torch.randperm(3 * PAGE_SIZE, generator=torch.Generator().manual_seed(5))
    found = []
    for place in (qk_norm_rope_store, QkNormRopeStore()):
        cache = PagedKVCache(shape, 3, torch.float32, CPU)
        step = cast(
            Step,
            SimpleNamespace(
                rope=[angles(batch, length, 32)],
                slots=slots[: batch * length],
                plan=AttentionPlan(0, None),
                cache=cache,
                gained=False,
            ),
        )
        split = drawn(batch, length, 8, 32)
        place(split, layer, step)
        found.append((split, cache.layers[0]))
    for plain, own in zip(*found, strict=True):
        assert plain.abs().sum() > 0 and (own - plain).abs().max() <= 1e-5


@torch.inference_mode()
def test_swiglu():
    both = drawn(5, 2 * 1100)
    assert (swiglu(both) - decoder_ops.swiglu(both)).abs().max() <= 1e-6


@torch.inference_mode()
@pytest.mark.parametrize("mode", [Quantization.NONE, Quantization.INT8])
@pytest.mark.parametrize("rows", [2, 9])
def test_a_batch_of_fused_steps_is_that_of_plain_operators(mode, rows):
    """Up to eight rows in the kernels of lone steps, more of them in products of matrices."""
    given = []
    for own in (None, OWN):
        model = model_of(NARROW, own, mode)
        runner = ModelRunner(model, 1 + 2 * rows, rows, 128, graphs=False)
        pool = PagePool(1 + 2 * rows)
        sampling = SamplingParams(do_sample=False, max_new_tokens=4)
        chunks, prompts = [], []
        for row in range(rows):
            ids = prompt_of(5 + row)
            sequence = Sequence(row, len(ids), 4, row, pool.allocate(2), len(ids), 1)
            chunks.append(PromptChunk(sequence, 0, len(ids)))
            prompts.append(runner.prepare(Prompt(ids, None, 0.0, None, None), sampling, ()))
        clock = EventTimer("cpu")
        tokens = [runner.prefill(chunks, prompts, clock).read()]
        sequences = [chunk.sequence for chunk in chunks]
        for _ in range(2):
            for sequence in sequences:
                sequence.num_scheduled += 1
            tokens.append(runner.decode(sequences, prompts, 0, clock).read())
        given.append(tokens)
    plain, fused = (torch.tensor(tokens) for tokens in given)
    # What eight bits round may turn a choice.
    assert (plain == fused).float().mean() >= (1.0 if mode is Quantization.NONE else 0.7)
