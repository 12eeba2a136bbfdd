"""Many requests at once on the CPU: each answer is the one its request gets alone."""

from __future__ import annotations

import functools
import itertools
import sys
from concurrent import futures
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import many_requests
from qwencli.config import Attention, Cache, EngineName, KVDType, SamplingOptions, Speculate
from qwencli.engine import (
    engine_core,
    input_processor,
    runner,
    runner_prompt,
    scheduler,
    vision_batch,
)
from qwencli.engine.base_engine import BaseEngine
from qwencli.engine.cache.paged_kv import PAGE_SIZE
from qwencli.engine.client import generate_many
from qwencli.engine.constrained import read_schema
from qwencli.engine.factory import create_engine
from qwencli.engine.graphs import GraphRunner, RepeatedShapes
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.layers import vision_tower
from qwencli.engine.machine.python_runtime import PASS_TURN_S, STEP_TURN_S
from qwencli.engine.native import batch_plan
from qwencli.engine.native import engine as native_engine
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.request import Limits
from qwencli.engine.response import ResponseBuilder
from qwencli.engine.spec_decode.policy import BatchDraftPolicy
from qwencli.errors import (
    InputError,
    OutOfMemoryError,
    RequestError,
    UnsupportedModeError,
    UsageError,
)
from qwencli.messages import GenerationRequest, ImagePart, text_message, user_message
from tests.checkpoints import engine_config, film, picture
from tests.engine.native.host_graphs import run_graphs_on_the_host
from tests.engine.test_graphs import RunGraphs

# Few rows and tokens, so that requests wait, prompts are cut and rows are used again.
NARROW = Limits(max_rows=3, max_prefill_tokens=24, max_prompts=2)


def native_config(folder, **settings):
    return engine_config(folder, engine=EngineName.NATIVE, **settings)


