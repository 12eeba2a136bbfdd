"""The flash-attn package on a CUDA device: its kernels as they are called, and both engines."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

from qwencli.config import Attention, Cache, DType, EngineName, Quantization, SamplingOptions
from qwencli.engine.client import generate_many
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.layers.vision_tower import SEGMENT_ATTENTION
from qwencli.engine.machine.flash_attn import run_misfit
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.attention import ATTENTION, AttentionPlan, eager, prompt_plan
from qwencli.errors import UnsupportedModeError
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, picture

flash_attn = pytest.importorskip("flash_attn")

CUDA = torch.device("cuda")
FLASH = ATTENTION[Attention.FLASH]
ENGINES = {EngineName.NATIVE: NativeEngine, EngineName.TRANSFORMERS: TransformersEngine}
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while. " * 3


def random(*size):
    return torch.randn(*size, device=CUDA, dtype=torch.bfloat16)


def cache_of(rows, slots, kv_heads, dim):
    """Keys and values [rows, kv_heads, slots, dim] as a static cache has them: parts of more."""
    return random(2, rows, kv_heads, slots + 37, dim)[:, :, :, :slots].unbind(0)


def near(got, q, keys, values, plan):
    """Within rounding of attention in float64, which needs a mask."""
    exact = eager(q.double(), keys.double(), values.double(), plan)
    assert got.shape == exact.shape
    assert float((got - exact).norm() / exact.norm()) <= 5e-3


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@torch.inference_mode()
def test_prompts_whole_later_pieces_and_padded_rows(dim):
    torch.manual_seed(dim)
    for start, length in itertools.product((0, 129), (1, 64, 300)):
        q = random(1, length, 12, dim)[:, :, :8]
        keys, values = cache_of(1, start + length, 2, dim)
        plan = prompt_plan(start, length, 2, q.dtype, CUDA, flash=True)
        masked = prompt_plan(start, length, 2, torch.float64, CUDA)
        near(FLASH(q, keys, values, plan), q, keys, values, masked)
    # Rows that end together, with padding in front; a multiple of its blocks, and not.
    for length in (256, 300):
        q = random(3, length, 8, dim)
        keys, values = cache_of(3, length, 2, dim)
        pads = torch.tensor([0, 5, 200], dtype=torch.int32, device=CUDA)
        out = FLASH(q, keys, values, prompt_plan(0, length, 2, q.dtype, CUDA, pads))
        for row, pad in enumerate(pads.tolist()):
            parts = (x[row : row + 1, :, pad:] for x in (keys, values))
            own = q[row : row + 1, pad:]
            plan = prompt_plan(0, length - pad, 2, torch.float64, CUDA)
            near(out[row : row + 1, pad:], own, *parts, plan)


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@torch.inference_mode()
def test_steps_read_lengths_on_the_device_also_in_a_graph(dim):
    torch.manual_seed(dim)
    keys, values = cache_of(2, 1024, 2, dim)
    lengths = torch.zeros(2, dtype=torch.int32, device=CUDA)
    for size in (1, 4):
        q = random(2, size, 8, dim)
        step = AttentionPlan(1024, None, lengths)
        lengths.fill_(9)
        FLASH(q, keys, values, step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = FLASH(q, keys, values, step)
        for used in ([5, 1024], [700, 257]):
            lengths.copy_(torch.tensor(used))
            graph.replay()
            for row, count in enumerate(used):
                parts = (x[row : row + 1, :, :count] for x in (keys, values))
                own = q[row : row + 1]
                plan = prompt_plan(count - size, size, 2, torch.float64, CUDA)
                near(out[row : row + 1], own, *parts, plan)


@pytest.mark.parametrize("dim", [16, 64, 72, 80])
@torch.inference_mode()
def test_pictures(dim):
    qkv = random(3, 100, 3, 4, dim)
    q, k, v = qkv.unbind(2)
    got = SEGMENT_ATTENTION[Attention.FLASH](q, k, v)
    exact = SEGMENT_ATTENTION[Attention.EAGER](*(x.double() for x in (q, k, v)))
    assert float((got - exact).norm() / exact.norm()) <= 5e-3


@pytest.mark.parametrize("dim", [64, 128])
@torch.inference_mode()
def test_pages_of_its_own_size(dim):
    """What a pool would have to be made of: pages of 256 slots, in any order."""
    keys, values = (random(9, 256, 2, dim) for _ in range(2))
    table = torch.tensor([[8, 1, 3, 5], [0, 2, 4, 6]], dtype=torch.int32, device=CUDA)
    used, q = [700, 1024], random(2, 1, 8, dim)
    lengths = torch.tensor(used, dtype=torch.int32, device=CUDA)
    out = flash_attn.flash_attn_with_kvcache(
        q, keys, values, cache_seqlens=lengths, block_table=table, causal=True
    )
    for row, count in enumerate(used):
        parts = (x[table[row].long()].flatten(0, 1)[None, :count] for x in (keys, values))
        k, v = (x.transpose(1, 2) for x in parts)
        near(out[row : row + 1].flatten(2), q[row : row + 1], k, v, AttentionPlan(count, None))
    with pytest.raises(RuntimeError, match="divisible by 256"):
        flash_attn.flash_attn_with_kvcache(
            q, keys[:, :64], values[:, :64], cache_seqlens=lengths, block_table=table
        )


def config(folder, engine, **modes):
    return engine_config(folder, **{"engine": engine, "device": "cuda", **modes})


PICTURES = (picture(), picture(96, 64))


def ask(text="Describe these images.", images=PICTURES):
    sampling = SamplingOptions(do_sample=False, max_new_tokens=24)
    return GenerationRequest((user_message(text, tuple(images)),), sampling, ignore_eos=True)


CELLS = [
    *itertools.product(
        ENGINES,
        (Quantization.NONE, Quantization.INT8, Quantization.INT4),
        (Cache.DYNAMIC, Cache.STATIC),
    ),
    (EngineName.NATIVE, Quantization.NONE, Cache.STATIC_GRAPH),
    (EngineName.NATIVE, Quantization.INT8, Cache.STATIC_GRAPH),
    (EngineName.NATIVE, Quantization.NONE, Cache.STATIC_COMPILE),
]


@functools.cache
def unrounded(engine, folder):
    modes = {"dtype": DType.FLOAT32, "cache": Cache.STATIC}
    with ENGINES[engine](config(folder, engine, **modes)) as loaded:
        return np.stack(list(loaded.log_probs(TEXT, 48)))


@pytest.mark.parametrize(("engine", "quantization", "cache"), CELLS, ids=map("-".join, CELLS))
def test_cells_answer_and_agree_with_sdpa(checkpoint, engine, quantization, cache):
    if engine is EngineName.TRANSFORMERS and quantization is not Quantization.NONE:
        pytest.importorskip("bitsandbytes")
    folder, found = checkpoint("qwen3_vl"), {}
    for attention in (Attention.FLASH, Attention.SDPA):
        modes = {"quantization": quantization, "cache": cache, "attention": attention}
        with ENGINES[engine](config(folder, engine, **modes)) as loaded:
            answer = loaded.generate(ask())
            found[attention] = np.stack(list(loaded.log_probs(TEXT, 48)))
        assert answer.effective.attention == attention
        assert len(answer.token_ids) == 24
    exact = unrounded(engine, folder)
    error = {name: np.abs(values - exact).mean() for name, values in found.items()}
    # Weights of 8 and 4 bits are further from float32 than attention's rounding; alike, though.
    assert error[Attention.FLASH] <= 1.5 * error[Attention.SDPA] + 1e-3, error


def test_native_requests_at_once_are_answered_one_by_one_as_alone(checkpoint):
    folder = checkpoint("qwen3_vl")
    requests = [ask("One?"), ask("And two?", ()), ask("Three of them?", (picture(),))]
    modes = {"attention": Attention.FLASH, "cache": Cache.STATIC}
    with NativeEngine(config(folder, EngineName.NATIVE, **modes)) as engine:
        alone = [engine.generate(request).token_ids for request in requests]
        together = [result.token_ids for result in generate_many(engine, requests)]
    assert together == alone


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_is_refused_when_the_model_is_loaded(checkpoint, engine):
    modes = {"attention": Attention.FLASH, "dtype": DType.FLOAT32}
    with pytest.raises(UnsupportedModeError, match="bfloat16 and float16 alone") as refused:
        ENGINES[engine](config(checkpoint("qwen3_vl"), engine, **modes)).load()
    assert "--dtype bfloat16" in refused.value.hint


def test_heads_that_no_build_has_are_named():
    found = run_misfit((264,), "bfloat16", "cuda:0")
    assert found is not None and "heads above 256" in found.what
    assert run_misfit((64, 128), "bfloat16", "cuda:0") is None
