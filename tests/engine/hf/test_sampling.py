"""The origin's test plan for sampling, on the transformers engine."""

from __future__ import annotations

import pytest

from qwencli.config import SamplingOptions
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config

TOKENS = 24


@pytest.fixture(scope="module")
def answer(checkpoint):
    """answer(**sampling) -> token ids of one answer of exactly TOKENS tokens."""
    with TransformersEngine(engine_config(checkpoint("qwen3"))) as engine:

        def run(**settings):
            sampling = SamplingOptions(max_new_tokens=TOKENS, **settings)
            request = GenerationRequest((user_message("Describe"),), sampling, ignore_eos=True)
            return engine.generate(request).token_ids

        yield run


def test_greedy_is_deterministic(answer):
    assert answer(do_sample=False) == answer(do_sample=False)


def test_temperature_zero_is_greedy(answer):
    assert answer(temperature=0.0) == answer(do_sample=False)


def test_sampling_varies_without_a_seed(answer):
    assert len({answer(do_sample=True, temperature=1.5) for _ in range(4)}) > 1


def test_same_seed_same_answer_other_seed_another(answer):
    first = answer(do_sample=True, temperature=1.0, seed=1)
    assert first == answer(do_sample=True, temperature=1.0, seed=1)
    assert first != answer(do_sample=True, temperature=1.0, seed=2)


def test_more_temperature_means_more_variety(answer):
    def variety(temperature):
        answers = [answer(temperature=temperature, top_k=0, top_p=1.0, seed=s) for s in range(6)]
        return len({token for tokens in answers for token in tokens})

    assert variety(0.1) < variety(2.0)


def test_repetition_penalty_reduces_repetition(answer):
    def distinct(penalty):
        return len(set(answer(do_sample=False, repetition_penalty=penalty)))

    assert distinct(2.0) > distinct(1.0)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0001}, {"min_p": 1.0}])
def test_the_narrowest_filter_leaves_only_the_likeliest_token(answer, narrow):
    open_filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    narrowed = answer(do_sample=True, temperature=1.0, seed=3, **{**open_filters, **narrow})
    assert narrowed == answer(do_sample=False)
    assert narrowed != answer(do_sample=True, temperature=1.0, seed=3, **open_filters)
