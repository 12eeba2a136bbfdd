"""The transformers engine on a CUDA device."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from qwencli.config import Attention, Cache, Quantization, SamplingOptions
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.errors import MissingDependencyError, OutOfMemoryError, UnsupportedModeError
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import CONFIGS, VISION_FAMILIES, engine_config, picture

GREEDY = SamplingOptions(do_sample=False, max_new_tokens=24)


def ask(images=(), sampling=GREEDY):
    return GenerationRequest(
        (user_message("Describe this image.", tuple(images)),), sampling, ignore_eos=True
    )


def cuda_config(folder, **settings):
    return engine_config(folder, **{"device": "cuda", **settings})


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_answers(checkpoint, family):
    images = (picture(), picture(96, 64)) if family in VISION_FAMILIES else ()
    with TransformersEngine(cuda_config(checkpoint(family))) as engine:
        result = engine.generate(ask(images))
    assert result.num_new_tokens == 24
    assert (result.effective.device, result.effective.dtype) == ("cuda:0", "bfloat16")
    assert len(result.token_gpu_ms) == 24
    t = result.timings
    assert list(result.token_t_s) == sorted(result.token_t_s)
    assert t.ttft_s >= t.prefill_s + (t.vision_encode_s or 0)
    assert t.e2e_s >= t.ttft_s + t.decode_s
    assert sum(result.token_gpu_ms[1:]) == pytest.approx(1e3 * t.decode_s, rel=1e-3)


def test_recorded_tokens_are_those_of_plain_generate(checkpoint):
    with TransformersEngine(cuda_config(checkpoint("qwen3"))) as engine:
        result = engine.generate(ask())
        prompt = engine.files.prompts.build(ask().messages)
        ids = torch.tensor([prompt.input_ids], device="cuda")
        plain = engine._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )
    assert result.token_ids == tuple(plain[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    ("cache", "attention"),
    [
        (Cache.DYNAMIC, Attention.EAGER),
        (Cache.STATIC, Attention.SDPA),
        (Cache.STATIC, Attention.EAGER),
        (Cache.STATIC_COMPILE, Attention.SDPA),
    ],
)
def test_caches_and_attention_kernels_run_as_asked(checkpoint, cache, attention):
    config = cuda_config(checkpoint("qwen3_vl"), cache=cache, attention=attention)
    with TransformersEngine(config) as engine:
        first = engine.generate(ask([picture()]))
        assert engine.generate(ask([picture()])).token_ids == first.token_ids
    assert (first.effective.cache, first.effective.attention) == (cache.value, attention.value)


@pytest.mark.parametrize(
    ("quantization", "scheme"), [(Quantization.INT4, "bnb-nf4"), (Quantization.INT8, "bnb-int8")]
)
@pytest.mark.parametrize("cache", [Cache.DYNAMIC, Cache.STATIC])
def test_quantized_weights_run(checkpoint, quantization, scheme, cache):
    config = cuda_config(checkpoint("qwen3_vl"), quantization=quantization, cache=cache)
    with TransformersEngine(config) as engine:
        assert engine.generate(ask([picture()])).effective.quantization == scheme


def test_a_quantized_model_is_not_said_to_be_compiled(checkpoint):
    config = cuda_config(
        checkpoint("qwen3_vl"), quantization=Quantization.INT4, cache=Cache.STATIC_COMPILE
    )
    with pytest.raises(UnsupportedModeError, match="does not compile"):
        TransformersEngine(config).load()


def test_flash_attention_runs_or_says_what_is_missing(checkpoint):
    config = cuda_config(checkpoint("qwen3_vl"), attention=Attention.FLASH)
    if importlib.util.find_spec("flash_attn"):
        with TransformersEngine(config) as engine:
            assert engine.generate(ask([picture()])).effective.attention == "flash_attention_2"
    else:
        with pytest.raises(MissingDependencyError, match="package flash-attn is not installed"):
            TransformersEngine(config).load()


def test_out_of_memory_is_typed_and_the_engine_goes_on(checkpoint):
    with TransformersEngine(cuda_config(checkpoint("qwen3"))) as engine:
        expected = engine.generate(ask()).token_ids
        held = engine._model.forward

        def greedy_for_memory(*arguments, **keywords):
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return held(*arguments, **keywords)

        engine._model.forward = greedy_for_memory
        with pytest.raises(OutOfMemoryError, match="GiB free"):
            engine.generate(ask())
        engine._model.forward = held
        assert engine.generate(ask()).token_ids == expected


def test_close_gives_the_memory_back(checkpoint):
    config = cuda_config(checkpoint("qwen3_vl"))
    with TransformersEngine(config) as engine:
        engine.generate(ask([picture()]))
    before = torch.cuda.memory_allocated()
    with TransformersEngine(config) as engine:
        engine.generate(ask([picture()]))
        assert torch.cuda.memory_allocated() > before
    assert torch.cuda.memory_allocated() == before
