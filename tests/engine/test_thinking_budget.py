"""Thoughts that are cut off: equal up to the cut, then what ends them, then the answer."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from qwencli.answer_report import stats_line
from qwencli.config import EngineName, SamplingOptions, Speculate
from qwencli.engine.client import generate_many
from qwencli.engine.constrained import SchemaCheck
from qwencli.engine.frontend import prompt
from qwencli.engine.frontend.prompt import PromptBuilder, ThoughtBudget
from qwencli.engine.frontend.tokenizer import Tokenizer
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.native import engine as native_engine
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.request import Limits
from qwencli.engine.response import ResponseBuilder
from qwencli.errors import UnsupportedModeError
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, picture
from tests.engine.native.mtp_reference import with_head

TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{- message.content }}{%- else %}
    {%- for part in message.content %}
        {%- if part.type == 'image' or 'image' in part %}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
        {%- elif 'text' in part %}
            {{- part.text }}
        {%- endif %}
    {%- endfor %}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is true %}
    {{- '<think>\\n' }}
{%- else %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
"""
FAMILIES = ("qwen3_vl", "qwen3_5")
SCHEMA = '{"type": "object", "properties": {"n": {"enum": [1, 22, 333]}}, "required": ["n"], "additionalProperties": false}'  # noqa: E501
# Few tokens a step: what ends thoughts runs in two of them.
NARROW = Limits(max_rows=3, max_prefill_tokens=12, max_prompts=2)


# Qwen's own words are many tokens of a tiny vocabulary.
CLOSING = "\n\nStop.\n"