@pytest.fixture(scope="module")
def engine(checkpoint):
    with NativeEngine(native_config(checkpoint("qwen3_vl"))) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def monkeypatch_of_module():
    """Memory is given back at once: looking for garbage takes longer than an answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
        patch.setattr(engine_core, "release", lambda device: None)
        yield patch


@pytest.fixture
def limited(engine, monkeypatch):
    """The engine with a queue of its own, of `NARROW` rows, in which requests that wait start
    together and in their order: what is being prepared is waited for."""
    monkeypatch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
    take = input_processor.InputProcessor.take

    def take_all(self):
        futures.wait(self._preparing.values())
        return take(self)

    monkeypatch.setattr(input_processor.InputProcessor, "take", take_all)
    engine._close_queue()
    yield engine
    engine._close_queue()


def ask(text="Describe this.", images=(), ignore_eos=True, **sampling):
    settings = {"do_sample": False, "max_new_tokens": 6, **sampling}
    message = user_message(text, tuple(images))
    return GenerationRequest((message,), SamplingOptions(**settings), ignore_eos=ignore_eos)


def mixed() -> list[GenerationRequest]:
    return [
        ask("A", max_new_tokens=1),
        ask("How many? " * 12, max_new_tokens=9),
        ask(images=[picture()], max_new_tokens=14),
        ask(images=[picture(96, 64), picture(64, 64)], max_new_tokens=3),
        ask(images=[film()], max_new_tokens=5),
        ask("B", repetition_penalty=1.4, max_new_tokens=12),
        ask("C", do_sample=None, temperature=1.0, top_k=20, seed=3, max_new_tokens=12),
        ask("D", do_sample=None, temperature=1.4, top_k=0, min_p=0.05, seed=4, max_new_tokens=8),
        ask("E", ignore_eos=False, max_new_tokens=20),
        ask("F" * 40, max_new_tokens=2),
    ]


def turned(quarters: int) -> ImagePart:
    still = picture()
    return ImagePart(still.image.rotate(90 * quarters + 3 * quarters), still.name)


def pages_are_all_free(engine) -> bool:
    pool = engine._queue._scheduler.pool
    return pool.num_free == pool.capacity


def test_each_answer_of_a_mix_is_the_one_its_request_gets_alone(limited):
    requests = mixed()
    alone = [limited.generate(request) for request in requests]
    limited._forget()
    together = list(generate_many(limited, requests))
    for one, other in zip(alone, together, strict=True):
        assert other.token_ids == one.token_ids
        assert (other.text, other.finish_reason) == (one.text, one.finish_reason)
        assert other.num_prompt_tokens == one.num_prompt_tokens
        assert (other.image_sizes, other.resized_sizes) == (one.image_sizes, one.resized_sizes)
        assert len(other.token_t_s) == len(other.token_ids)
        assert other.timings.prefill_s > 0 and other.timings.e2e_s >= other.timings.ttft_s > 0
    assert together[2].timings.vision_encode_s > 0
    assert together[0].timings.vision_encode_s is None
    assert pages_are_all_free(limited) and not limited.has_unfinished
    assert limited.max_rows == 3


def test_turns_at_the_interpreter_lock_are_longer_where_many_streams_are_read(limited, monkeypatch):
    """Passes over prompts, and steps of answers that nobody reads along, wait for nobody long."""
    list(generate_many(limited, [ask("A")]))  # makes the queue
    monkeypatch.setattr(engine_core, "MANY_STREAMS", 3)
    core, seen = limited._queue, []

    def watched(name):
        run = getattr(core, name)

        def run_(*args):
            turn = pytest.approx(sys.getswitchinterval(), rel=0.1)  # kept in whole microseconds
            seen.append((name, turn))
            return run(*args)

        monkeypatch.setattr(core, name, run_)

    watched("_prefill")
    watched("_decode")
    before = sys.getswitchinterval()

    def read_along(texts):
        seen.clear()
        for text in texts:
            limited.add(ask(text, max_new_tokens=9))
        while limited.has_unfinished:
            limited.step()
        assert sys.getswitchinterval() == before

    read_along("BCD")
    assert ("_decode", STEP_TURN_S) in seen
    passes = [turn for name, turn in seen if name == "_prefill"]
    assert passes == [PASS_TURN_S] * len(passes) != []
    read_along("BC")  # too few
    assert seen and all(turn == PASS_TURN_S for _, turn in seen)
    seen.clear()
    list(generate_many(limited, [ask(text, max_new_tokens=9) for text in "BCD"]))
    assert seen and all(turn == PASS_TURN_S for _, turn in seen)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3", "qwen2"])
def test_other_families(checkpoint, monkeypatch, family):
    monkeypatch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
    images = [picture(96, 64)] if family == "qwen2_5_vl" else []
    requests = [ask("What? " * n, images=images, max_new_tokens=2 + n) for n in range(1, 6)]
    with NativeEngine(native_config(checkpoint(family))) as loaded:
        alone = [loaded.generate(request) for request in requests]
        together = list(generate_many(loaded, requests))
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def system(text, request):
    return replace(request, messages=(text_message("system", text), *request.messages))


def test_pages_of_a_common_beginning_are_shared_and_not_run_again(limited, monkeypatch):
    scene, dark = picture(160, 160), ImagePart(Image.new("RGB", (160, 160)), "dark.png")
    requests = [
        system("Be brief. " * 12, ask(text, images=[scene], max_new_tokens=9))
        for text in ("What? " * 9, "What? " * 9, "Who?", "What? " * 9 + "Why?")
    ]
    others = [
        system("Be brief! " * 12, ask(images=[scene])),
        system("Be brief. " * 12, ask(images=[dark])),
    ]
    alone = []
    for request in (*requests, *others):
        limited._forget()
        alone.append(limited.generate(request).token_ids)
    limited._forget()
    ran, running = [], runner.ModelRunner.prefill

    def prefill(self, chunks, prompts, clock):
        ran.append(sum(chunk.stop - chunk.start for chunk in chunks))
        return running(self, chunks, prompts, clock)

    monkeypatch.setattr(runner.ModelRunner, "prefill", prefill)
    one_after_the_other = [next(generate_many(limited, [each])) for each in (*requests, *others)]
    assert [each.token_ids for each in one_after_the_other] == alone
    cached = [each.num_cached_tokens for each in one_after_the_other]
    lengths = [each.num_prompt_tokens for each in one_after_the_other]
    assert cached[0] == 0 and cached[1] == (lengths[1] - 1) // PAGE_SIZE * PAGE_SIZE
    assert cached[2] >= PAGE_SIZE and cached[3] >= cached[1] - PAGE_SIZE
    assert cached[4] == 0 and 0 < cached[5] < cached[1]
    assert sum(ran) == sum(lengths) - sum(cached)
    # The picture came with the first of them; in pages that are shared it is not even looked up.
    encoded = [each.timings.vision_encode_s is not None for each in one_after_the_other]
    assert encoded == [True, False, False, False, False, True]
    together = list(generate_many(limited, [*requests, *others] * 2))
    assert [each.token_ids for each in together] == alone * 2
    assert all(each.num_cached_tokens for each in together)
    assert pages_are_all_free(limited)


def test_the_next_turn_of_a_chat_goes_on_behind_the_answer(limited):
    first = ask("Tell me. " * 10, max_new_tokens=90)
    answer = next(generate_many(limited, [first])).text
    turns = (*first.messages, text_message("assistant", answer), user_message("And then?", ()))
    again = replace(first, messages=turns)
    (second,) = generate_many(limited, [again])
    assert second.num_cached_tokens > 0
    assert second.token_ids == limited.generate(again).token_ids


def test_a_request_that_bypasses_caches_takes_and_leaves_nothing(limited):
    request = ask("Again. " * 20, images=[picture()])
    (expected,) = generate_many(limited, [request])
    (bypassing,) = generate_many(limited, [replace(request, bypass_caches=True)])
    assert bypassing.num_cached_tokens == 0 and bypassing.timings.vision_encode_s > 0
    assert bypassing.token_ids == expected.token_ids


@pytest.mark.parametrize("kv_dtype", [KVDType.INT8, KVDType.FP8])
def test_a_quantized_cache_in_pages_holds_what_a_lone_one_does(checkpoint, monkeypatch, kv_dtype):
    monkeypatch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
    requests = [ask("Why? " * 30, images=[picture()], max_new_tokens=4 + n) for n in range(4)]
    requests += [ask("How? " * n, max_new_tokens=7) for n in range(1, 4)]
    with NativeEngine(native_config(checkpoint("qwen3_vl"), kv_dtype=kv_dtype)) as loaded:
        alone = [loaded.generate(request) for request in requests]
        together = list(generate_many(loaded, requests))
        assert loaded.max_rows == 3
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert together[3].num_cached_tokens > 0
    assert {each.effective.kv_dtype for each in together} == {alone[0].effective.kv_dtype}


def test_large_pictures_run_beside_the_rows_that_run(limited, monkeypatch):
    large = ask("Now? " * 8, images=[picture(96, 96), picture(160, 96)], max_new_tokens=5)
    small = [ask(f"{n}", max_new_tokens=14) for n in range(2)]
    requests = [*small, large, ask("After", images=[picture(64, 96)], max_new_tokens=3), large]
    expected = [limited.generate(request).token_ids for request in requests]
    limited._forget()
    depth = limited._model.vision.shape.depth
    for name in ("PIECE", "UNDIVIDED"):
        monkeypatch.setattr(vision_tower, name, 32)
    monkeypatch.setattr(runner_prompt, "PIECE", 32)
    monkeypatch.setattr(vision_batch, "blocks_worth", lambda *others: 1)
    steps, scheduling = [], scheduler.Scheduler.schedule

    def schedule(self, **settings):
        batch = scheduling(self, **settings)
        steps.append(batch)
        return batch

    monkeypatch.setattr(scheduler.Scheduler, "schedule", schedule)
    results = list(generate_many(limited, requests))
    assert [each.token_ids for each in results] == expected
    encoding = [batch for batch in steps if batch is not None and batch.encode is not None]
    # A step for each block of either picture; the other request finds them done.
    assert 2 * depth <= len(encoding) <= 2 * depth + 2
    assert not any(batch.prefill for batch in encoding) and any(b.decode for b in encoding)
    assert results[2].timings.vision_encode_s > 0
    limited._forget()
    number = limited.add(replace(large, bypass_caches=True))
    while not any(batch is not None and batch.encode for batch in steps[-2:]):
        limited.step()
    limited.abort(number)
    assert not limited.has_unfinished and limited.step() == [] and pages_are_all_free(limited)


def test_requests_are_taken_as_there_is_room(limited, monkeypatch):
    monkeypatch.setattr("qwencli.engine.client.REQUESTS_AHEAD", 2)
    taken = itertools.count()
    asked = 0

    def source():
        nonlocal asked
        for number in range(30):
            asked = next(taken) + 1
            yield ask(f"Number {number}", max_new_tokens=2)

    results = generate_many(limited, source())
    next(results)
    assert asked <= 2 * (3 + 2)
    assert len(list(results)) == 29


def test_a_request_that_fails_fails_alone(limited, monkeypatch):
    good = ask("Well?", max_new_tokens=4)
    expected = limited.generate(good).token_ids
    too_long = ask("Too long", max_new_tokens=8192)
    bad_picture = ask(images=[picture(8000, 8)])
    broken = ask("Broken", max_new_tokens=5)
    taking = engine_core.EngineCore._take

    def take(self, active, *token):
        if active.answer.sampling.max_new_tokens == 5 and len(active.answer.token_ids) == 2:
            raise InputError("simulated", "in the middle of decoding")
        return taking(self, active, *token)

    monkeypatch.setattr(engine_core.EngineCore, "_take", take)
    results = list(generate_many(limited, [good, too_long, bad_picture, broken, good]))
    assert [each.token_ids for each in (results[0], results[4])] == [expected, expected]
    assert all(isinstance(each, InputError) for each in results[1:4])
    assert "8192" in str(results[1]) and "times" in str(results[2])
    assert pages_are_all_free(limited)


def test_a_request_larger_than_the_pool_is_refused(engine, monkeypatch):
    monkeypatch.setattr(batch_plan, "plan_pages", lambda *args: 2)
    engine._close_queue()
    small, large = ask("S", max_new_tokens=3), ask("L", max_new_tokens=200)
    results = list(generate_many(engine, [small, large, small]))
    engine._close_queue()
    assert isinstance(results[1], InputError) and "room for 64" in str(results[1])
    assert results[0].token_ids == results[2].token_ids == engine.generate(small).token_ids


def test_where_memory_is_short_fewer_prompts_run_at_a_time(limited, monkeypatch):
    requests = [ask(f"Number {n} " * 8, max_new_tokens=3) for n in range(5)]
    expected = [limited.generate(request).token_ids for request in requests]
    limited._requests()._scheduler.limits = replace(NARROW, max_prefill_tokens=400)
    running = runner.ModelRunner.prefill

    def short_of_memory(self, chunks, prompts, clock):
        if len(chunks) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return running(self, chunks, prompts, clock)

    monkeypatch.setattr(runner.ModelRunner, "prefill", short_of_memory)
    results = list(generate_many(limited, requests))
    assert [each.token_ids for each in results] == expected
    (said,) = [note for each in results for note in each.notes]
    assert "memory is short" in said
    assert limited._queue._scheduler.limits.max_prompts == 1


def test_where_memory_is_short_for_a_long_pass_no_step_gets_longer(limited, monkeypatch):
    request = ask("Number " * 200, max_new_tokens=3)
    expected = limited.generate(request).token_ids
    scheduler = limited._requests()._scheduler
    scheduler.limits = replace(NARROW, max_prefill_tokens=400, unstreamed_prefill_tokens=2000)
    running = runner.ModelRunner.prefill

    def short_of_memory(self, chunks, prompts, clock):
        if sum(chunk.stop - chunk.start for chunk in chunks) > 400:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return running(self, chunks, prompts, clock)

    monkeypatch.setattr(runner.ModelRunner, "prefill", short_of_memory)
    (result,) = generate_many(limited, [request])
    assert result.token_ids == expected
    assert result.notes == ("memory is short: 400 tokens of prompts run at a time from here on",)
    assert scheduler.limits.most_prefill_tokens == 400


def test_a_prompt_that_does_not_fit_the_memory_fails_alone(limited, monkeypatch):
    running = runner.ModelRunner.prefill

    def short_of_memory(self, chunks, prompts, clock):
        if any(len(prompt.ids) > 60 for prompt in prompts):
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return running(self, chunks, prompts, clock)

    monkeypatch.setattr(runner.ModelRunner, "prefill", short_of_memory)
    small, large = ask("S", max_new_tokens=4), ask("L" * 400, max_new_tokens=4)
    results = list(generate_many(limited, [small, large, small]))
    assert isinstance(results[1], OutOfMemoryError)
    assert results[0].token_ids == results[2].token_ids
    assert pages_are_all_free(limited)


def test_a_short_prompt_is_tried_once_more_with_what_was_given_back(limited, monkeypatch):
    request = ask("Short", max_new_tokens=4)
    expected = limited.generate(request).token_ids
    running, tries = runner.ModelRunner.prefill, []

    def short_once(self, chunks, prompts, clock):
        tries.append(len(chunks))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return running(self, chunks, prompts, clock)

    monkeypatch.setattr(runner.ModelRunner, "prefill", short_once)
    (result,) = generate_many(limited, [request])
    assert result.token_ids == expected
    assert tries == [1, 1]


def test_failures_that_nobody_foresaw_are_those_of_one_request(limited, monkeypatch):
    good = ask("Well?", images=[picture()], max_new_tokens=4)
    expected = limited.generate(good).token_ids
    taking = engine_core.EngineCore._take
    encoding = vision_batch.BatchVision._encode_together
    limited._forget()

    def cannot_be_opened():
        raise ValueError("simulated, in preprocessing")

    def encode(self, visuals):
        if any(visual.grid == (1, 6, 8) for visual in visuals):
            raise ValueError("simulated, in vision")
        return encoding(self, visuals)

    def take(self, active, *token):
        if active.answer.sampling.max_new_tokens == 5 and len(active.answer.token_ids) == 2:
            raise ValueError("simulated, in the middle of decoding")
        return taking(self, active, *token)

    monkeypatch.setattr(engine_core.EngineCore, "_take", take)
    monkeypatch.setattr(vision_batch.BatchVision, "_encode_together", encode)
    broken = [cannot_be_opened, ask(images=[picture(128, 96)]), ask(max_new_tokens=5)]
    results = list(generate_many(limited, [good, *broken, good, good]))
    assert [each.token_ids for each in (results[0], *results[4:])] == [expected] * 3
    for error, phase in zip(results[1:4], ("preprocessing", "vision", "middle"), strict=True):
        assert isinstance(error, RequestError) and "ValueError: simulated, in" in error.message
        assert phase in error.message and isinstance(error.__cause__, ValueError)
    assert pages_are_all_free(limited)


@pytest.mark.parametrize("named", [EngineName.NATIVE, EngineName.TRANSFORMERS])
def test_one_after_the_other_they_are_those_of_one_request_too(checkpoint, monkeypatch, named):
    """As few requests are answered: they have no rows."""
    good, broken = ask("Well?", images=[picture()], max_new_tokens=4), ask(max_new_tokens=5)
    adding, building = ResponseBuilder.add, BaseEngine._built

    def cannot_be_opened():
        raise ValueError("simulated, in opening")

    def built(self, request, matcher):
        if request.sampling.max_new_tokens == 7:
            raise ValueError("simulated, in preprocessing")
        return building(self, request, matcher)

    def add(self, *token):
        if self.sampling.max_new_tokens == 5 and len(self.token_ids) == 2:
            raise RuntimeError("simulated, in the middle of decoding")
        return adding(self, *token)

    monkeypatch.setattr(BaseEngine, "_built", built)
    monkeypatch.setattr(ResponseBuilder, "add", add)
    config = engine_config(checkpoint("qwen3_vl"), engine=named)
    with create_engine(config) as loaded:
        asked = [good, cannot_be_opened, ask(max_new_tokens=7), broken, good]
        results = list(generate_many(loaded, asked, expected=len(asked)))
        assert not loaded.has_unfinished
    assert results[0].token_ids == results[4].token_ids
    for error, phase in zip(results[1:4], ("opening", "preprocessing", "the middle"), strict=True):
        assert isinstance(error, RequestError) and f"Error: simulated, in {phase}" in str(error)
        assert error.__cause__ is not None


def test_a_lost_device_is_not_the_fault_of_one_request(engine, monkeypatch):
    def lost(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access (simulated)")

    monkeypatch.setattr(BaseEngine, "_built", lost)
    with pytest.raises(torch.AcceleratorError):
        list(generate_many(engine, [ask(), ask()], expected=2))


def test_no_new_tokens_are_refused_and_a_thousand_requests_are_prepared_in_turn(limited):
    expected = limited.generate(ask("Q", max_new_tokens=2)).token_ids
    prepared = 0

    def request(number):
        def source():
            nonlocal prepared
            prepared += 1
            return ask("Q", max_new_tokens=0 if number == 500 else 2)

        return source

    numbers = [limited.add(request(number)) for number in range(1000)]
    limited.step()
    assert prepared <= input_processor.PREPARED_AHEAD
    for number in numbers[100:900]:
        if number != numbers[500]:
            limited.abort(number)
    ended = {}
    while limited.has_unfinished:
        ended |= {each.request: each for each in limited.step() if each.finished}
    assert set(ended) == {*numbers[:100], numbers[500], *numbers[900:]}
    assert isinstance(ended.pop(numbers[500]).error, UsageError)
    assert {each.chunk.result.token_ids for each in ended.values()} == {expected}
    assert pages_are_all_free(limited)


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory (simulated)")


def test_where_memory_is_short_in_decoding_fewer_rows_run_and_all_end(limited, monkeypatch):
    """Also those that come later; once nothing is left as many as before are tried again."""
    requests = [ask(f"{n}", max_new_tokens=4 + n) for n in range(7)]
    expected = [limited.generate(request).token_ids for request in requests]
    running, most = runner.ModelRunner.decode, []

    def short_of_memory(self, sequences, *others):
        rows = max(each.row for each in sequences) + 1
        if rows > 2:
            raise out_of_memory()
        most.append(rows)
        return running(self, sequences, *others)

    monkeypatch.setattr(runner.ModelRunner, "decode", short_of_memory)
    results = list(generate_many(limited, requests))
    assert [each.token_ids for each in results] == expected
    (said,) = [note for each in results for note in each.notes]
    assert said == "memory is short: one answer runs at a time from here on"
    assert most[-9:] == [1] * 9 and limited._queue._scheduler.step_rows == 1
    assert pages_are_all_free(limited)
    monkeypatch.undo()
    monkeypatch.setattr(engine_core.EngineCore, "_run_fewer", None)
    results = list(generate_many(limited, requests))
    assert [each.token_ids for each in results] == expected
    assert limited._queue._scheduler.step_rows == 3


def test_a_row_that_finds_no_memory_alone_has_failed(limited, monkeypatch):
    requests = [ask(text, max_new_tokens=6) for text in ("A", "Unlucky", "B")]
    expected = [limited.generate(request).token_ids for request in requests]
    running, tries = runner.ModelRunner.decode, []

    def short_of_memory(self, sequences, prompts, *others):
        if any(len(prompt.ids) == unlucky for prompt in prompts):
            tries.append(len(sequences))
            raise out_of_memory()
        return running(self, sequences, prompts, *others)

    unlucky = limited.generate(requests[1]).num_prompt_tokens
    monkeypatch.setattr(runner.ModelRunner, "decode", short_of_memory)
    results = list(generate_many(limited, requests))
    assert [each.token_ids for each in results[::2]] == expected[::2]
    assert isinstance(results[1], OutOfMemoryError)
    assert len(tries) <= 2 * 2 and tries[-1] == 1
    assert pages_are_all_free(limited)


@pytest.mark.parametrize("rows", [0, 1])
def test_short_memory_in_choosing_among_allowed_tokens(limited, monkeypatch, rows):
    """Once, or whenever there are several rows: either way all answers are whole."""
    schema = read_schema('{"enum": ["x", "y", "z"]}', "schema.json")
    free = [ask(f"{n}", max_new_tokens=5) for n in range(2)]
    requests = [*free, replace(ask("S", ignore_eos=False, max_new_tokens=9), schema=schema)]
    expected = [next(generate_many(limited, [each])).token_ids for each in requests]
    choosing, tries = runner.ModelRunner._choose, []

    def short_of_memory(self, logits, *others):
        tries.append(len(logits))
        if (rows and len(logits) > rows) or len(tries) == 1:
            raise out_of_memory()
        choosing(self, logits, *others)

    monkeypatch.setattr(runner.ModelRunner, "_choose", short_of_memory)
    results = list(generate_many(limited, requests))
    assert [each.token_ids for each in results] == expected
    assert pages_are_all_free(limited)


def test_a_graph_that_finds_no_memory_leaves_the_rows_as_they_were(limited, monkeypatch):
    run_graphs_on_the_host(monkeypatch)
    requests = [ask(f"{n}", repetition_penalty=1.1, max_new_tokens=9) for n in range(3)]
    expected = [limited.generate(request).token_ids for request in requests]
    capturing, tries = GraphRunner.capture, []
    monkeypatch.setattr(limited._requests()._runner, "_graphs", GraphRunner(torch.device("cpu")))

    def short_of_memory(self, key, work):
        tries.append(key)
        if len(tries) < 3:
            work()
            raise out_of_memory()
        capturing(self, key, work)

    monkeypatch.setattr(GraphRunner, "capture", short_of_memory)
    results = list(generate_many(limited, requests))
    assert [each.token_ids for each in results] == expected
    assert len(tries) > 2


def test_a_graph_for_those_that_wait_gives_way_to_one_for_those_that_run(limited, monkeypatch):
    run_graphs_on_the_host(monkeypatch)
    monkeypatch.setitem(native_engine.BATCH_LIMITS, "cpu", replace(NARROW, max_rows=8))
    requests = [ask(f"{n}", max_new_tokens=9) for n in range(7)]
    expected = [limited.generate(request).token_ids for request in requests]
    capturing, rows = GraphRunner.capture, []
    monkeypatch.setattr(limited._requests()._runner, "_graphs", GraphRunner(torch.device("cpu")))

    def short_of_memory(self, key, work):
        rows.append(key[1])
        if key[1] > 2:
            raise out_of_memory()
        capturing(self, key, work)

    monkeypatch.setattr(GraphRunner, "capture", short_of_memory)
    results = list(generate_many(limited, requests))
    assert [each.token_ids for each in results] == expected
    assert rows[:2] == [8, 2] and pages_are_all_free(limited)


def test_a_prompt_that_is_run_again_still_has_its_pictures(limited, monkeypatch):
    request = ask(images=[picture()], max_new_tokens=5)
    expected = limited.generate(request).token_ids
    copying, tries = runner.ModelRunner._copy, []

    def short_once(self, *others, **more):
        tries.append(others)
        if len(tries) == 1:
            raise out_of_memory()
        return copying(self, *others, **more)

    limited._forget()
    monkeypatch.setattr(runner.ModelRunner, "_copy", short_once)
    (result,) = generate_many(limited, [request])
    assert result.token_ids == expected


@pytest.mark.parametrize("times", [1, 2])
def test_a_large_picture_is_encoded_once_more_where_memory_was_short(limited, monkeypatch, times):
    request = ask(images=[picture(96, 96)], max_new_tokens=5)
    expected = limited.generate(request).token_ids
    monkeypatch.setattr(runner_prompt, "PIECE", 32)
    encoding, tries = vision_batch.BatchVision.encode_some, []

    def short_of_memory(self, *others):
        tries.append(others)
        if len(tries) <= times:
            raise out_of_memory()
        return encoding(self, *others)

    monkeypatch.setattr(vision_batch.BatchVision, "encode_some", short_of_memory)
    (result,) = generate_many(limited, [replace(request, bypass_caches=True)])
    assert isinstance(result, OutOfMemoryError) if times > 1 else result.token_ids == expected
    assert pages_are_all_free(limited)


def test_a_step_that_fails_in_no_ones_part_ends_those_that_run(limited, monkeypatch):
    """Each with an error of its own; those behind them are answered."""
    requests = [ask(f"{n}", max_new_tokens=5) for n in range(5)]
    expected = [limited.generate(request).token_ids for request in requests]
    running, steps = runner.ModelRunner.decode, []

    def broken(self, *others):
        steps.append(others)
        if len(steps) == 3:
            raise ValueError("simulated, in a step")
        return running(self, *others)

    monkeypatch.setattr(runner.ModelRunner, "decode", broken)
    results = list(generate_many(limited, requests))
    failed = [each for each in results if isinstance(each, RequestError)]
    assert 1 <= len(failed) <= 3 and all("in a step" in str(each) for each in failed)
    for result, tokens in zip(results, expected, strict=True):
        assert result in failed or result.token_ids == tokens
    assert pages_are_all_free(limited)


class ShortOfMemory(TorchDispatchMode):
    """No memory for some allocations, from the `first` of them on; what torch changes in place
    needs none."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first, self.count, self.asked = first, count, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        told = func._schema
        if not told.is_mutable and not any(each.alias_info for each in told.returns):
            self.asked += 1
            if 0 <= self.asked - self.first < self.count:
                raise out_of_memory()
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def short_mix(engine):
    mixed = [
        ask("How many? " * 12, max_new_tokens=5),
        ask(images=[picture()], max_new_tokens=4),
        ask("B", repetition_penalty=1.4, max_new_tokens=6),
        ask("C", do_sample=None, temperature=1.0, top_k=20, seed=3, max_new_tokens=5),
    ]
    return mixed, [engine.generate(each).token_ids for each in mixed]


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.floats(0, 1), st.sampled_from([1, 2, 30]))
def test_wherever_memory_runs_out_an_answer_is_whole_or_an_error(
    engine, short_mix, monkeypatch_of_module, where, count
):
    mixed, expected = short_mix
    engine._forget()
    engine._close_queue()
    memory = ShortOfMemory(1 + int(700 * where), count)
    numbers = [engine.add(each) for each in mixed]
    ended = {}
    while engine.has_unfinished:
        with memory:
            outputs = engine.step()
        for output in (each for each in outputs if each.finished):
            assert output.request not in ended
            ended[output.request] = output
    for number, tokens in zip(numbers, expected, strict=True):
        error = ended[number].error
        if error is None:
            assert ended[number].chunk.result.token_ids == tokens
        else:
            assert isinstance(error, OutOfMemoryError)
    engine.step()
    assert pages_are_all_free(engine)


