"""The native engine against the transformers engine on small random checkpoints, on the CPU."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import shutil
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qwencli.config import Attention, Cache, DType, EngineName, SamplingOptions
from qwencli.engine.cpu.attention import NumpyAttention
from qwencli.engine.frontend.model_files import FoundModel
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.loading import reader, weights
from qwencli.engine.machine.python_runtime import PASS_TURN_S
from qwencli.engine.native.engine import NativeEngine
from qwencli.errors import (
    InputError,
    LoadStoppedError,
    ModelFileError,
    OutOfMemoryError,
    UnsupportedModeError,
)
from qwencli.messages import GenerationRequest, text_message, user_message
from tests.checkpoints import CONFIGS, VISION_FAMILIES, engine_config, film, picture

GREEDY = SamplingOptions(do_sample=False, max_new_tokens=64)
LONG = SamplingOptions(do_sample=False, max_new_tokens=40)


def ask(text="Describe this image.", images=(), sampling=GREEDY):
    return GenerationRequest((user_message(text, tuple(images)),), sampling, ignore_eos=True)


def native_config(folder, **settings):
    return engine_config(folder, engine=EngineName.NATIVE, **settings)


@pytest.fixture(scope="module")
def engine(checkpoint):
    with NativeEngine(native_config(checkpoint("qwen3_vl"))) as loaded:
        yield loaded


@pytest.mark.parametrize("family", CONFIGS)
def test_same_tokens_as_transformers(checkpoint, family):
    images = (picture(), picture(96, 64)) if family in VISION_FAMILIES else ()
    request = ask(images=images)
    with TransformersEngine(engine_config(checkpoint(family))) as reference:
        expected = reference.generate(request)
    with NativeEngine(native_config(checkpoint(family))) as loaded:
        result = loaded.generate(request)
    assert result.token_ids == expected.token_ids
    assert result.num_image_tokens == expected.num_image_tokens
    assert len(set(result.token_ids)) > 8, "a constant answer would prove little"


@pytest.mark.parametrize(
    ("asked", "ran"),
    [
        ({}, "numpy+sdpa"),
        ({"cache": Cache.DYNAMIC}, "sdpa"),
        ({"attention": Attention.SDPA}, "sdpa"),
        ({"attention": Attention.EAGER}, "eager"),
        ({"dtype": DType.BFLOAT16}, "sdpa"),
    ],
    ids=str,
)
def test_attention_is_named_as_it_ran(checkpoint, monkeypatch, asked, ran):
    """numpy attends where the attention was left to the engine, and nowhere else."""
    calls = []
    monkeypatch.setattr(
        NumpyAttention,
        "__call__",
        lambda self, index, call=NumpyAttention.__call__: (calls.append(index), call(self, index)),
    )
    with NativeEngine(native_config(checkpoint("qwen3"), **asked)) as loaded:
        result = loaded.generate(ask())
    assert result.effective.attention == ran
    assert bool(calls) == ("numpy" in ran)


@pytest.mark.parametrize("cache", [Cache.DYNAMIC, Cache.STATIC])
@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.EAGER])
@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5},
        {"temperature": 1.5, "top_k": 0, "min_p": 0.02, "seed": 6},
    ],
)
def test_modes_agree(checkpoint, engine, cache, attention, sampling):
    request = ask(images=[picture()], sampling=SamplingOptions(max_new_tokens=24, **sampling))
    expected = engine.generate(request)
    config = native_config(checkpoint("qwen3_vl"), cache=cache, attention=attention)
    with NativeEngine(config) as other:
        assert other.generate(request).token_ids == expected.token_ids
        assert (other.effective.cache, other.effective.attention) == (cache.value, attention.value)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_videos_give_the_same_tokens_as_transformers(checkpoint, family):
    shown = [picture(96, 64), film(5), film(2, 96, 40)]
    # Small frames: the models' own bounds would make thousands of tokens.
    bounds = {"min_pixels": 1024, "max_pixels": 4096}
    with TransformersEngine(engine_config(checkpoint(family), **bounds)) as reference:
        expected = reference.generate(ask(images=shown))
    with NativeEngine(native_config(checkpoint(family), **bounds)) as native:
        result = native.generate(ask(images=shown))
        assert result.token_ids == expected.token_ids
        assert result.num_image_tokens == expected.num_image_tokens > 0
        still = native.generate(ask(images=shown[:1])).token_ids
        assert still != result.token_ids
        # From the features kept, and with the video's order changed.
        assert native.generate(ask(images=shown)).token_ids == expected.token_ids
        frames = tuple(reversed(shown[1].frames))
        backwards = dataclasses.replace(shown[1], frames=frames)
        other = native.generate(ask(images=[shown[0], backwards, shown[2]]))
        assert other.token_ids != expected.token_ids


def test_repetition_penalty_as_transformers_applies_it(checkpoint, engine):
    sampling = SamplingOptions(do_sample=False, max_new_tokens=24, repetition_penalty=1.3)
    with TransformersEngine(engine_config(checkpoint("qwen3_vl"))) as reference:
        expected = reference.generate(ask(sampling=sampling))
    assert engine.generate(ask(sampling=sampling)).token_ids == expected.token_ids


def chat_turns(engine, turns=3):
    """Greedy turns of one chat with a picture in the first; returns the answers' tokens."""
    messages = [user_message("Describe this image.", (picture(),))]
    answers = []
    for _ in range(turns):
        result = engine.generate(
            GenerationRequest(tuple(messages), SamplingOptions(do_sample=False, max_new_tokens=12))
        )
        answers.append((result.num_prompt_tokens, result.token_ids))
        messages += [text_message("assistant", result.text), user_message("left")]
    return answers


