"""What studies do to the transformers engine takes effect, and is gone afterwards."""

from __future__ import annotations

import pytest
import torch

from qwencli.bench.plan.matrix_file import EXAMPLE_IMAGE
from qwencli.config import Attention, EngineConfig, EngineName, LoadFormat, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.images import open_image
from qwencli.engine.hf.generate import NO_OVERRIDES
from qwencli.engine.instruments import interventions
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model

PICTURE = open_image(EXAMPLE_IMAGE)
REQUEST = GenerationRequest(
    (user_message("Describe it.", (PICTURE,)),),
    SamplingOptions(do_sample=False, max_new_tokens=6),
    ignore_eos=True,
)


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(
        resolve_model("scenes"),
        engine=EngineName.TRANSFORMERS,
        attention=Attention.SDPA,
        device="cpu",
    )
    with create_engine(config) as engine:
        yield engine


@pytest.fixture(scope="module")
def answer(engine):
    return engine.generate(REQUEST).text


def passes(engine):
    """Tokens that each pass of the model reads."""
    read = []
    handle = engine.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    text = engine.generate(REQUEST).text
    handle.remove()
    return text, read


def test_without_a_cache_every_pass_reads_the_prompt(engine, answer):
    with interventions.changed(engine, generate={"use_cache": False, "cache_implementation": None}):
        text, read = passes(engine)
        timings = engine.generate(REQUEST).timings
    # The vision tower runs at every pass too; the phases are those of the first.
    assert 0 < timings.vision_encode_s < timings.ttft_s
    assert 0 < timings.prefill_s < timings.ttft_s
    assert text == answer
    assert read == list(range(read[0], read[0] + 6))
    assert passes(engine)[1][1:] == [1] * 5
    assert engine.overrides is NO_OVERRIDES


def test_no_grad_takes_the_place_of_inference_mode(engine, answer):
    modes = []
    handle = engine.model.register_forward_pre_hook(
        lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    with interventions.changed(engine, no_grad=True):
        assert engine.generate(REQUEST).text == answer
    engine.generate(REQUEST)
    handle.remove()
    assert modes == [(False, False)] * 6 + [(True, False)] * 6


def test_the_patches_are_a_matrix_product_meanwhile(engine, answer):
    embedding = engine.model.model.visual.patch_embed
    calls = []
    handle = embedding.proj.register_forward_hook(lambda *_: calls.append(1))
    with interventions.linear_patch_embedding(engine):
        assert engine.generate(REQUEST).text == answer
        assert not calls
    engine.generate(REQUEST)
    handle.remove()
    assert calls
    patches = torch.randn(8, embedding.proj.weight[0].numel())
    with torch.inference_mode():
        convolved = embedding(patches)
        with interventions.linear_patch_embedding(engine):
            torch.testing.assert_close(embedding(patches), convolved, rtol=1e-4, atol=1e-4)


def test_backends_are_forced_and_seen(engine, answer):
    with interventions.counted_sdpa_calls(engine) as calls:
        engine.generate(REQUEST)
    assert interventions.math_percent(calls) == 0.0
    depth = engine.model.config.vision_config.depth
    layers = engine.model.config.text_config.num_hidden_layers
    assert sum(calls.values()) == depth + interventions.WATCHED_PASSES * layers
    with (
        interventions.sdpa_backend("MATH"),
        interventions.counted_sdpa_calls(engine) as calls,
    ):
        assert engine.generate(REQUEST).text == answer
    assert interventions.math_percent(calls) == 100.0
    assert interventions.math_percent({}) is None


def test_the_first_pass_is_timed_on_the_host(engine):
    with interventions.timed_first_forward(engine) as times:
        result = engine.generate(REQUEST)
    began, ended = times
    assert 0 < ended - began <= result.timings.ttft_s
    assert not engine.model._forward_hooks


def test_the_slow_processor_is_timed_on_the_requests_pictures(engine):
    assert interventions.slow_processor_s(engine, REQUEST) > 0
    assert interventions.slow_processor_s(engine, GenerationRequest((user_message("Hi"),))) is None


@pytest.mark.parametrize(
    "overrides",
    [{"load": {"device_map": "auto"}}, {"through_host": True}, {"release_through_host": True}],
)
@pytest.mark.parametrize("load_format", LoadFormat)
def test_other_loads_give_the_same_model(overrides, load_format):
    config = EngineConfig(
        resolve_model("scenes"),
        engine=EngineName.TRANSFORMERS,
        device="cpu",
        load_format=load_format,
    )
    with create_engine(config) as engine:
        usual = engine.generate(REQUEST).token_ids
        ran = engine.effective
        with interventions.changed(engine, **overrides):
            engine.close()
            engine.load()
        assert engine.generate(REQUEST).token_ids == usual
        assert engine.effective == ran


def test_bitsandbytes_options_reach_the_layers():
    pytest.importorskip("bitsandbytes")
    from qwencli.config import Quantization

    config = EngineConfig(
        resolve_model("scenes"),
        engine=EngineName.TRANSFORMERS,
        quantization=Quantization.INT4,
        device="cpu",
    )
    with create_engine(config) as engine:
        assert engine.effective.quantization == "bnb-nf4"
        overrides = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"}
        with interventions.changed(engine, quantization=overrides):
            engine.close()
            engine.load()
        assert engine.effective.quantization == "bnb-fp4"


def test_a_warm_up_leaves_nothing_behind(engine, answer):
    interventions.warm_up_with_matmul("cpu")
    interventions.warm_up_with_answer(engine, REQUEST)
    interventions.empty_cache("cpu")
    assert engine.generate(REQUEST).text == answer
