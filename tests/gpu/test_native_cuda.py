"""The native engine on a CUDA device: graphs, steadiness, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.config import Attention, Cache, DType, EngineName, SamplingOptions
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.native.engine import NativeEngine
from qwencli.messages import GenerationRequest, user_message
from tests.chatting import answers_of_turns
from tests.checkpoints import CONFIGS, VISION_FAMILIES, engine_config, film, picture

GREEDY = SamplingOptions(do_sample=False, max_new_tokens=64)


def ask(images=(), sampling=GREEDY, text="Describe this image."):
    return GenerationRequest((user_message(text, tuple(images)),), sampling, ignore_eos=True)


def native_config(folder, **settings):
    return engine_config(folder, **{"engine": EngineName.NATIVE, "device": "cuda", **settings})


@pytest.mark.parametrize("family", CONFIGS)
def test_same_tokens_as_transformers_in_float32(checkpoint, family):
    images = (picture(), picture(96, 64)) if family in VISION_FAMILIES else ()
    reference = engine_config(checkpoint(family), device="cuda", dtype=DType.FLOAT32)
    with TransformersEngine(reference) as engine:
        expected = engine.generate(ask(images))
    with NativeEngine(native_config(checkpoint(family), dtype=DType.FLOAT32)) as engine:
        result = engine.generate(ask(images))
    assert result.token_ids == expected.token_ids
    assert result.effective.cache == "static-graph"


@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.EAGER])
@pytest.mark.parametrize("cache", [Cache.DYNAMIC, Cache.STATIC])
@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": False},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5},
        {"temperature": 1.2, "top_k": 0, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 6},
    ],
)
def test_graph_equals_other_modes(checkpoint, attention, cache, sampling):
    request = ask([picture()], SamplingOptions(max_new_tokens=64, **sampling))
    settings = {"attention": attention, "dtype": DType.FLOAT32}
    with NativeEngine(native_config(checkpoint("qwen3_vl"), **settings)) as graph:
        expected = graph.generate(request)
    with NativeEngine(native_config(checkpoint("qwen3_vl"), cache=cache, **settings)) as other:
        assert other.generate(request).token_ids == expected.token_ids


def test_compiled_equals_graph_greedy_and_with_a_seed(checkpoint):
    seeded = SamplingOptions(temperature=1.0, top_k=20, top_p=0.9, seed=5, max_new_tokens=64)
    results = []
    for cache in (Cache.STATIC_GRAPH, Cache.STATIC_COMPILE):
        config = native_config(checkpoint("qwen3_vl"), cache=cache, dtype=DType.FLOAT32)
        with NativeEngine(config) as engine:
            requests = (ask([picture()]), ask([picture()], seeded))
            results.append([engine.generate(request).token_ids for request in requests])
    assert results[0] == results[1]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_videos_give_the_same_tokens_as_transformers(checkpoint, family):
    shown = (picture(96, 64), film(5), film(2, 96, 40))
    settings = {"min_pixels": 1024, "max_pixels": 4096, "dtype": DType.FLOAT32}
    reference = engine_config(checkpoint(family), device="cuda", **settings)
    with TransformersEngine(reference) as engine:
        expected = engine.generate(ask(shown))
    with NativeEngine(native_config(checkpoint(family), **settings)) as engine:
        assert engine.generate(ask(shown)).token_ids == expected.token_ids


def test_a_stop_string_ends_the_answer_and_the_cache_stays_usable(checkpoint):
    with NativeEngine(native_config(checkpoint("qwen3_vl"))) as engine:
        request = GenerationRequest(ask([picture()]).messages, GREEDY)
        free = engine.generate(request)
        stop = replace(GREEDY, stop=(free.text[10:16],))
        stopped = engine.generate(replace(request, sampling=stop))
        assert stopped.text == free.text[: free.text.index(stop.stop[0])]
        assert stopped.num_new_tokens < free.num_new_tokens
        assert engine.generate(request).token_ids == free.token_ids


def test_answers_across_length_classes_equal_the_eager_ones(checkpoint):
    request = ask(sampling=SamplingOptions(do_sample=False, max_new_tokens=900))
    results = []
    for cache in (Cache.STATIC_GRAPH, Cache.STATIC):
        config = native_config(checkpoint("qwen3"), cache=cache, dtype=DType.FLOAT32)
        with NativeEngine(config) as engine:
            results.append(engine.generate(request).token_ids)
    assert results[0] == results[1]


def test_requests_of_all_kinds_in_turn_do_not_disturb_each_other(checkpoint):
    kinds = [{"do_sample": False}, {"top_k": 5, "seed": 1}, {"top_k": 0, "seed": 2}]
    requests = [ask([picture()], SamplingOptions(max_new_tokens=32, **kind)) for kind in kinds]
    with NativeEngine(native_config(checkpoint("qwen3_vl"))) as engine:
        first = [engine.generate(request).token_ids for request in requests]
        again = [engine.generate(request).token_ids for request in reversed(requests)]
    assert first == again[::-1]


def test_chat_turns_reuse_the_cache_with_equal_answers(checkpoint):
    config = native_config(checkpoint("qwen3_vl"), dtype=DType.FLOAT32)
    with NativeEngine(config) as engine:
        reused, anew = (answers_of_turns(engine, 64, forget=forget) for forget in (False, True))
    assert reused == anew


def test_decoding_allocates_nothing(checkpoint):
    with NativeEngine(native_config(checkpoint("qwen3_vl"))) as engine:
        engine.generate(ask([picture()]))
        stream = engine.stream(ask([picture()]))
        next(stream)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for chunk in stream:
            if chunk.result is None:
                assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_cancelled_requests_leave_equal_answers(checkpoint):
    with NativeEngine(native_config(checkpoint("qwen3_vl"))) as engine:
        expected = engine.generate(ask([picture()])).token_ids
        for cut in (1, 5, 20):
            stream = engine.stream(ask([picture()]))
            for _ in range(cut):
                next(stream)
            stream.close()
            assert engine.generate(ask([picture()])).token_ids == expected


def test_close_gives_every_byte_back(checkpoint):
    config = native_config(checkpoint("qwen3_vl"))
    with NativeEngine(config) as engine:
        engine.generate(ask([picture()]))
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free = torch.cuda.mem_get_info()[0]
    with NativeEngine(config) as engine:
        engine.generate(ask([picture()]))
        assert torch.cuda.memory_allocated() > allocated
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved
    assert torch.cuda.mem_get_info()[0] == free


def test_bfloat16_is_no_further_from_float32_than_transformers_is(checkpoint):
    def logits(engine_class, **settings):
        config = engine_config(checkpoint("qwen3"), device="cuda", **settings)
        with engine_class(config) as engine:
            ids = engine.files.prompts.build(ask().messages).input_ids
            with torch.inference_mode():
                if engine_class is TransformersEngine:
                    out = engine._model(input_ids=torch.tensor([ids], device="cuda")).logits[0, -1]
                else:
                    from qwencli.engine.native.prompt_inputs import ModelPrompt

                    model = engine._generation._model
                    inputs = model.prepare([ModelPrompt(ids)])
                    out = model.prefill(inputs, model.static_cache())[0]
            return out.float().log_softmax(-1).cpu()

    exact = logits(TransformersEngine, dtype=DType.FLOAT32)

    def divergence(other):
        return float((exact.exp() * (exact - other)).sum())

    theirs = divergence(logits(TransformersEngine))
    ours = divergence(logits(NativeEngine, engine=EngineName.NATIVE))
    assert ours <= 1.5 * theirs + 1e-4