def test_what_is_aborted_gives_nothing_more(limited):
    expected = limited.generate(ask("Keep", max_new_tokens=8)).token_ids
    numbers = [limited.add(ask(text, max_new_tokens=8)) for text in ("Keep", "X", "Y", "Z")]
    outputs = []
    for _ in range(4):
        outputs += limited.step()
    for number in (*numbers[1:], *numbers[1:], 999):
        limited.abort(number)
    while limited.has_unfinished:
        later = limited.step()
        assert {each.request for each in later} <= {numbers[0]}
        outputs += later
    kept = [each for each in outputs if each.request == numbers[0]]
    assert kept[-1].chunk.result.token_ids == expected
    assert sum(each.finished for each in kept) == 1
    limited.step()
    assert pages_are_all_free(limited)


def test_without_a_reader_of_pieces_an_answer_is_its_first_and_its_last(limited):
    """And the same as one whose pieces are read, stop strings and stop tokens included."""
    plain = [*mixed(), ask("E", max_new_tokens=1)]
    said = limited.generate(ask("Describe this.", ignore_eos=False)).text
    stopped = ask("Describe this.", ignore_eos=False, stop=(said[len(said) // 2 :],))
    asked = [*plain, stopped]
    streamed, whole = ([limited.add(each, stream=way) for each in asked] for way in (True, False))
    chunks: dict[int, list] = {number: [] for number in (*streamed, *whole)}
    while limited.has_unfinished:
        for output in limited.step():
            assert output.error is None, output.error
            chunks[output.request].append(output.chunk)
    for one, other in zip(streamed, whole, strict=True):
        result, again = chunks[one][-1].result, chunks[other][-1].result
        assert (again.text, again.token_ids) == (result.text, result.token_ids)
        assert again.finish_reason == result.finish_reason
        for pieces, answer in ((chunks[one], result), (chunks[other], again)):
            assert "".join(chunk.text for chunk in pieces) == answer.text
            assert tuple(id_ for chunk in pieces for id_ in chunk.token_ids) == answer.token_ids
        assert len(chunks[one]) <= len(result.token_ids) + 1
        assert len(chunks[other]) <= 2
    assert chunks[whole[-1]][-1].result.text == said[: len(said) // 2]


@pytest.mark.parametrize(("piece_s", "at_least"), [(0.0001, 6), (1000.0, 2)])
def test_many_streams_are_told_in_turns_as_time_allows(limited, monkeypatch, piece_s, at_least):
    """The first token at once; several as one piece where there is no time for each."""
    monkeypatch.setattr(engine_core, "PIECE_S", piece_s)
    requests = [ask(f"{n}", max_new_tokens=9) for n in range(3)]
    expected = [limited.generate(request).text for request in requests]
    chunks: dict[int, list] = {limited.add(request): [] for request in requests}
    while limited.has_unfinished:
        outputs = limited.step()
        later = [each for each in outputs if chunks[each.request] and not each.finished]
        if piece_s > 1:
            assert len(later) <= 1
        for output in outputs:
            chunks[output.request].append(output.chunk)
    for said, text in zip(chunks.values(), expected, strict=True):
        assert "".join(chunk.text for chunk in said) == said[-1].result.text == text
        assert len(said[0].token_ids) == 1 and len(said) >= at_least


def test_closing_the_results_aborts_the_rest(limited):
    results = generate_many(limited, [ask(f"{n}", max_new_tokens=20) for n in range(9)])
    next(results)
    results.close()
    assert not limited.has_unfinished
    limited.step()
    assert pages_are_all_free(limited)


def test_a_lone_stream_beside_a_batch(limited):
    request = ask("Alone", max_new_tokens=12)
    expected = limited.generate(request).token_ids
    results = generate_many(limited, [ask(f"{n}", max_new_tokens=9) for n in range(4)])
    first = next(results)
    assert limited.generate(request).token_ids == expected
    assert len([first, *results]) == 4


@pytest.fixture(scope="module")
def speculating(checkpoint):
    config = native_config(checkpoint("qwen3_vl"), speculate=Speculate.AUTO)
    with NativeEngine(config) as loaded, pytest.MonkeyPatch.context() as patch:
        patch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
        assert loaded.max_rows == 3
        yield loaded


# Words, how often they are said, new tokens, whether stop tokens count, a penalty, a seed of draws.
asked = st.tuples(
    st.sampled_from(["Tell me. ", "What? Why? ", "One"]),
    st.integers(1, 12),
    st.integers(1, 24),
    st.booleans(),
    st.sampled_from([1.0, 1.0, 1.0, 1.3]),
    st.sampled_from([None, None, None, 3]),
)


@settings(max_examples=6, deadline=None)
@given(st.lists(asked, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_steps_that_check_drafts_give_what_plain_ones_do(engine, speculating, asked, random):
    """Of rows that join and leave, whatever sizes steps have; some rows cannot be drafted for."""
    requests = []
    for text, times, tokens, ignore_eos, penalty, seed in asked:
        drawn = {} if seed is None else {"do_sample": None, "temperature": 1.0, "seed": seed}
        settings = {"max_new_tokens": tokens, "repetition_penalty": penalty, **drawn}
        requests.append(ask(text * times, ignore_eos=ignore_eos, **settings))
    expected = [engine.generate(request) for request in requests]
    with pytest.MonkeyPatch.context() as patch:
        sizes = (0, 1, 2, 4, 8)
        choose = functools.partial(random.choice, sizes)
        patch.setattr(BatchDraftPolicy, "next", lambda self, rows, texts: choose())
        patch.setattr(BatchDraftPolicy, "learn", lambda *arguments: None)
        found = list(generate_many(speculating, requests))
    for one, other in zip(expected, found, strict=True):
        assert other.token_ids == one.token_ids
        assert (other.text, other.finish_reason) == (one.text, one.finish_reason)
    assert pages_are_all_free(speculating) and not speculating.has_unfinished


def test_drafts_that_are_right_save_steps_and_are_counted(speculating, monkeypatch):
    sizes: list[int] = []
    verifying = runner.ModelRunner.verify

    def verify(self, sequences, prompts, size, waiting, clock):
        sizes.append(size)
        return verifying(self, sequences, prompts, size, waiting, clock)

    monkeypatch.setattr(runner.ModelRunner, "verify", verify)
    monkeypatch.setattr(BatchDraftPolicy, "next", lambda self, rows, texts: 4)
    monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *arguments: None)
    requests = [ask("Tell me. " * n, max_new_tokens=40) for n in (3, 9)]
    requests.append(ask("Drawn", do_sample=None, temperature=1.0, seed=1, max_new_tokens=3))
    *greedy, drawn = generate_many(speculating, requests)
    assert drawn.effective.speculate == "off: sampling" and drawn.speculation is None
    accepted = [each.speculation.num_accepted for each in greedy]
    assert min(accepted) > 5 and len(sizes) < 40
    assert all(each.speculation.num_drafted >= each.speculation.num_accepted for each in greedy)
    assert greedy[0].effective.speculate == "auto"


@pytest.mark.parametrize("settings", [{"attention": Attention.EAGER}])
def test_modes_without_batches_answer_one_after_the_other(checkpoint, settings):
    requests = [ask("One", max_new_tokens=3), ask("Two", max_new_tokens=8192), ask("Three")]
    with NativeEngine(native_config(checkpoint("qwen3"), **settings)) as loaded:
        assert loaded.max_rows == 1
        results = list(generate_many(loaded, requests))
        assert isinstance(results[1], InputError)
        for request, result in zip(requests[::2], results[::2], strict=True):
            assert result.token_ids == loaded.generate(request).token_ids


def test_the_transformers_engine_speaks_the_same_protocol(checkpoint):
    requests = [ask("One", max_new_tokens=3), ask("Two", max_new_tokens=2)]
    with TransformersEngine(engine_config(checkpoint("qwen3"))) as loaded:
        number = loaded.add(requests[1])
        loaded.abort(number)
        results = list(generate_many(loaded, requests))
        assert [len(each.token_ids) for each in results] == [3, 2]
        assert not loaded.has_unfinished


def test_a_lone_request_short_of_memory_gets_that_of_a_batch_that_is_over(limited, monkeypatch):
    first = list(generate_many(limited, [ask("Before", max_new_tokens=2)]))
    answering, tries = limited._generation.chunks, []

    def short_of_memory(*args):
        tries.append(limited._queue)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        yield from answering(*args)

    monkeypatch.setattr(limited._generation, "chunks", short_of_memory)
    assert len(limited.generate(ask("Alone", max_new_tokens=2)).token_ids) == 2
    assert tries[0] is not None and tries[1] is None
    again = list(generate_many(limited, [ask("Before", max_new_tokens=2)]))
    assert again[0].token_ids == first[0].token_ids


def test_pictures_of_one_size_in_the_same_words_are_laid_out_once(limited, monkeypatch):
    requests = [ask(images=(picture(64, 64),), max_new_tokens=2) for _ in range(4)]
    first = [result.token_ids for result in generate_many(limited, requests)]
    monkeypatch.setattr("qwencli.engine.runner_prompt.lay_out", None)
    assert [result.token_ids for result in generate_many(limited, requests)] == first


def test_as_many_threads_prepare_as_keep_prompts_ready(limited, monkeypatch):
    inputs = limited._requests()._inputs
    monkeypatch.setattr(inputs, "_most_turns", 4)
    monkeypatch.setattr(inputs, "_turns", input_processor._Turns(1))
    monkeypatch.setattr(inputs, "_preparing", {0: None})
    ready = []

    def turns(steps):
        for _ in range(steps):
            inputs.share_lock(len(ready))
        return inputs._turns.most

    assert turns(2) == 3
    assert turns(9) == 4
    ready += [None] * (input_processor.PLENTY_READY - 1)
    assert turns(9) == 4
    ready += [None]
    assert turns(2) == 2
    assert turns(9) == 1


def test_answers_are_the_same_where_prompts_and_pictures_run_as_graphs(limited, monkeypatch):
    requests = [ask(str(number), images=[turned(number)]) for number in range(7)] + mixed()
    expected = [result.token_ids for result in generate_many(limited, iter(requests))]
    limited._close_queue()
    limited._vision_cache.clear()
    graphs = RunGraphs()
    monkeypatch.setattr("qwencli.engine.graphs.TIMES_MET", 0)
    running = limited._requests()._runner
    monkeypatch.setattr(running, "_shapes", RepeatedShapes(graphs, lambda: 2**40))
    monkeypatch.setattr(running.vision, "_graphs", True)
    monkeypatch.setattr(running.prompts, "_graphs", True)
    found = [result.token_ids for result in generate_many(limited, iter(requests))]
    assert found == expected
    assert {"prompts", "pictures"} <= {key[0] for key in graphs.made}


def test_many_requests_leave_pages_and_graphs_level(limited):
    levels = many_requests.run(limited, 60)
    assert all(each["pages_in_use"] == each["graphs"] == 0 for each in levels)
    pool = limited._queue._scheduler.pool
    assert set(pool._by_key.values()) == set(pool._keys) == set(pool._kept)
    assert levels[-1]["host_bytes"] < 1.2 * levels[1]["host_bytes"]
    assert [each["ended"] for each in levels] == [5] * 10, "one of six is aborted"


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3"])
def test_batch_invariant_answers_do_not_depend_on_what_runs_beside_them(
    checkpoint, monkeypatch, family
):
    """Drawn tokens too; a lone stream, among others that have begun, is a row like any other."""
    monkeypatch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
    images = [picture(96, 64), picture()] if family.endswith("vl") else []
    drawn = {"do_sample": None, "temperature": 1.3}
    requests = [
        ask("A", images=images[:1], max_new_tokens=3),
        ask("How many? " * 9, images=images[:1], max_new_tokens=9),
        ask("B", repetition_penalty=1.4, max_new_tokens=6),
        ask("C", images=images[1:], top_k=20, seed=3, max_new_tokens=8, **drawn),
        ask("D", top_k=0, top_p=0.95, seed=4, max_new_tokens=8, **drawn),
    ]
    config = native_config(checkpoint(family), batch_invariant=True)
    with NativeEngine(config) as loaded:
        alone = []
        for request in requests:
            loaded._close_queue()  # and all that it keeps
            alone.append(loaded.generate(request).token_ids)
        together = list(generate_many(loaded, requests[::-1]))
        assert [each.token_ids for each in together] == alone[::-1]
        numbers = [loaded.add(request) for request in requests[1:]]
        assert loaded.generate(requests[0]).token_ids == alone[0]
        found = {}
        while loaded.has_unfinished:
            for output in loaded.step():
                found.setdefault(output.request, []).extend(output.chunk.token_ids)
        assert [tuple(found[number]) for number in numbers] == alone[1:]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cache": Cache.DYNAMIC}, "dynamic"),
        ({"attention": Attention.EAGER}, "eager"),
        ({"speculate": Speculate.AUTO}, "draft"),
    ],
)
def test_what_cannot_be_batch_invariant_is_refused_by_name(checkpoint, settings, named):
    config = native_config(checkpoint("qwen3"), batch_invariant=True, **settings)
    with pytest.raises(UnsupportedModeError, match=named):
        NativeEngine(config).load()
    with pytest.raises(UnsupportedModeError, match="native engine"):
        TransformersEngine(replace(config, engine=EngineName.TRANSFORMERS)).load()


def test_logprobs_are_those_of_the_model_whatever_runs_beside_and_only_where_asked(limited):
    """Of greedy, penalised and drawn answers, first tokens included; the model is read once more
    over the whole text to compare."""
    told = {0: 0, 1: 3, 5: 20, 6: 2}
    requests = [ask("A" * (3 + n), ignore_eos=True) for n in range(5)]
    requests.append(ask("B", repetition_penalty=1.4, max_new_tokens=12))
    requests.append(ask("C", do_sample=None, temperature=1.0, top_k=20, seed=3))
    alone = [limited.generate(request).token_ids for request in requests]
    asked = [replace(each, logprobs=told.get(n)) for n, each in enumerate(requests)]
    pieces: dict[int, list] = {limited.add(request): [] for request in asked}
    while limited.has_unfinished:
        for output in limited.step():
            pieces[output.request].append(output.chunk)
    for number, chunks in enumerate(pieces.values()):
        ids = chunks[-1].result.token_ids
        assert ids == alone[number]
        found = [each for chunk in chunks for each in chunk.logprobs]
        if number not in told:
            assert found == []
            continue
        assert [each.chosen.token_id for each in found] == list(ids)
        prompt = limited.files.prompts.build(asked[number].messages).input_ids
        rows = [*limited._logits([*prompt, *ids])][len(prompt) - 1 : -1]
        for each, logits in zip(found, rows, strict=True):
            expected = logits.float().log_softmax(-1).flatten()
            assert each.chosen.logprob == pytest.approx(
                expected[each.chosen.token_id].item(), abs=1e-3
            )
            best = expected.topk(told[number]).values.tolist() if told[number] else []
            assert [top.logprob for top in each.top] == pytest.approx(best, abs=1e-3)
        text = b"".join(each.chosen.text for each in found)
        assert text.decode("utf-8", "replace").startswith(chunks[-1].result.text[:1])
    assert pages_are_all_free(limited)


def test_a_stream_with_logprobs_is_a_row_and_an_engine_without_rows_refuses(engine, checkpoint):
    chunks = list(engine.stream(replace(ask("A"), logprobs=1)))
    assert sum(len(each.logprobs) for each in chunks) == len(chunks[-1].result.token_ids)
    with (
        NativeEngine(native_config(checkpoint("qwen3"), cache=Cache.DYNAMIC)) as other,
        pytest.raises(UnsupportedModeError, match="logprobs"),
    ):
        other.generate(replace(ask("A"), logprobs=1))
