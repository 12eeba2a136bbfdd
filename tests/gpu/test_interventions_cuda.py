"""What studies do to the transformers engine on a real GPU: each takes effect and is undone."""

from __future__ import annotations

import pytest
import torch

from qwencli.bench.plan.matrix_file import EXAMPLE_IMAGE
from qwencli.bench.studies.conditions import CONDITIONS, ConditionContext, Load, why_not
from qwencli.config import (
    Attention,
    Cache,
    EngineConfig,
    EngineName,
    LoadFormat,
    Quantization,
    SamplingOptions,
)
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.images import open_image
from qwencli.engine.instruments import interventions
from qwencli.engine.machine.device import device_facts
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model

REQUEST = GenerationRequest(
    (user_message("Describe it.", (open_image(EXAMPLE_IMAGE),)),),
    SamplingOptions(do_sample=False, max_new_tokens=8),
    ignore_eos=True,
    bypass_caches=True,
)
ON_UNQUANTIZED = sorted(name for name in CONDITIONS if not name.startswith("bnb-"))
ON_4BIT = ("bnb-threshold", "bnb-defaults")


def engine_of(quantization=Quantization.NONE, load_format=LoadFormat.AUTO):
    return create_engine(
        EngineConfig(
            resolve_model("scenes"),
            engine=EngineName.TRANSFORMERS,
            quantization=quantization,
            attention=Attention.SDPA,
            cache=Cache.DYNAMIC,
            device="cuda:0",
            load_format=load_format,
        )
    )


def answer_under(engine, name):
    condition = CONDITIONS[name]
    assert why_not(name, EngineName.TRANSFORMERS, device_facts("cuda:0")) is None
    if condition.load is not Load.KEPT:
        with condition.loading(engine):
            engine.close()
            engine.load()
    at = ConditionContext(engine, REQUEST, {}, {})
    with condition.around(at):
        result = engine.generate(REQUEST)
    return result, at.observed


@pytest.mark.parametrize("name", ON_UNQUANTIZED)
def test_every_condition_runs(name):
    with engine_of() as engine:
        result, _ = answer_under(engine, name)
        assert result.num_new_tokens == 8


@pytest.mark.parametrize("name", ON_4BIT)
def test_every_4bit_condition_runs(name):
    with engine_of(Quantization.INT4) as engine:
        result, _ = answer_under(engine, name)
        assert result.num_new_tokens == 8
        assert engine.effective.quantization == ("bnb-fp4" if name == "bnb-defaults" else "bnb-nf4")


def test_an_ignored_argument_of_8bit_is_ignored():
    with engine_of(Quantization.INT8) as engine:
        result, _ = answer_under(engine, "bnb-8bit-compute-dtype")
        assert result.num_new_tokens == 8


def test_random_weights_pass_through_host_memory_too():
    with engine_of(load_format=LoadFormat.DUMMY) as engine:
        before = engine.generate(REQUEST).num_new_tokens
        result, _ = answer_under(engine, "load-fp32-host")
        assert result.num_new_tokens == before
        assert engine.effective.device == "cuda:0"
        assert engine.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_the_gap_is_there_and_is_given_back():
    with engine_of() as engine:
        engine.generate(REQUEST)
        reserved = torch.cuda.memory_reserved()
        with interventions.reserved_gap("cuda:0"):
            gap = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            assert gap >= interventions.GAP_BYTES
        assert torch.cuda.memory_reserved() <= reserved


def test_fragments_are_there_and_are_given_back():
    with engine_of() as engine:
        engine.generate(REQUEST)
        before = torch.cuda.memory_stats()["inactive_split_bytes.all.current"]
        with interventions.fragmented("cuda:0"):
            during = torch.cuda.memory_stats()["inactive_split_bytes.all.current"]
        assert during > before + (1 << 28)


def test_backends_are_seen():
    with engine_of() as engine:
        engine.generate(REQUEST)
        _, observed = answer_under(engine, "watched-sdpa")
        assert observed["sdpa_calls"]
        with interventions.sdpa_backend("MATH"), interventions.counted_sdpa_calls(engine) as calls:
            engine.generate(REQUEST)
        assert interventions.math_percent(calls) == 100.0
