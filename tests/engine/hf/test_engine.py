"""The transformers engine on small random checkpoints, on the CPU."""

from __future__ import annotations

import dataclasses

import pytest

from qwencli.config import Attention, Cache, Quantization, SamplingOptions
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.errors import InputError, UnsupportedModeError
from qwencli.messages import GenerationRequest, text_message, user_message
from tests.checkpoints import CONFIGS, VISION_FAMILIES, engine_config, picture

GREEDY = SamplingOptions(do_sample=False, max_new_tokens=12)


def ask(text="Describe this image.", images=(), sampling=GREEDY, *, ignore_eos=True):
    return GenerationRequest((user_message(text, tuple(images)),), sampling, ignore_eos)


@pytest.fixture(scope="module")
def engine(checkpoint):
    with TransformersEngine(engine_config(checkpoint("qwen3_vl"))) as loaded:
        yield loaded


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_answers_and_vision_families_look(checkpoint, family):
    images = (picture(), picture(96, 64)) if family in VISION_FAMILIES else ()
    with TransformersEngine(engine_config(checkpoint(family))) as loaded:
        result = loaded.generate(ask(images=images))
    assert result.num_new_tokens == 12
    assert result.text
    assert result.finish_reason == "length"
    assert (result.num_image_tokens > 0) == bool(images)
    assert (result.timings.vision_encode_s is None) == (not images)


def test_equal_to_plain_generate(engine):
    """The recorder, the greedy settings and the prompt change nothing about the tokens."""
    import torch

    request = ask(images=[picture()])
    result = engine.generate(request)
    prompt = engine.files.prompts.build(request.messages)
    plain = engine._model.generate(
        input_ids=torch.tensor([prompt.input_ids]),
        attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.int64),
        pixel_values=torch.from_numpy(prompt.inputs.patches[0]),
        image_grid_thw=torch.tensor(prompt.grid_thw),
        mm_token_type_ids=torch.tensor([prompt.mm_token_type_ids]),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    assert result.token_ids == tuple(plain[0, len(prompt.input_ids) :].tolist())


def test_the_picture_changes_the_answer(engine):
    one = engine.generate(ask(images=[picture(64, 64)]))
    other = engine.generate(ask(images=[picture(128, 64)]))
    assert one.token_ids != other.token_ids


def test_chunks_add_up_and_the_last_carries_the_result(engine):
    chunks = list(engine.stream(ask(images=[picture()])))
    result = chunks[-1].result
    assert all(chunk.result is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(t for chunk in chunks for t in chunk.token_ids) == result.token_ids


def test_timings_are_consistent(engine):
    result = engine.generate(ask(images=[picture()]))
    t = result.timings
    assert len(result.token_t_s) == result.num_new_tokens
    assert list(result.token_t_s) == sorted(result.token_t_s)
    assert t.decode_s == pytest.approx(result.token_t_s[-1] - result.token_t_s[0], rel=1e-6)
    assert t.decode_tok_per_s == pytest.approx((result.num_new_tokens - 1) / t.decode_s)
    assert t.ttft_s >= t.preprocess_s + t.vision_encode_s + t.prefill_s
    assert t.e2e_s >= t.ttft_s + t.decode_s
    assert result.token_gpu_ms is None


def test_stop_token_ends_the_answer_and_is_not_text(checkpoint, engine):
    free = engine.generate(ask())
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    files = dataclasses.replace(engine._files, stop_token_ids=(stop,))
    original, engine._files = engine._files, files
    try:
        stopped = engine.generate(ask(ignore_eos=False))
    finally:
        engine._files = original
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert free.text.startswith(stopped.text)


def test_abandoned_stream_leaves_the_engine_usable(engine):
    expected = engine.generate(ask())
    stream = engine.stream(ask())
    next(stream)
    stream.close()
    assert engine.generate(ask()).token_ids == expected.token_ids


@pytest.mark.parametrize("cache", [Cache.STATIC])
@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.EAGER])
def test_caches_and_attention_kernels_agree(checkpoint, engine, cache, attention):
    expected = engine.generate(ask(images=[picture()]))
    config = engine_config(checkpoint("qwen3_vl"), cache=cache, attention=attention)
    with TransformersEngine(config) as loaded:
        result = loaded.generate(ask(images=[picture()]))
    assert result.token_ids == expected.token_ids
    assert (result.effective.cache, result.effective.attention) == (cache.value, attention.value)


@pytest.mark.parametrize(
    ("quantization", "scheme"), [(Quantization.INT4, "bnb-nf4"), (Quantization.INT8, "bnb-int8")]
)
def test_quantized_weights_load_run_and_are_read_back(checkpoint, quantization, scheme):
    config = engine_config(checkpoint("qwen3_vl"), quantization=quantization)
    with TransformersEngine(config) as loaded:
        result = loaded.generate(ask(images=[picture()]))
    assert result.effective.quantization == scheme
    assert result.num_new_tokens == 12


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"quantization": Quantization.FP8}, "8bit"),
        ({"attention": Attention.FLASH}, "sdpa"),
        ({"cache": Cache.STATIC_COMPILE}, "static"),
        ({"cache": Cache.STATIC_GRAPH}, "static-compile"),
    ],
)
def test_modes_that_cannot_run_here_name_the_nearest(checkpoint, settings, nearest):
    with pytest.raises(UnsupportedModeError) as caught:
        TransformersEngine(engine_config(checkpoint("qwen3"), **settings)).load()
    assert caught.value.nearest == nearest


def test_prompt_longer_than_the_model_is_refused_with_figures(engine):
    long = SamplingOptions(do_sample=False, max_new_tokens=4090)
    with pytest.raises(InputError, match=r"4090 new ones.*holds 4096"):
        engine.generate(ask(sampling=long))
    assert engine.generate(ask()).num_new_tokens == 12


def test_system_prompt_and_history_reach_the_model(engine):
    plain = engine.generate(ask("Describe"))
    steered = engine.generate(
        GenerationRequest(
            (text_message("system", "left"), *ask("Describe").messages), GREEDY, ignore_eos=True
        )
    )
    assert steered.num_prompt_tokens > plain.num_prompt_tokens


def test_close_frees_and_load_brings_back(checkpoint):
    engine = TransformersEngine(engine_config(checkpoint("qwen3")))
    first = engine.generate(ask())
    engine.close()
    assert engine._model is None
    assert engine.generate(ask()).token_ids == first.token_ids
    engine.close()