@pytest.mark.parametrize("cache", [Cache.DYNAMIC, Cache.STATIC])
def test_a_next_turn_prefills_only_what_is_new(checkpoint, monkeypatch, cache):
    with NativeEngine(native_config(checkpoint("qwen3_vl"), cache=cache)) as loaded:
        without_reuse = []
        for number in range(1, 4):
            loaded._forget()
            without_reuse = chat_turns(loaded, number)
        loaded._forget()
        encoded, prefilled = [], []
        model = loaded._generation._model
        encode, prefill = model.encode_images, model.prefill
        monkeypatch.setattr(
            model, "encode_images", lambda *a, **k: encoded.append(1) or encode(*a, **k)
        )

        def counting(inputs, kv, start=0, stop=None):
            prefilled.append(inputs.length - start)
            return prefill(inputs, kv, start=start)

        monkeypatch.setattr(model, "prefill", counting)
        assert chat_turns(loaded) == without_reuse
    assert len(encoded) == 1
    prompts = [tokens for tokens, _ in without_reuse]
    assert prefilled[0] == prompts[0]
    # At least the whole earlier prompt is reused. The answer is too where its text tokenizes back
    # to the tokens it was made of, which random bytes need not.
    grown = [after - before for before, after in itertools.pairwise(prompts)]
    assert all(new <= added for new, added in zip(prefilled[1:], grown, strict=True))


def test_a_request_from_scratch_repeats_vision_and_prefill(engine, monkeypatch):
    request = ask(images=[picture()])
    expected = engine.generate(request)
    prefilled = []
    model, prefill = engine._generation._model, engine._generation._model.prefill

    def counting(inputs, kv, start=0, stop=None):
        prefilled.append(inputs.length - start)
        return prefill(inputs, kv, start=start)

    monkeypatch.setattr(model, "prefill", counting)
    assert engine.generate(request).timings.vision_encode_s is None
    again = engine.generate(dataclasses.replace(request, bypass_caches=True))
    assert again.timings.vision_encode_s > 0
    assert prefilled == [1, again.num_prompt_tokens]
    assert again.token_ids == expected.token_ids


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_load_that_fails_at_its_end_keeps_nothing(checkpoint, monkeypatch, error):
    engine, made = NativeEngine(native_config(checkpoint("qwen3_vl"))), []

    def fails(self, *_):
        made.append(weakref.ref(self._model.decoder.embedding))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "_begin_cache_write", fails)
        with pytest.raises((KeyboardInterrupt, ValueError)):
            engine.load()
    gc.collect()
    assert made[0]() is None
    with engine:
        assert engine.generate(ask()).token_ids


def test_out_of_memory_while_loading_is_one_line(checkpoint, monkeypatch):
    def exhausted(*_):
        raise torch_out_of_memory()

    engine = NativeEngine(native_config(checkpoint("qwen3")))
    with monkeypatch.context() as patch:
        patch.setattr("qwencli.engine.native.engine.weights.begin", exhausted)
        with pytest.raises(OutOfMemoryError, match="while loading"):
            engine.load()
    assert engine.generate(ask()).num_new_tokens == 64
    engine.close()


def test_weights_are_read_while_the_tokenizer_is(checkpoint, monkeypatch):
    order = []
    begin, open_files = weights.begin, FoundModel.open

    def noted(what, work):
        return lambda *given: (order.append(what), work(*given))[1]

    monkeypatch.setattr(weights, "begin", noted("weights", begin))
    monkeypatch.setattr(FoundModel, "open", noted("tokenizer", open_files))
    with NativeEngine(native_config(checkpoint("qwen3"))):
        assert order == ["weights", "tokenizer"]


