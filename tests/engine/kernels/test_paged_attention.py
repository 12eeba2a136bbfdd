"""Kernels of rows that share a pool of pages, against the plain operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from qwencli.config import Quantization, SamplingParams
from qwencli.engine.cache.paged_kv import (
    PAGE_SIZE,
    SCRATCH_PAGE,
    DecodePages,
    PagedKVCache,
    PagePool,
    QuantizedPagedKVCache,
    pages_for,
)
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.event_timer import EventTimer
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.kernels.fused_ops import FusedOps
from qwencli.engine.kernels.greedy_step import LIKELIEST_BLOCK
from qwencli.engine.kernels.qk_norm_rope import TOKENS, QkNormRopeStore
from qwencli.engine.kernels.swiglu import swiglu
from qwencli.engine.kernels.tiles import AttentionTiles, attention_tiles
from qwencli.engine.ops import decoder_ops
from qwencli.engine.ops.attention import AttentionFunction, AttentionPlan
from qwencli.engine.ops.decoder_ops import (
    REFERENCE_OPS,
    Layer,
    RMSNorm,
    Step,
    attend_pages,
    qk_norm_rope_store,
)
from qwencli.engine.ops.paged_attention import decode_slots
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.engine.request import PromptChunk, Sequence
from qwencli.engine.row_state import RowState
from qwencli.engine.runner import ModelRunner
from qwencli.engine.runner_prompt import PromptLayouts
from qwencli.models.shapes import RopeShape, TextShape
from tests.engine.kernels.test_fused_ops import NARROW, OWN, model_of, prompt_of
from tests.engine.kernels.test_qk_norm_rope import angles, drawn

CPU = torch.device("cpu")


# What rows see of earlier tokens: none, up to either side of a page's border, several parts.
CONTEXTS = (0, PAGE_SIZE - 1, PAGE_SIZE, 3 * PAGE_SIZE - 5, 1, 5 * PAGE_SIZE)
TABLE = 6


def shape_of(heads: int, kv_heads: int, dim: int) -> TextShape:
    return TextShape(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rms_norm_eps=1e-6,
        qk_norm=True,
        qkv_bias=False,
        o_bias=False,
        tied_head=True,
        rope=cast(RopeShape, None),
        max_position_embeddings=400,
    )


@torch.inference_mode()
@pytest.mark.parametrize(
    ("rows", "size", "heads", "kv_heads", "dim", "processors", "kv"),
    [
        (1, 1, 4, 2, 64, 64, None),
        (2, 1, 5, 1, 128, 64, None),
        (3, 1, 14, 2, 64, 1, None),
        (8, 1, 8, 1, 128, 1, None),
        (9, 1, 4, 1, 64, 64, None),
        (33, 1, 2, 1, 32, 1, None),
        (2, 1, 8, 2, 64, 64, Scheme.INT8),
        (3, 1, 4, 1, 128, 1, Scheme.FP8),
        (1, 4, 4, 2, 64, 64, None),
        (2, 8, 5, 1, 64, 64, None),
        (3, 2, 14, 2, 32, 1, None),
        (8, 4, 2, 1, 64, 1, None),
        (3, 4, 4, 1, 64, 64, Scheme.INT8),
        (2, 2, 4, 1, 64, 1, Scheme.FP8),
    ],
)
def test_rows_of_any_length_attend_as_with_plain_operators(
    rows, size, heads, kv_heads, dim, processors, kv
):
    """From the projection to the result, the new keys and values in the pool included. The last of
    several rows is a released one. New tokens lie on both sides of a page's border."""
    shape = shape_of(heads, kv_heads, dim)
    contexts = torch.tensor([CONTEXTS[(row + rows) % len(CONTEXTS)] for row in range(rows)])
    free = PagePool(1 + rows * TABLE)
    tables = torch.full((rows, TABLE), SCRATCH_PAGE, dtype=torch.int32)
    for row, context in enumerate(contexts.tolist()):
        taken = free.allocate(pages_for(context + size))
        assert taken is not None
        tables[row, : len(taken)] = torch.tensor(taken[::-1])
    if rows > 1:
        tables[-1], contexts[-1] = SCRATCH_PAGE, 0
    gains = (1 + 0.3 * drawn(2, dim, seed=4)).repeat_interleave(torch.tensor([heads, kv_heads]), 0)
    norm = RMSNorm(gains, 1e-6)
    parts = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "qk_norm": norm}
    parts |= {"gated": False, "rotary_dim": None}
    layer = cast(Layer, SimpleNamespace(index=0, o=torch.zeros(heads * dim, 64), **parts))
    table = torch.stack([each[0, :, 0] for each in angles(1, 400, dim)], 1)
    positions = contexts + 2
    own = FusedOps(shape, table, torch.float32, CPU)
    own.row_tiles_of = lambda rows: attention_tiles(kv_heads, processors, True, rows)
    num_pages = 1 + rows * TABLE
    qkv = drawn(rows * size, (heads + 2 * kv_heads) * dim)
    ahead = torch.arange(size)
    old = drawn(num_pages * PAGE_SIZE, 2 * kv_heads, dim, seed=2)
    found = []
    for fused in (False, True):
        cache = PagedKVCache(shape, num_pages, torch.float32, CPU)
        if kv is not None:
            cache = QuantizedPagedKVCache(shape, num_pages, torch.float32, CPU, kv)
        cache.write(0, old[None], torch.arange(len(old)), 0)
        turns = table[positions[:, None] + ahead]
        cos, sin = (each[:, :, None] for each in turns.unbind(2))
        step = Step(
            batch=rows,
            length=size,
            rope=[(cos, sin)],
            slots=decode_slots(tables, contexts[:, None] + ahead).flatten(),
            plan=AttentionPlan(0, None),
            cache=cache,
            attention=cast(AttentionFunction, None),
            ops=decoder_ops.REFERENCE_OPS,
            positions=positions,
            pages=DecodePages(tables, contexts, size + max(CONTEXTS)),
        )
        attend = own.attend_rows if fused else attend_pages
        for _ in range(2):  # nothing is left that a second layer would find
            out = attend(qkv.clone(), layer, step)
        found.append((out, *cache.read(0, torch.arange(PAGE_SIZE, len(old)))))
    for plain, fused in zip(*found, strict=True):
        # What lies between two steps of a quantized cache may become either.
        assert (plain - fused).abs().max() <= (2e-5 if kv is None else 5e-2)
        assert (plain - fused).abs().mean() <= 1e-5
    assert (found[0][1] - old[PAGE_SIZE:, :kv_heads]).abs().max() > 0.5, "the new keys are there"


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 128, 512])
def test_one_row_is_cut_up_as_ever_and_many_bound_what_has_no_work(rows):
    tiles = attention_tiles(8, 132, False, rows)
    assert rows > 1 or tiles == AttentionTiles(64, 32, 4, 64)
    assert rows * 8 * tiles.splits <= max(2 * 8 * 132, rows * 8 * 4)
    # A row of 300 tokens among many is not cut up, a long one is.
    assert tiles.splits >= 4 and (rows < 64 or tiles.shortest >= 300)


