"""Models with gated delta nets on a GPU: kernels and graphs over rows, against the plain operators
and against transformers."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from qwencli.config import DType, EngineName, Kernels, Quantization, SamplingOptions, Speculate
from qwencli.engine.client import generate_many
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.spec_decode.policy import BatchDraftPolicy
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, picture
from tests.engine.native.mtp_reference import with_head

TEXT = "Some text that is scored, token by token, by both of them. " * 4


def config(checkpoint, **settings):
    settings = {"engine": EngineName.NATIVE, "device": "cuda", **settings}
    return engine_config(checkpoint("qwen3_5"), **settings)


def ask(text="Describe this.", images=(), tokens=64):
    sampling = SamplingOptions(do_sample=False, max_new_tokens=tokens)
    return GenerationRequest((user_message(text, tuple(images)),), sampling, ignore_eos=True)


def requests():
    asked = [ask("hello"), ask("What? " * 90), ask(images=[picture()])]
    asked += [ask(images=[picture(96, 64), picture(64, 64)], tokens=9)]
    # More rows than few, of unequal lengths; equal prompts become graphs.
    return asked + [ask(f"Number {number % 3}", tokens=5 + number) for number in range(12)]


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.TRITON])
def test_alone_and_in_rows_it_says_what_transformers_does(checkpoint, kernels):
    with TransformersEngine(
        engine_config(checkpoint("qwen3_5"), device="cuda", dtype=DType.FLOAT32)
    ) as reference:
        expected = [reference.generate(request).token_ids for request in requests()]
    with NativeEngine(config(checkpoint, dtype=DType.FLOAT32, kernels=kernels)) as engine:
        alone = [engine.generate(request) for request in requests()]
        assert [each.token_ids for each in alone] == expected
        for _ in range(3):  # the prompts of the later ones are graphs
            together = list(generate_many(engine, requests()))
            assert [each.token_ids for each in together] == expected
        assert alone[0].effective.cache == "static-graph"
        assert alone[0].effective.kernels == kernels.value


def test_bfloat16_is_no_further_from_float32_than_that_of_transformers(checkpoint):
    def scored(engine_class, **settings):
        with engine_class(config(checkpoint, **settings)) as engine:
            return np.stack(list(engine.log_probs(TEXT, 96)))

    exact = scored(TransformersEngine, engine=EngineName.TRANSFORMERS, dtype=DType.FLOAT32)
    theirs = scored(TransformersEngine, engine=EngineName.TRANSFORMERS, dtype=DType.BFLOAT16)
    ours = scored(NativeEngine, dtype=DType.BFLOAT16)
    assert np.abs(ours - exact).mean() <= 1.1 * np.abs(theirs - exact).mean()


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.INT4, Quantization.FP8])
def test_fewer_bits_run_in_rows(checkpoint, quantization):
    with NativeEngine(config(checkpoint, quantization=quantization)) as engine:
        asked = [ask("Why?", tokens=16), ask("Why? " * 40, tokens=16)]
        alone = [engine.generate(request) for request in asked]
        assert all("none" not in each.effective.quantization for each in alone)
        assert all(len(each.token_ids) == 16 for each in alone)
        again = [replace(each, bypass_caches=True) for each in asked]
        assert [engine.generate(each).token_ids for each in again] == [
            each.token_ids for each in alone
        ]


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.TRITON])
@pytest.mark.parametrize("head", [False, True], ids=["text", "head"])
def test_steps_that_check_drafts_give_what_plain_ones_do(
    checkpoint, tmp_path, monkeypatch, kernels, head
):
    """Alone and in rows that join and leave, whatever sizes steps have; each size is a graph, which
    is captured while rows are in the middle of their answers."""
    folder = checkpoint("qwen3_5")
    folder = with_head(folder, tmp_path / "model") if head else folder
    settings = {"engine": EngineName.NATIVE, "device": "cuda", "dtype": DType.FLOAT32}
    asked = [ask("hello"), ask("one two " * 40), ask(images=[picture()])]
    asked += [ask(f"Number {n} number {n}", tokens=9 + 5 * n) for n in range(5)]
    plain = engine_config(folder, kernels=kernels, **settings)
    with NativeEngine(plain) as engine:
        expected = [engine.generate(each).token_ids for each in asked]
    drafting = replace(plain, speculate=Speculate.AUTO)
    sizes, checked = random.Random(3), []

    def choose(policy, rows, texts):
        able = [size for size in (0, 1, 2, 4, 6) if size * rows <= 32]
        checked.append(sizes.choice(able))
        return checked[-1]

    with NativeEngine(drafting) as engine:
        assert engine.generate(asked[0]).token_ids == expected[0]  # as the policy chooses
        monkeypatch.setattr(BatchDraftPolicy, "next", choose)
        monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *rest: None)
        alone = [engine.generate(each) for each in asked[:4]]
        assert [each.token_ids for each in alone] == expected[:4]
        for _ in range(2):
            together = list(generate_many(engine, asked))
            assert [each.token_ids for each in together] == expected
        assert alone[0].effective.speculate == ("mtp" if head else "auto")
    assert {1, 2, 4, 6} <= set(checked)