def test_a_tokenizer_that_cannot_be_read_ends_the_reading_of_weights(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "broken"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match="tokenizer"):
        NativeEngine(native_config(folder)).load()
    assert not [each for each in threading.enumerate() if each.name.startswith("reader")]


def test_a_load_is_stopped_while_it_reads(checkpoint, monkeypatch):
    engine = NativeEngine(native_config(checkpoint("qwen3")))
    reading, fill = threading.Event(), reader._fill

    def slow(*given):
        reading.set()
        time.sleep(0.05)
        fill(*given)

    monkeypatch.setattr(reader, "_fill", slow)
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(engine.load)
        assert reading.wait(60)
        engine.stop_load()
        with pytest.raises(LoadStoppedError):
            load.result(60)
    done, total = engine.weights_read
    assert done < total
    engine.close()


def test_another_picture_of_the_same_size_is_not_mistaken(engine):
    dark = picture()
    light = dataclasses.replace(dark, image=dark.image.point(lambda value: 255 - value))
    first, second = ask(images=[dark]), ask(images=[light])
    fresh = engine.generate(second).token_ids
    assert engine.generate(first).token_ids != fresh
    assert engine.generate(second).token_ids == fresh


def test_a_cancelled_request_leaves_cache_and_engine_usable(engine):
    expected = engine.generate(ask(images=[picture()])).token_ids
    stream = engine.stream(ask(images=[picture()]))
    for _ in range(5):
        next(stream)
    stream.close()
    assert engine.generate(ask(images=[picture()])).token_ids == expected


def test_a_failed_request_leaves_cache_and_engine_usable(engine, monkeypatch):
    expected = engine.generate(ask()).token_ids
    stepper = engine._generation._stepper

    def broken(slot):
        raise torch_out_of_memory()

    monkeypatch.setattr(stepper, "run", broken)
    with pytest.raises(OutOfMemoryError, match="answering a prompt"):
        engine.generate(ask())
    monkeypatch.undo()
    assert engine.generate(ask()).token_ids == expected


def test_a_request_that_finds_no_memory_is_tried_once_more(engine, monkeypatch):
    expected = engine.generate(ask()).token_ids
    model = engine._generation._model
    prefill, tries = model.prefill, []

    def tight(*arguments, **keywords):
        tries.append(1)
        if len(tries) == 1:
            raise torch_out_of_memory()
        return prefill(*arguments, **keywords)

    monkeypatch.setattr(model, "prefill", tight)
    assert engine.generate(ask()).token_ids == expected
    assert len(tries) == 2


def torch_out_of_memory():
    import torch

    return torch.OutOfMemoryError("CUDA out of memory.")


def test_stop_token_ends_the_answer_early(engine, monkeypatch):
    free = engine.generate(ask())
    stop = free.token_ids[5]
    monkeypatch.setattr(engine, "_files", dataclasses.replace(engine.files, stop_token_ids=(stop,)))
    stopped = engine.generate(GenerationRequest(ask().messages, GREEDY))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


@pytest.mark.parametrize("engine_class", [NativeEngine, TransformersEngine])
def test_stop_strings_end_the_answer_before_they_begin(checkpoint, engine_class):
    name = EngineName.NATIVE if engine_class is NativeEngine else EngineName.TRANSFORMERS
    with engine_class(engine_config(checkpoint("qwen3"), engine=name)) as loaded:

        def answer(*stop):
            sampling = dataclasses.replace(LONG, stop=stop)
            return loaded.generate(GenerationRequest(ask().messages, sampling))

        free = answer()
        # From inside one token's text into the next one's, so that it spans tokens.
        stop = free.text[10:16]
        stopped = answer("not in there", stop)
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.finish_reason == "stop"
        assert 1 < stopped.num_new_tokens < free.num_new_tokens
        assert stopped.token_ids == free.token_ids[: stopped.num_new_tokens]
        streamed = GenerationRequest(ask().messages, dataclasses.replace(LONG, stop=(stop,)))
        pieces = [chunk.text for chunk in loaded.stream(streamed)]
        assert "".join(pieces) == stopped.text
        # What only looked like a beginning is given out in the end.
        assert answer(free.text[-1] + "never").text == free.text
        assert answer().token_ids == free.token_ids


def test_garbage_collection_is_off_while_decoding_and_on_afterwards(engine):
    during = {gc.isenabled() for chunk in engine.stream(ask()) if chunk.result is None}
    assert during == {False}
    assert gc.isenabled()


