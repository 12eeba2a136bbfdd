"""Answers with drafted tokens are those of plain greedy steps, on the CPU in float32."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from qwencli.config import (
    Attention,
    Cache,
    DType,
    KVDType,
    Quantization,
    SamplingOptions,
    Speculate,
)
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.spec_decode.policy import TIMED_STEPS
from qwencli.errors import UnsupportedModeError
from qwencli.messages import GenerationRequest, text_message, user_message
from tests.checkpoints import ALONE, VISION_FAMILIES, picture
from tests.engine.native.test_native_engine import native_config

TEXT = "one two one two one two one two one two"
# Steps of a new engine that are plain, and enough after them.
TOKENS = TIMED_STEPS + 56


def ask(tokens=TOKENS, images=(), text=TEXT, ignore_eos=True, **sampling):
    options = SamplingOptions(**{"do_sample": False, **sampling}, max_new_tokens=tokens)
    return GenerationRequest((user_message(text, tuple(images)),), options, ignore_eos=ignore_eos)


@pytest.fixture(scope="module")
def engines(checkpoint):
    """A plain engine, and makers of engines that speculate, over one text model."""
    folder = checkpoint("qwen3")
    with NativeEngine(native_config(folder)) as plain:

        def speculating(speculate, **settings):
            return NativeEngine(
                native_config(folder, speculate=Speculate(str(speculate)), **settings)
            )

        yield plain, speculating


@pytest.mark.parametrize("family", ALONE)
@pytest.mark.parametrize("speculate", [3, "auto"])
def test_same_tokens_as_plain_steps(checkpoint, family, speculate):
    request = ask(images=(picture(),) if family in VISION_FAMILIES else ())
    with NativeEngine(native_config(checkpoint(family))) as plain:
        expected = plain.generate(request)
    config = native_config(checkpoint(family), speculate=Speculate(str(speculate)))
    with NativeEngine(config) as loaded:
        for _ in range(2):
            result = loaded.generate(request)
            assert result.token_ids == expected.token_ids
            assert result.text == expected.text
    assert result.effective.speculate == str(speculate)
    assert result.speculation is not None and result.speculation.net_gain is not None


@pytest.mark.parametrize("speculate", range(1, 8))
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_every_number_of_drafts_with_and_without_a_penalty(engines, speculate, penalty):
    plain, speculating = engines
    request = ask(repetition_penalty=penalty)
    expected = plain.generate(request)
    with speculating(speculate) as loaded:
        result = loaded.generate(request)
    assert result.token_ids == expected.token_ids
    found = result.speculation
    plain_steps = TIMED_STEPS
    checking_steps = TOKENS - 1 - plain_steps - found.num_accepted
    assert found.num_drafted == speculate * checking_steps
    if penalty == 1.0:
        assert found.num_accepted > 0, "a test without a right draft would prove little"


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": Attention.EAGER},
        {"dtype": DType.BFLOAT16},
        {"quantization": Quantization.INT8},
        {"kv_dtype": KVDType.INT8},
    ],
)
def test_other_ways_to_compute_a_step(checkpoint, settings):
    request = ask()
    results = []
    for speculate in ("off", "4"):
        with NativeEngine(
            native_config(checkpoint("qwen3"), speculate=Speculate(str(speculate)), **settings)
        ) as loaded:
            results.append(loaded.generate(request))
    assert results[0].token_ids == results[1].token_ids
    assert results[1].speculation.num_accepted > 0


def test_the_answer_ends_where_a_plain_one_does(engines):
    """At every number of tokens, at stop texts and stop tokens, also inside a step's tokens."""
    plain, speculating = engines
    whole = plain.generate(ask())
    with speculating(7) as loaded:
        loaded.generate(ask())
        for tokens in range(1, 20):
            result = loaded.generate(ask(tokens))
            assert result.token_ids == whole.token_ids[:tokens]
            assert result.finish_reason == "length"
        for cut in range(3, len(whole.text) - 3, 5):
            request = ask(stop=(whole.text[cut : cut + 3],), ignore_eos=False)
            expected, result = plain.generate(request), loaded.generate(request)
            assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
            assert result.finish_reason == expected.finish_reason == "stop"


def test_a_stop_token_inside_a_draft(checkpoint, engines, monkeypatch):
    plain, speculating = engines
    whole = plain.generate(ask())
    with speculating(7) as loaded:
        loaded.generate(ask())
        for token in sorted(set(whole.token_ids)):
            for engine in (plain, loaded):
                files = dataclasses.replace(engine.files, stop_token_ids=frozenset({token}))
                monkeypatch.setattr(engine, "_files", files)
            expected = plain.generate(ask(ignore_eos=False))
            result = loaded.generate(ask(ignore_eos=False))
            assert result.token_ids == expected.token_ids
            assert result.token_ids[-1] == token and result.finish_reason == "stop"


def test_drafts_beyond_the_end_of_the_context(checkpoint, engines):
    plain, speculating = engines
    prompt = plain.generate(ask(1)).num_prompt_tokens
    expected = plain.generate(ask())
    with speculating(7, max_seq_len=prompt + TOKENS) as loaded:
        for _ in range(2):
            assert loaded.generate(ask()).token_ids == expected.token_ids


def test_the_next_turn_goes_on_with_what_is_cached(engines):
    plain, speculating = engines
    with speculating(7) as loaded:
        loaded.generate(ask())
        answers = []
        for engine in (plain, loaded):
            first = engine.generate(ask(30))
            turns = (*ask(30).messages, text_message("assistant", first.text))
            request = dataclasses.replace(
                ask(30), messages=(*turns, text_message("user", "And one more?"))
            )
            answers.append((first.token_ids, engine.generate(request).token_ids))
    assert answers[0] == answers[1]


def test_sampling_takes_plain_steps_and_says_so(engines):
    plain, speculating = engines
    request = ask(20, do_sample=True, temperature=1.0, seed=3)
    with speculating("auto") as loaded:
        result = loaded.generate(request)
    assert result.token_ids == plain.generate(request).token_ids
    assert result.effective.speculate == "off: sampling" and result.speculation is None


def test_times_are_shared_among_tokens_that_came_together(engines):
    _, speculating = engines
    with speculating(7) as loaded:
        loaded.generate(ask())
        result = loaded.generate(ask())
    itl = result.itl_ms
    assert all(a < b for a, b in itertools.pairwise(result.token_t_s))
    assert sum(itl) / 1e3 == pytest.approx(result.timings.decode_s, rel=1e-3)
    # Clocks count seconds since the start of the machine: differences keep six digits or so.
    assert any(abs(a - b) < 1e-5 * max(itl) for a, b in itertools.pairwise(itl))


@pytest.mark.parametrize("cache", [Cache.DYNAMIC, Cache.STATIC_COMPILE])
def test_caches_that_cannot_are_refused(checkpoint, cache):
    with pytest.raises(UnsupportedModeError, match="--speculate auto cannot run: --cache"):
        NativeEngine(
            native_config(checkpoint("qwen3"), speculate=Speculate.AUTO, cache=cache)
        ).load()
