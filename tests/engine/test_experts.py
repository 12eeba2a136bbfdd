"""Mixtures of experts in the engine, on the CPU: against transformers, in batches, quantized."""

from __future__ import annotations

import pytest
import torch

from qwencli.config import Attention, Cache, EngineName, Quantization, SamplingOptions, Speculate
from qwencli.engine.client import generate_many
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.loading import weights
from qwencli.engine.native.engine import NativeEngine
from qwencli.errors import UnsupportedModeError
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.memory import native_weight_bytes
from qwencli.models.shape_reader import read_shape
from tests.checkpoints import MIXTURES, engine_config, hub_config, picture

FAMILIES = ("qwen3_5_moe", "qwen3_vl_moe", "qwen3_moe")
CPU = torch.device("cpu")


def ask(text: str, images: tuple[object, ...] = (), new: int = 64) -> GenerationRequest:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=new)
    return GenerationRequest((user_message(text, images),), sampling, ignore_eos=True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def engine(checkpoint, family):
    with NativeEngine(engine_config(checkpoint(family), engine=EngineName.NATIVE)) as loaded:
        yield loaded


def test_64_tokens_are_those_of_transformers(checkpoint, family, engine):
    images = (picture(), picture(96, 64)) if "vision_config" in MIXTURES[family] else ()
    request = ask("Describe this image.", images)
    with TransformersEngine(engine_config(checkpoint(family))) as reference:
        expected = reference.generate(request)
    result = engine.generate(request)
    assert result.token_ids == expected.token_ids
    assert len(set(result.token_ids)) > 8, "a constant answer would prove little"


def test_each_answer_of_a_batch_is_the_one_its_request_gets_alone(family, engine):
    images = (picture(96, 64),) if "vision_config" in MIXTURES[family] else ()
    requests = [ask("What? " * n, images[: n % 2], 2 + 3 * n) for n in range(1, 4)]
    alone = [engine.generate(request) for request in requests]
    together = list(generate_many(engine, requests))
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


@pytest.mark.parametrize(
    ("mode", "scheme"),
    [
        (Quantization.INT8, "int8"),
        (Quantization.FP8, "fp8-e4m3"),
        (Quantization.INT4, "int4-g64+int8"),  # 48 columns are no groups
    ],
)
def test_experts_are_quantized_and_kept(checkpoint, mode, scheme):
    """The second load reads what the first one kept."""
    folder = checkpoint("qwen3_moe")
    settings = {"engine": EngineName.NATIVE, "quantization": mode}
    answers = []
    for _ in range(2):
        with NativeEngine(engine_config(folder, **settings)) as loaded:
            answers.append(loaded.generate(ask("Say something.", new=8)))
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].effective.quantization == scheme


@pytest.mark.parametrize("mode", Quantization)
def test_the_memory_plan_counts_experts(mode):
    shape = read_shape(hub_config("qwen3_moe", {"moe_intermediate_size": 128, "hidden_size": 128}))
    loaded = weights.dummy(shape, torch.bfloat16, CPU, mode)
    used = sum(tensor.nbytes for tensor in loaded.tensors.values())
    used += sum(matrix.nbytes for matrix in loaded.matrices.values())
    assert native_weight_bytes(shape, mode, 2) == used
    assert "text.0.router" in loaded.tensors
    assert ("text.0.gate_up" in loaded.matrices) is (mode is not Quantization.NONE)


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"cache": Cache.DYNAMIC}, "static"),
        ({"cache": Cache.STATIC_COMPILE}, "static"),
        ({"attention": Attention.EAGER}, "sdpa"),
    ],
)
def test_modes_that_rows_do_not_have_are_refused(checkpoint, settings, nearest):
    engine = NativeEngine(
        engine_config(checkpoint("qwen3_moe"), engine=EngineName.NATIVE, **settings)
    )
    with pytest.raises(UnsupportedModeError, match="rows") as caught:
        engine.load()
    assert caught.value.nearest == nearest


def test_drafts_and_batch_invariance_give_the_same_answers(checkpoint):
    requests, answers = [ask("yes no " * n, new=12) for n in (3, 9)], []
    for settings in ({}, {"speculate": Speculate.TWO}, {"batch_invariant": True}):
        config = engine_config(checkpoint("qwen3_moe"), engine=EngineName.NATIVE, **settings)
        with NativeEngine(config) as engine:
            answers.append([each.token_ids for each in generate_many(engine, requests)])
    assert answers[0] == answers[1] == answers[2]