@torch.inference_mode()
@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 33])
def test_the_likeliest_token_of_each_row_and_what_the_next_step_starts_from(rows, with_penalty):
    vocab_size = 2 * LIKELIEST_BLOCK + 77
    own = FusedOps(shape_of(2, 1, 32), torch.zeros(1), torch.float32, CPU)
    logits = drawn(rows, vocab_size).to(torch.bfloat16)
    logits[:, 5] = logits[:, 5000 % vocab_size] = logits.max()  # of equal ones the first
    logits = torch.where(torch.arange(rows)[:, None] % 2 == 0, logits, drawn(rows, vocab_size))
    likeliest = logits.argmax(1)
    kept = []
    for ops in (REFERENCE_OPS, own):
        for _ in range(2):
            state = RowState(rows + 2, 1, vocab_size, 8, CPU)
            state.done[: max(rows - 1, 1)] = False
            state.limit.fill_(3)
            state.step.copy_(torch.arange(rows + 2) % 4)
            state.slot.copy_(torch.arange(rows + 2))
            state.stop_ids[0, 3] = likeliest[0]
            state.sampler.penalty[:] = 1.5
            state.sampler.seen[:, ::2] = True
            ops.choose_likeliest(logits, state.buffers(rows), with_penalty)
            drawn_ids = torch.arange(rows) + 7
            state.done[:rows] &= torch.arange(rows) % 2 == 0
            between = state.token.clone(), state.done.clone()
            ops.advance_rows(drawn_ids, state.buffers(rows))
        names = ("token", "slot", "position", "step", "done")
        kept.append([*between, *(getattr(state, name) for name in names), state.sampler.seen])
    for plain, fused in zip(*kept, strict=True):
        assert torch.equal(plain, fused)


@torch.inference_mode()
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(1, TOKENS + 5), (5, 1)])
def test_heads_are_stored_in_pages_and_stay_where_they_are(normed, batch, length):
    shape = shape_of(4, 2, 32)
    norm = RMSNorm(1 + 0.3 * drawn(6, 32, seed=4), 1e-6)
    layer = cast(
        Layer,
        SimpleNamespace(
            index=0,
            num_heads=4,
            num_kv_heads=2,
            qk_norm=norm if normed else None,
            rotary_dim=None,
        ),
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
    far = torch.cat((torch.full((1, 64), -200.0), torch.ones(1, 64)), 1)  # exp(200) is infinite
    assert (swiglu(far) == 0).all()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("mode", "rows", "penalty"),
    [
        (Quantization.NONE, 1, 1.3),
        (Quantization.NONE, 3, 1.3),
        (Quantization.NONE, 9, 1.3),
        (Quantization.INT8, 2, 1.0),
        (Quantization.INT8, 9, 1.0),
    ],
)
def test_a_batch_of_fused_steps_is_that_of_plain_operators(mode, rows, penalty):
    """Up to eight rows in the kernels of lone steps, more of them in products of matrices."""
    given = []
    for own in (None, OWN):
        model = model_of(NARROW, own, mode)
        runner = ModelRunner(model, 1 + 2 * rows, rows, 128, False, VisionCache())
        pool = PagePool(1 + 2 * rows)
        sampling = SamplingParams(do_sample=False, max_new_tokens=4, repetition_penalty=penalty)
        chunks, prompts = [], []
        for row in range(rows):
            ids = prompt_of(5 + row)
            sequence = Sequence(row, len(ids), 4, row=row, pages=pool.allocate(2))
            sequence.num_computed, sequence.num_scheduled = len(ids), 1
            chunks.append(PromptChunk(sequence, 0, len(ids)))
            prompts.append(
                PromptLayouts(model.shape).laid_out(
                    Prompt(ids, None, 0.0, None, None), (), sampling, ()
                )
            )
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