def test_the_host_is_quiet_from_the_first_picture_on(engine, monkeypatch):
    """Another Python thread is not waited for 5 ms at a time before the first token either."""
    seen = []
    model = engine._generation._model

    def watched(pass_of):
        def pass_(*args, **kwargs):
            seen.append((sys.getswitchinterval(), gc.isenabled()))
            return pass_of(*args, **kwargs)

        return pass_

    monkeypatch.setattr(model, "encode_images", watched(model.encode_images))
    monkeypatch.setattr(model, "prefill", watched(model.prefill))
    monkeypatch.setattr(engine, "_prompt", watched(engine._prompt))
    before = sys.getswitchinterval()
    engine.generate(dataclasses.replace(ask(images=[picture()]), bypass_caches=True))
    assert len(seen) == 3
    assert all(interval == pytest.approx(PASS_TURN_S) for interval, _ in seen)
    assert not any(collecting for _, collecting in seen)
    assert sys.getswitchinterval() == before


def test_one_hundred_pictures(engine):
    result = engine.generate(
        ask(images=[picture(32, 32)] * 100, sampling=SamplingOptions(max_new_tokens=2))
    )
    assert result.num_image_tokens == 100


def test_prompt_longer_than_the_cache_is_refused(checkpoint):
    with NativeEngine(native_config(checkpoint("qwen3"), max_seq_len=64)) as loaded:
        with pytest.raises(InputError, match="holds 64"):
            loaded.generate(ask())
        short = SamplingOptions(do_sample=False, max_new_tokens=4)
        assert loaded.generate(ask("a", sampling=short)).num_new_tokens == 4


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"cache": Cache.STATIC_GRAPH}, "static"),
        ({"attention": Attention.FLASH}, "sdpa"),
    ],
)
def test_modes_that_cannot_run_here_name_the_nearest(checkpoint, settings, nearest):
    with pytest.raises(UnsupportedModeError) as caught:
        NativeEngine(native_config(checkpoint("qwen3"), **settings)).load()
    assert caught.value.nearest == nearest


def test_timings_are_consistent(engine):
    engine._forget()
    result = engine.generate(ask(images=[picture()]))
    t = result.timings
    assert list(result.token_t_s) == sorted(result.token_t_s)
    assert t.decode_s == pytest.approx(result.token_t_s[-1] - result.token_t_s[0], rel=1e-6)
    assert t.ttft_s >= t.preprocess_s + t.vision_encode_s + t.prefill_s
    assert t.e2e_s >= t.ttft_s + t.decode_s


@pytest.mark.usefixtures("freezing")
def test_close_drops_the_model_and_load_brings_it_back(checkpoint):
    import weakref

    engine = NativeEngine(native_config(checkpoint("qwen3")))
    first = engine.generate(ask())
    weights = weakref.ref(engine._generation._model.decoder)
    engine.close()
    gc.collect()
    assert weights() is None
    assert engine.generate(ask()).token_ids == first.token_ids
    engine.close()


@pytest.mark.usefixtures("freezing")
def test_a_load_that_fails_leaves_out_of_collections_what_another_engine_has(checkpoint):
    gc.unfreeze()
    wrong = NativeEngine(native_config(checkpoint("qwen3"), attention=Attention.FLASH))
    with NativeEngine(native_config(checkpoint("qwen3"))):
        with NativeEngine(native_config(checkpoint("qwen2"))):
            with pytest.raises(UnsupportedModeError):
                wrong.load()
            assert gc.get_freeze_count()
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()
    with pytest.raises(UnsupportedModeError):
        wrong.load()
    assert not gc.get_freeze_count()


def test_engines_that_answer_in_turns_compute_with_their_own_threads(checkpoint, monkeypatch):
    before, seen = torch.get_num_threads(), {}

    def watched(engine):
        seen[engine.config.threads] = counts = []
        answer = engine._answer

        def counted(builder):
            for chunk in answer(builder):
                counts.append(torch.get_num_threads())
                yield chunk

        monkeypatch.setattr(engine, "_answer", counted)
        return engine.stream(ask())

    several, more = before + 1, before + 2
    with (
        NativeEngine(native_config(checkpoint("qwen3"), threads=several)) as first,
        NativeEngine(native_config(checkpoint("qwen3"), threads=more)) as second,
    ):
        one, two = watched(first), watched(second)
        for _ in range(3):
            next(one)
            assert torch.get_num_threads() == before
            next(two)
        one.close()
        rest = [*two]
    assert rest[-1].result is not None
    assert (set(seen[several]), set(seen[more])) == ({several}, {more})
    assert torch.get_num_threads() == before