@pytest.fixture(scope="module", autouse=True)
def few_words():
    assert prompt.OUT_OF_THOUGHTS.startswith("\n\nConsidering the limited time by the user, ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt, "OUT_OF_THOUGHTS", CLOSING)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, checkpoint, tmp_path_factory):
    copied = tmp_path_factory.mktemp("thinks") / request.param
    shutil.copytree(checkpoint(request.param), copied)
    (copied / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return copied


@pytest.fixture(scope="module")
def engine(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
        with NativeEngine(engine_config(folder, engine=EngineName.NATIVE)) as loaded:
            yield loaded


@pytest.fixture(scope="module")
def closing(folder):
    tokenizer = Tokenizer.from_folder(folder)
    return tuple(tokenizer.encode(f"{CLOSING}</think>\n\n"))


def ask(text="Describe this.", images=(), *, budget=9, new=44, schema=None, **sampling):
    settings = SamplingOptions(**{"do_sample": False, "max_new_tokens": new, **sampling})
    return GenerationRequest(
        (user_message(text, tuple(images)),),
        settings,
        thinking=True,
        thinking_budget=budget,
        schema=schema,
    )


def requests():
    return [
        ask("hello"),
        ask(images=[picture()], budget=14),
        ask("Why? " * 9, budget=1, new=30),
        ask("B", budget=5, repetition_penalty=1.3),
        ask("plain", budget=None, new=30),
        ask("none at all", budget=0, new=20),
        ask("S", budget=7, do_sample=True, temperature=0.7, seed=5),
    ]


def test_alone_together_and_in_transformers_thoughts_end_where_they_must(folder, engine, closing):
    alone = [engine.generate(request) for request in requests()]
    for request, found in zip(requests(), alone, strict=True):
        budget, ids = request.thinking_budget, found.token_ids
        if not budget:
            continue
        short = replace(request.sampling, max_new_tokens=budget)
        free = engine.generate(replace(request, thinking_budget=None, sampling=short))
        assert ids[:budget] == free.token_ids
        assert ids[budget : budget + len(closing)] == closing
        assert budget + len(closing) < len(ids) <= request.sampling.max_new_tokens
        assert found.num_thinking_tokens == budget + len(closing)
        assert found.thoughts.endswith(CLOSING.strip())
        assert "</think>" not in found.thoughts + found.text
        assert len(found.token_t_s) == len(ids)
    assert alone[5].thoughts is None and alone[5].num_thinking_tokens == 0
    together = list(generate_many(engine, requests() * 2))
    assert [each.token_ids for each in together] == [each.token_ids for each in alone] * 2
    assert [each.text for each in together] == [each.text for each in alone] * 2
    queue = engine._queue._scheduler
    assert queue.pool.num_free == queue.pool.capacity and not engine.has_unfinished
    with TransformersEngine(engine_config(folder)) as reference:
        for request, found in list(zip(requests(), alone, strict=True))[:2]:
            assert reference.generate(request).token_ids == found.token_ids


def test_thoughts_that_end_by_themselves_are_not_touched(engine, monkeypatch):
    plain = engine.generate(ask("hello", budget=None, new=40))
    end = plain.token_ids[6]
    at = plain.token_ids.index(end)
    own = ThoughtBudget(20, end, (1, 2, 3), (4,))
    monkeypatch.setattr(PromptBuilder, "_budget", lambda self, tokens: own)
    found = engine.generate(ask("hello", budget=20, new=40))
    (beside, _) = generate_many(engine, [ask("hello", budget=20, new=40), ask("other")])
    assert found.token_ids == beside.token_ids == plain.token_ids
    assert at < 20


def test_a_tag_that_is_spelled_in_pieces_ends_thoughts_too(engine, closing, monkeypatch):
    encode, append = engine.files.prompts.tokenizer.encode, ResponseBuilder.append
    spelled = [*encode("hm"), *encode("<"), *encode("/think"), *encode(">"), *encode(" A circle.")]

    def scripted(answer, token_id, mark, logprobs=None):
        at = len(answer.token_ids)
        token_id = spelled[at] if at < len(spelled) else token_id
        return append(answer, token_id, mark, logprobs)

    monkeypatch.setattr(ResponseBuilder, "append", scripted)
    found = engine.generate(ask("hello", budget=len(spelled), new=len(spelled) + 5))
    assert list(found.token_ids[: len(spelled)]) == spelled
    assert found.thoughts == "hm" and found.text.startswith("A circle.")
    assert len(found.token_ids) > len(spelled) and closing[3] not in found.token_ids[-5:]


def test_an_answer_is_held_to_its_schema_behind_the_thoughts(folder, engine, closing):
    request = ask("hello", budget=6, schema=SCHEMA, new=70)
    free = engine.generate(ask("hello", budget=None, new=20))
    beside = list(generate_many(engine, [request, ask("other", budget=3), request]))
    with TransformersEngine(engine_config(folder)) as reference:
        found = [engine.generate(request), reference.generate(request), beside[0], beside[2]]
    for each in found:
        assert SchemaCheck(SCHEMA)(each.text) is None
        assert each.token_ids == found[0].token_ids
        assert each.token_ids[:6] == free.token_ids[:6]
        assert each.token_ids[6 : 6 + len(closing)] == closing


def test_pieces_of_a_stream_are_the_whole(engine):
    request = ask("hello", stop=("zzzz",))
    chunks = list(engine.stream(request))
    result = chunks[-1].result
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert "".join(chunk.thoughts for chunk in chunks).strip() == result.thoughts
    assert [i for chunk in chunks for i in chunk.token_ids] == list(result.token_ids)


def test_a_budget_without_room_for_an_answer_ends_with_the_thoughts(engine):
    found = engine.generate(ask("hello", budget=30, new=33))
    assert (found.finish_reason, found.text, len(found.token_ids)) == ("length", "", 30)


def test_drafts_go_on_behind_the_thoughts(folder, engine, tmp_path):
    """Those of n-grams, and those of a head where the model keeps states."""
    wanted = [engine.generate(request).token_ids for request in requests()[:4]]
    if "qwen3_5" in str(folder):
        folder = with_head(folder, tmp_path / "with-head")
    config = engine_config(folder, engine=EngineName.NATIVE, speculate=Speculate.THREE)
    with NativeEngine(config) as drafting:
        alone = [drafting.generate(request) for request in requests()[:4]]
        together = list(generate_many(drafting, requests()[:4]))
        planned = drafting.memory_plan.get("hidden states for drafts")
        kept = drafting._queue._runner._head
    assert planned == (None if kept is None else kept.hidden.nbytes + kept.done.nbytes)
    assert [each.token_ids for each in alone] == wanted
    assert [each.token_ids for each in together] == wanted
    assert alone[0].speculation is not None and alone[0].speculation.num_drafted > 0
    # What of a batch's steps one answer gained is not known, and nothing is said of it.
    said = stats_line(together[0])
    assert "drafts accepted" in said and "gain" not in said


def test_a_model_that_does_not_think_says_so(checkpoint, engine):
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as plain:
        with pytest.raises(UnsupportedModeError, match="cannot think"):
            plain.generate(ask())
        assert plain.generate(ask(budget=0, new=3)).thoughts is None
