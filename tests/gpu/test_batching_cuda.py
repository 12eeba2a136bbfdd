"""Many requests at once on a CUDA device: kernels and graphs of every bucket of rows."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qwencli.config import DType, EngineName, Kernels, Quantization, SamplingOptions
from qwencli.engine.cache.paged_kv import (
    PAGE_SIZE,
    DecodePages,
    PagedKVCache,
    QuantizedPagedKVCache,
    pages_for,
)
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.client import generate_many
from qwencli.engine.kernels import fused_ops as fused_module
from qwencli.engine.kernels.fused_ops import FusedOps, Launch, fused_ops
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.ops.decoder_ops import REFERENCE_OPS, RMSNorm, Step, attend_pages
from qwencli.engine.ops.paged_attention import decode_slots
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.engine.row_state import RowState
from qwencli.engine.runner import ModelRunner
from qwencli.messages import GenerationRequest, ImagePart, user_message
from tests.checkpoints import engine_config, picture
from tests.engine.kernels.test_paged_attention import shape_of
from tests.gpu.test_kernels_cuda import wide_model

CUDA = torch.device("cuda")


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "kv"),
    [
        (1, 32, 8, 128, None),
        (3, 16, 8, 128, None),
        (8, 40, 8, 128, None),
        (64, 28, 4, 64, None),
        (256, 32, 8, 128, None),
        (1, 32, 8, 128, Scheme.INT8),
        (8, 40, 8, 128, Scheme.FP8),
        (64, 28, 4, 64, Scheme.INT8),
    ],
)
def test_rows_attend_as_with_plain_operators_in_float32(dtype, rows, heads, kv_heads, dim, kv):
    """Lengths of all kinds, one of them long enough for every part there is."""
    torch.manual_seed(rows)
    shape = shape_of(heads, kv_heads, dim)
    most = 64 * PAGE_SIZE
    counts = torch.randint(0, 12 * PAGE_SIZE, (rows,))
    counts[rows // 2] = most - 1
    pages = [pages_for(count + 1) for count in counts.tolist()]
    tables = torch.zeros(rows, 64, dtype=torch.int32)
    order, first = torch.randperm(sum(pages)).to(torch.int32) + 1, 0
    for row, count in enumerate(pages):
        tables[row, :count] = order[first : first + count]
        first += count
    tables, places = tables.to(CUDA), counts.to(CUDA)
    angles = torch.randn(most, dim // 2, device=CUDA)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1).to(dtype)
    gains = torch.rand(2, dim, device=CUDA).to(dtype) + 0.5
    gains = gains.repeat_interleave(torch.tensor([heads, kv_heads], device=CUDA), 0)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=CUDA, dtype=dtype)
    pool = torch.randn((1 + sum(pages)) * PAGE_SIZE, 2 * kv_heads, dim, device=CUDA, dtype=dtype)
    found = []
    for fused in (False, True):
        of = dtype if fused else torch.float32
        cache = PagedKVCache(shape, 1 + sum(pages), of, CUDA)
        if kv is not None:
            cache = QuantizedPagedKVCache(shape, 1 + sum(pages), of, CUDA, kv)
        slots = torch.arange(len(pool), device=CUDA)
        cache.write(0, pool[None].to(of), slots, 0)
        parts = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
        parts |= {"gated": False, "rotary_dim": None}
        layer = SimpleNamespace(
            index=0,
            qk_norm=RMSNorm(gains.to(of), 1e-6),
            o=table.new_zeros(heads * dim, 64),
            **parts,
        )
        cos, sin = (each[:, None, None] for each in table[places].to(of).unbind(1))
        step = Step(
            batch=rows,
            length=1,
            rope=[(cos, sin)],
            slots=places if fused else decode_slots(tables, places[:, None]).flatten(),
            plan=AttentionPlan(0, None),
            cache=cache,
            attention=None,
            ops=REFERENCE_OPS,
            positions=places,
            pages=DecodePages(tables, places, most),
        )
        attend = FusedOps(shape, table, dtype, CUDA).attend_rows if fused else attend_pages
        for _ in range(3):
            out = attend(qkv.to(of, copy=True), layer, step).float()
        found.append((out, *(each.float() for each in cache.read(0, slots[PAGE_SIZE:]))))
    near = 1e-5 if dtype is torch.float32 else 8e-3
    if kv is not None:  # what lies between two steps may become either
        near = 2e-2
    for plain, fused in zip(*found, strict=True):
        assert (fused - plain).norm() / plain.norm() < near


@torch.inference_mode()
@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 9, 128, 256])
def test_the_end_of_a_step_is_that_of_plain_operators(rows, with_penalty):
    torch.manual_seed(rows)
    own = FusedOps(shape_of(32, 8, 128), torch.zeros(1, device=CUDA), torch.bfloat16, CUDA)
    vocab_size, kept = 151_936, []
    logits = torch.randn(rows, vocab_size, device=CUDA)
    seen = torch.rand(rows, vocab_size, device=CUDA) < 0.5
    for ops in (REFERENCE_OPS, own):
        state = RowState(rows, 1, vocab_size, 8, CUDA)
        state.done[: max(rows - 1, 1)] = False
        state.limit.fill_(3)
        state.sampler.penalty[:] = 1.0 + torch.arange(rows, device=CUDA) / rows
        state.sampler.seen.copy_(seen)
        state.stop_ids[0, 3] = logits[0].argmax()
        for step in range(5):
            ops.choose_likeliest(logits + step, state.buffers(rows), with_penalty)
        names = ("token", "slot", "position", "step", "done")
        kept.append([*(getattr(state, name) for name in names), state.sampler.seen])
    for plain, fused in zip(*kept, strict=True):
        assert torch.equal(plain, fused)


@torch.inference_mode()
@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT4])
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_overlapped_steps_of_rows_give_the_same_bits_as_serial_ones(
    quantization, rows, monkeypatch
):
    """A kernel that reads before its turn would read the poison of the step before."""
    if not Launch.on(CUDA).dependent:
        pytest.skip("this GPU launches kernels one after the other")
    apart = replace(Launch.on(CUDA), dependent=False)

    def run():
        model = wide_model(functools.partial(fused_ops, own_attention=True), quantization)
        runner = ModelRunner(model, 1 + 32 * rows, rows, 32 * PAGE_SIZE, True, VisionCache())
        own, state = model.step_ops.norm_qkv.__self__, runner.state
        state.tables.copy_(1 + torch.arange(32 * rows).view(rows, 32))
        state.limit.fill_(1 << 30)
        runner._advance(SamplerKind.ARGMAX, rows, 32 * PAGE_SIZE)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            runner._advance(SamplerKind.ARGMAX, rows, 32 * PAGE_SIZE)
            for parts in (own._parts, *own._more_parts.values()):
                parts.sums.fill_(float("nan"))
            for buffer in (*own._projected.values(), own._attended, own._activated):
                buffer.fill_(float("nan"))
        state.token.copy_(torch.arange(rows) + 5)
        for counter in (state.slot, state.position):
            counter.copy_(torch.arange(rows) * 70 + 3)
        state.done.fill_(False)
        for layer in runner.cache.layers.values():
            layer.zero_()
        seen = []
        for _ in range(1000):
            graph.replay()
            seen.append(state.token.clone())
        return torch.stack(seen)

    overlapped = run()
    monkeypatch.setattr(fused_module.Launch, "on", classmethod(lambda cls, device: apart))
    assert torch.equal(overlapped, run())
    assert len(set(overlapped[:, 0].tolist())) > 10


def turned(number: int) -> ImagePart:
    still = picture(64 + 32 * (number % 2), 64)
    return ImagePart(still.image.rotate(9 * number), still.name)


@pytest.mark.parametrize("kernels", [Kernels.TRITON, Kernels.TORCH])
def test_answers_in_float32_are_those_of_requests_alone(checkpoint, kernels, monkeypatch):
    """Passes of prompts and pictures are graphs from the first one on."""
    monkeypatch.setattr("qwencli.engine.graphs.TIMES_MET", 0)
    requests = [
        GenerationRequest(
            (user_message("Why? " * (1 + n % 5), (turned(n),) * (n % 3)),),
            SamplingOptions(do_sample=False, max_new_tokens=4 + n % 20),
            ignore_eos=True,
        )
        for n in range(40)
    ]
    config = engine_config(
        checkpoint("qwen3_vl"),
        engine=EngineName.NATIVE,
        device="cuda",
        dtype=DType.FLOAT32,
        kernels=kernels,
    )
    with NativeEngine(config) as engine:
        alone = [engine.generate(request).token_ids for request in requests]
        together = [result.token_ids for result in generate_many(engine, requests)]
    same = sum(one == other for one, other in zip(alone, together, strict=True))
    # Sums of other kernels may turn a near tie.
    assert same >= 0.9 * len(requests)
