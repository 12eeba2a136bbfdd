"""What memory plans promise on a CUDA device, for a 4B model of random weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from qwencli.config import (
    EngineConfig,
    EngineName,
    KVDType,
    LoadFormat,
    Quantization,
    SamplingOptions,
)
from qwencli.engine.client import generate_many
from qwencli.engine.device_memory import release
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.native.engine import NativeEngine
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.models.memory import RUNTIME_BYTES
from qwencli.models.resolve import resolve_model

GIB = 2**30


@contextmanager
def only_free(gib: float) -> Iterator[None]:
    """Leave so much memory free on the device, as other programs would."""
    release("cuda")
    held = torch.empty(
        torch.cuda.mem_get_info()[0] - int(gib * GIB), dtype=torch.uint8, device="cuda"
    )
    try:
        yield
    finally:
        del held
        release("cuda")


def config(**settings) -> EngineConfig:
    return EngineConfig(
        resolve_model("qwen3-vl-4b"),
        engine=EngineName.NATIVE,
        device="cuda",
        load_format=LoadFormat.DUMMY,
        **settings,
    )


def look(width: int, height: int, new_tokens: int = 64) -> GenerationRequest:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    picture = ImagePart(Image.fromarray(pixels), "noise.png")
    sampling = SamplingOptions(do_sample=False, max_new_tokens=new_tokens)
    return GenerationRequest((user_message("Look.", (picture,)),), sampling, ignore_eos=True)


@pytest.mark.parametrize(("free", "mode"), [(11, Quantization.NONE), (8, Quantization.INT8)])
def test_a_picture_of_8160_tokens_runs_with_little_memory(free, mode):
    with only_free(free), NativeEngine(config(quantization=mode)) as engine:
        result = engine.generate(look(3840, 2160))
        assert result.num_image_tokens == 8160 and not result.notes
        again = engine.generate(look(512, 512))
        assert len(again.token_ids) == 64


def test_what_cannot_fit_is_shown_smaller_and_it_is_said():
    with only_free(10.2), NativeEngine(config()) as engine:
        result = engine.generate(look(3840, 2160))
        assert 1000 < result.num_image_tokens < 8160
        (note,) = result.notes
        assert "3840x2160 is shown as" in note


@pytest.mark.parametrize("free", [11, 24])
def test_the_peak_of_a_request_is_what_was_planned(free):
    """The plan is never too low, and within 3% where one request needs all of it."""
    with only_free(free):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with NativeEngine(config()) as engine:
            plan = engine._plan
            side = plan.max_image_tokens * 32 * 32 // 4096
            engine.generate(look(1024, 1024))  # graphs of prompts and small pictures
            engine.generate(look(4096, side // 32 * 32))
            peak = torch.cuda.max_memory_allocated() - before
        planned = plan.total - RUNTIME_BYTES
        assert 0.97 * planned <= peak <= planned * 1.001, (
            f"{peak / GIB:.2f} of {planned / GIB:.2f} GiB"
        )


@pytest.mark.parametrize("kv_dtype", [KVDType.AUTO, KVDType.FP8, KVDType.INT8])
def test_a_batch_keeps_within_what_is_free(kv_dtype):
    with only_free(16), NativeEngine(config(kv_dtype=kv_dtype)) as engine:
        requests = [look(256 + 32 * (n % 9), 512) for n in range(48)]
        results = list(generate_many(engine, requests))
        assert all(len(each.token_ids) == 64 for each in results)
        assert not any(each.notes for each in results), "memory was not short"
        assert sum(each.num_cached_tokens > 0 for each in generate_many(engine, requests)) > 40


def test_graphs_run_after_memory_was_given_back():
    """Their workspaces of cuBLAS are not given back with it: a request that fails in a batch ended
    in an illegal memory access of the next step."""
    runner = GraphRunner(torch.device("cuda"))
    x, weights = (torch.randn(rows, 16384, device="cuda", dtype=torch.bfloat16) for rows in (8, 64))
    results = []

    def products():
        results[:] = [x @ weights.t() for _ in range(8)]

    runner.capture("products", products)
    release("cuda")
    filled = torch.full((2**28,), 7.0, device="cuda")  # where the workspace would have been
    runner.replay("products")
    torch.cuda.synchronize()
    expected = x @ weights.t()
    assert all((result - expected).abs().max() < 1e-2 * expected.abs().max() for result in results)
    assert bool((filled == 7.0).all())


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT8, Quantization.INT4])
def test_a_request_that_fails_leaves_the_others_their_graphs(quantization, monkeypatch):
    requests = [look(256, 256, 24) for _ in range(4)]
    with NativeEngine(config(quantization=quantization)) as engine:
        lone = engine.generate(requests[0]).token_ids
        generate_all = functools.partial(generate_many, engine, requests)
        assert all(len(each.token_ids) == 24 for each in generate_all())
        runner = engine._queue._runner
        prefill, calls = runner.prefill, itertools.count()

        def first_fails(*arguments):
            if next(calls) == 0:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return prefill(*arguments)

        monkeypatch.setattr(runner, "prefill", first_fails)
        assert all(len(each.token_ids) == 24 for each in generate_all())
        assert next(calls) > 1
        assert engine.generate(requests[0]).token_ids == lone
        assert all(len(each.token_ids) == 24 for each in generate_all())
