"""Merging what a user says about sampling with a model's defaults and our own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwencli.config import (
    SAMPLING_BOUNDS,
    EngineConfig,
    ModelSource,
    ModelSpec,
    SamplingOptions,
    SamplingParams,
    check_sampling,
    resolve_sampling,
)
from qwencli.errors import ModelFileError, UsageError
from qwencli.messages import GenerationRequest, Message, TextPart, ToolCall, VideoPart

MODEL = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


def test_the_user_wins_over_the_model_and_the_model_over_us():
    params = resolve_sampling(SamplingOptions(top_k=5), MODEL)
    assert (params.top_k, params.temperature, params.top_p) == (5, 0.7, 0.8)
    assert params.min_p == SamplingParams().min_p


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 3.0}, {"seed": 3}),
        ({"max_new_tokens": True}, {"max_new_tokens": 1}),
        ({"temperature": 1, "top_k": 5.0}, {"temperature": 1.0, "top_k": 5}),
    ],
)
def test_equal_options_resolve_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Engines keep what options resolve to by equality."""
    found = [resolve_sampling(SamplingOptions(**each), {}) for each in (one, other)]
    assert repr(found[0]) == repr(found[1])


@pytest.mark.parametrize(
    ("options", "model", "samples"),
    [
        ({}, {"do_sample": False}, False),
        ({}, {}, True),
        ({"temperature": 0.0}, MODEL, False),
        ({"do_sample": False}, MODEL, False),
        ({"temperature": 0.5}, {"do_sample": False}, True),
        ({"top_p": 0.5}, {"do_sample": False}, True),
        ({"seed": 3}, {"do_sample": False}, False),
        ({"repetition_penalty": 1.2}, {"do_sample": False}, False),
        ({"temperature": 0.5, "do_sample": False}, MODEL, False),
        ({}, {"do_sample": True, "temperature": 0}, False),
    ],
)
def test_when_a_request_samples(options, model, samples):
    assert resolve_sampling(SamplingOptions(**options), model).do_sample is samples


@given(
    st.sampled_from(sorted(SAMPLING_BOUNDS)),
    st.floats(allow_nan=True, allow_infinity=True) | st.integers(),
)
def test_every_value_is_in_range_or_an_error_that_names_the_flag(name, value):
    bound = SAMPLING_BOUNDS[name]
    options = SamplingOptions(**{name: value})
    if bound.low <= value <= bound.high:
        check_sampling(options)
    else:
        with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
            check_sampling(options)


@pytest.mark.parametrize(
    ("key", "value"), [("top_k", -1), ("temperature", 9), ("top_p", "high"), ("min_p", -0.1)]
)
def test_a_models_default_out_of_range_names_file_and_key(key, value):
    with pytest.raises(ModelFileError, match=rf"generation_config\.json: {key} is"):
        resolve_sampling(SamplingOptions(), {key: value})


@pytest.mark.parametrize(
    "defaults",
    [
        {"do_sample": "yes"},
        {"do_sample": 1},
        {"top_k": 2.5},
        {"top_k": True},
        {"temperature": "1"},
        {"temperature": 10**400},
        {"top_p": [1]},
        {"repetition_penalty": {}},
    ],
)
def test_a_models_default_of_another_type_is_named(defaults: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match=next(iter(defaults))) as caught:
        resolve_sampling(SamplingOptions(), defaults)
    assert len(caught.value.message) < 200


def test_a_model_does_not_state_seed_stops_or_length() -> None:
    defaults = {"seed": "x", "stop": 5, "max_new_tokens": "y"}
    assert resolve_sampling(SamplingOptions(), defaults) == SamplingParams()


def test_lists_of_a_caller_become_tuples() -> None:
    part, call, picture = TextPart("a"), ToolCall("f", "{}"), Image.new("RGB", (2, 2))
    given: Any = [part]
    message = Message("user", given, tool_calls=[call])  # type: ignore[arg-type]
    request = GenerationRequest([message], tools=["{}"])  # type: ignore[arg-type]
    video = VideoPart([picture], [0.0], 1.0, "v")  # type: ignore[arg-type]
    assert (message.parts, message.tool_calls) == ((part,), (call,))
    assert (request.messages, request.tools) == ((message,), ("{}",))
    assert (video.frames, video.times_s) == ((picture,), (0.0,))
    for kind in (SamplingOptions, SamplingParams):
        for stop in (["x", "yz"], ("x", "yz"), iter(["x", "yz"])):
            assert kind(stop=stop).stop == ("x", "yz")  # type: ignore[arg-type]
        one = kind(stop="yz")  # type: ignore[arg-type]
        assert one.stop == ("yz",) and hash(one) == hash(kind(stop=("yz",)))
    model = ModelSpec("m", ModelSource.REMOTE)
    assert EngineConfig(model, endpoints=["http://a"]).endpoints == ("http://a",)  # type: ignore[arg-type]
