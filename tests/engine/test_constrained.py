"""Answers held to a schema: masks against brute force, and every answer meets its schema."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.config import Cache, EngineName, SamplingOptions, Speculate
from qwencli.engine import runner
from qwencli.engine.client import generate_many
from qwencli.engine.constrained import Grammars, SchemaCheck, fill_masks, read_schema
from qwencli.engine.frontend.tokenizer import Tokenizer
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.native import engine as native_engine
from qwencli.engine.native.decode_state import GraphStepper
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.request import Limits
from qwencli.errors import CaptionError, InputError, MissingDependencyError
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import VOCAB_SIZE, engine_config, picture
from tests.engine.frontend.tiny_folder import tiny_tokenizer
from tests.engine.native.host_graphs import run_graphs_on_the_host

FIELDS = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 12},
        "name": {"type": "string", "maxLength": 4},
    },
    "required": ["kind", "count", "name"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
FREE = {"type": "object", "properties": {"caption": {"type": "string"}}, "required": ["caption"]}


def schema(of) -> str:
    return read_schema(json.dumps(of), "schema.json")


# ---- masks ----


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer())


@pytest.fixture(scope="module")
def stop(tokenizer) -> int:
    return tokenizer.token_id("<|im_end|>")


def allowed(matcher) -> set[int]:
    mask = torch.zeros(1, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    fill_masks([(matcher, 0)], mask)
    bits = np.unpackbits(mask.numpy().view(np.uint8)[0], bitorder="little")
    return set(np.flatnonzero(bits[:VOCAB_SIZE]).tolist())


def answers_of(of) -> set[bytes]:
    """All answers to schemas that have few."""
    if of is FIELDS:
        names = ["".join(each) for n in range(2) for each in itertools.product("ab", repeat=n)]
        values = itertools.product(("cat", "dog"), range(13), names)
        keys = ("kind", "count", "name")
        return {json.dumps(dict(zip(keys, each, strict=True))).encode() for each in values}
    lists = [list(each) for n in (2, 3) for each in itertools.product((True, False), repeat=n)]
    return {json.dumps(each).encode() for each in lists}


@pytest.mark.parametrize("of", [LIST, {"enum": ["a", "ab", 1, None]}, {"const": {"a": [1, "x"]}}])
def test_masks_allow_exactly_the_tokens_that_an_answer_can_go_on_with(tokenizer, stop, of):
    if "enum" in of:
        whole = {json.dumps(each).encode() for each in of["enum"]}
    else:
        whole = {json.dumps(of["const"]).encode()} if "const" in of else answers_of(of)
    spelled = {id_: tokenizer.token_bytes(id_) for id_ in range(VOCAB_SIZE)}
    grammars = Grammars(tokenizer, VOCAB_SIZE, [stop])
    words = {id_: text for id_, text in spelled.items() if text and not text.startswith(b"<|")}
    seen, waiting = set(), [(b"", grammars.matcher(schema(of)))]
    while waiting:
        said, matcher = waiting.pop()
        expected = {
            id_
            for id_, text in words.items()
            if any(answer.startswith(said + text) for answer in whole)
        }
        if said in whole:
            expected.add(stop)
        found = allowed(matcher)
        if len({words.get(id_, b"")[:1] for id_ in expected}) > 1:
            assert found == expected, said
        else:
            # Forced text is spelled as the tokenizer would, and in no other way.
            assert found and found <= expected, said
        for token in found - {stop}:
            longer = said + words[token]
            if longer not in seen:
                seen.add(longer)
                other = matcher.copy()
                other.accept(token)
                waiting.append((longer, other))
    assert seen >= whole


def test_tokens_spell_for_the_grammar_what_they_spell_in_answers(tokenizer, stop):
    """Else an answer would be other text than the one that was checked."""
    grammars = Grammars(tokenizer, VOCAB_SIZE, [stop])
    found = allowed(grammars.matcher(schema({"type": "string"})))
    assert stop not in found
    inside = grammars.matcher(schema({"type": "string"}))
    inside.accept(tokenizer.encode('"')[0])
    possible = allowed(inside)
    assert len(possible) > 250
    for token in possible:
        text = tokenizer.token_bytes(token)
        assert text and text == grammars._tokenizer.decode_bytes([token])


def test_rows_without_a_matcher_stay_and_complete_answers_are_free(tokenizer, stop):
    grammars = Grammars(tokenizer, VOCAB_SIZE, [stop])
    masks = torch.full((4, -(-VOCAB_SIZE // 32)), 7, dtype=torch.int32)
    matchers = [grammars.matcher(schema(each)) for each in (LIST, {"const": 1})]
    for token in tokenizer.encode("1"):
        matchers[1].accept(token)
    fill_masks([(matchers[0], 1), (matchers[1], 3)], masks)
    assert masks[0].eq(7).all() and masks[2].eq(7).all()
    assert masks[1].ne(7).any()
    assert [id_ for id_ in range(VOCAB_SIZE) if masks[3, id_ // 32] >> (id_ % 32) & 1] == [stop]
    matchers[1].accept(stop)
    fill_masks([(matchers[0], 1), (matchers[1], 3)], masks)
    assert masks[3].eq(-1).all()
    matchers[1].accept(5)  # whatever follows
    with pytest.raises(CaptionError, match="held to the schema"):
        matchers[0].accept(tokenizer.encode("x")[0])


def test_what_is_forced_at_the_beginning_is_known_at_once(tokenizer, stop):
    matcher = Grammars(tokenizer, VOCAB_SIZE, [stop]).matcher(schema(FIELDS))
    begun = tokenizer.decode(matcher.forced())
    assert begun and '{"kind": "'.startswith(begun)
    assert matcher.copy().forced() == []


# ---- engines ----


NARROW = Limits(max_rows=4, max_prefill_tokens=24, max_prompts=2)


def ask(of=None, text="Say it.", images=(), **sampling):
    settings = {"do_sample": None, "temperature": 1.3, "top_k": 0, "max_new_tokens": 60} | sampling
    held = None if of is None else schema(of)
    return GenerationRequest(
        (user_message(text, tuple(images)),), SamplingOptions(**settings), schema=held
    )


def mixed() -> list[GenerationRequest]:
    return [
        ask(FIELDS, seed=1),
        ask(text="Free", seed=2, max_new_tokens=9),
        ask(LIST, images=[picture()], do_sample=False, temperature=None, top_k=None),
        ask(FIELDS, seed=3, repetition_penalty=1.2),
        ask(text="Free too. " * 8, do_sample=False, temperature=None, max_new_tokens=30),
        ask(FIELDS, text="What? " * 20, seed=4, top_k=5),
        ask(LIST, seed=5),
        ask(FREE, seed=6, max_new_tokens=5),
        ask({"const": "cat"}, seed=7),
        ask(FIELDS, seed=8, max_new_tokens=1),
        ask(text="Last", seed=9, max_new_tokens=20),
    ]


def native(checkpoint, **settings):
    return NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE, **settings))


@pytest.fixture(scope="module")
def engine(checkpoint):
    with native(checkpoint) as loaded:
        yield loaded


def assert_meets(result, of) -> None:
    if result.finish_reason == "stop":
        assert SchemaCheck(schema(of))(result.text) is None, result.text
    else:
        assert result.num_new_tokens > 0


def test_each_answer_of_a_mix_is_the_one_its_request_gets_alone(engine, monkeypatch):
    monkeypatch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
    engine._close_queue()
    requests = mixed()
    alone = [engine.generate(request) for request in requests]
    together = list(generate_many(engine, requests))
    engine._close_queue()
    for request, one, other in zip(requests, alone, together, strict=True):
        assert (other.text, other.token_ids) == (one.text, one.token_ids)
        assert other.finish_reason == one.finish_reason
        if request.schema is not None and one.finish_reason == "stop":
            assert SchemaCheck(request.schema)(one.text) is None
    assert [each.finish_reason for each in alone].count("stop") >= 6
    assert together[7].finish_reason == "length" and together[7].text.startswith('{"caption": "')
    assert together[8].text == '"cat"'


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": Cache.DYNAMIC},
        {"speculate": Speculate.AUTO},
    ],
)
def test_other_modes_answer_so_too(checkpoint, engine, settings):
    requests = [mixed()[0], mixed()[2], mixed()[3]]
    with native(checkpoint, **settings) as other:
        found = [other.generate(request) for request in requests]
    assert [each.text for each in found] == [engine.generate(each).text for each in requests]
    if "speculate" in settings:
        assert found[1].effective.speculate == "off: schema"


def test_graphs_of_both_halves_answer_so_too(checkpoint, engine, monkeypatch):
    requests = mixed()[:6]
    expected = [engine.generate(request).token_ids for request in requests]
    run_graphs_on_the_host(monkeypatch)
    monkeypatch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
    made = runner.ModelRunner.__init__
    monkeypatch.setattr(
        runner.ModelRunner,
        "__init__",
        lambda self, *given, **named: made(self, *given[:4], True, *given[5:], **named),
    )
    with native(checkpoint) as other:
        generation = other._generation
        generation._stepper = GraphStepper(generation._state)
        alone = [other.generate(request).token_ids for request in requests]
        found = list(generate_many(other, requests))
        for each in found:
            if isinstance(each, Exception):
                raise each
        together = [result.token_ids for result in found]
        keys = list(other._queue._runner._graphs._graphs)
    assert alone == together == expected
    assert {type(key[1]) for key in keys} == {int, tuple}  # logits and choices


def test_the_transformers_engine_holds_answers_to_schemas(checkpoint, engine):
    config = engine_config(checkpoint("qwen3_vl"), engine=EngineName.TRANSFORMERS)
    with TransformersEngine(config) as other:
        greedy = other.generate(mixed()[2])
        drawn = [other.generate(ask(FIELDS, seed=seed, top_k=3)) for seed in range(3)]
    assert greedy.text == engine.generate(mixed()[2]).text
    for result in drawn:
        assert_meets(result, FIELDS)


def test_equal_work_goes_on_behind_the_answer(engine):
    request = ask(LIST, max_new_tokens=40, seed=1)
    work = GenerationRequest(
        request.messages, request.sampling, ignore_eos=True, schema=request.schema
    )
    assert engine.generate(work).num_new_tokens == 40


def test_an_engine_is_loaded_again_with_its_schemas(checkpoint):
    loaded = native(checkpoint)
    first = loaded.generate(mixed()[2]).text
    loaded.close()
    assert loaded.generate(mixed()[2]).text == first
    loaded.close()


# ---- schemas ----


WRONG = {
    '{"type": ': "not JSON",
    "[1]": "holds a list",
    "true": "true or false",
    '{"const": NaN}': "NaN",
    '{"enum": []}': "nothing can meet it",
    '{"const": "\\ud800"}': "schema.json",
    '{"type": "foo"}': "Invalid type: foo",
    '{"not": {}}': "the keyword 'not' at # ",
    '{"properties": {"a": {"items": {"uniqueItems": true}}}}': "'uniqueItems' at #/properties/a/it",
    '{"type": "string", "maxLenght": 3}': "'maxLenght' at #",
    '{"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 1}, "minItems": 1}': (
        "at #/items: nothing can meet it: minimum (3)"
    ),
    '{"type": "object", "properties": {"a": false}, "required": ["a"]}': "required property 'a'",
    '{"type": "string", "minLength": 9, "maxLength": 3}': "nothing can meet it",
    '{"$ref": "#/nope"}': "/nope",
    '{"$ref": "http://example.org/x"}': "example.org",
    '{"type": "string", "pattern": "(?=a)"}': "look-around",
    '{"type": "string", "pattern": "("}': "unclosed group",
    '{"type": "string", "format": "rhyme"}': "Unknown format: rhyme",
    '{"properties": {"a": {"$ref": "#"}}, "required": ["a"]}': "without an end",
    '{"allOf": [{"type": "string"}, {"type": "integer"}]}': "nothing can meet it",
    '{"a":' * 5000: "deeply",
}


GOOD = [
    {},
    {"type": ["string", "null"], "title": "T", "x-order": 3},
    {"$ref": "#/definitions/a%20b", "definitions": {"a b": {"type": "integer"}}},
    {"$ref": "#/$defs/0", "$defs": {"0": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}},
    {"enum": [{"$ref": "#/nowhere/0"}]},
    {"type": "object", "properties": {"$ref": {"type": "string"}, "type": {"const": 1}}},
    {"type": "array", "prefixItems": [{"type": "string"}], "items": False},
    {"type": "string", "format": "date", "examples": ["2026-01-01"]},
]


@pytest.mark.parametrize("of", GOOD, ids=json.dumps)
def test_schemas_that_can_be_kept_to(of):
    assert json.loads(schema(of)) == of


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40])
def test_what_is_wrong_with_a_schema_is_said(text):
    with pytest.raises(InputError, match=r"schema\.json") as caught:
        read_schema(text, "schema.json")
    assert WRONG[text] in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint


def referring(count):
    """Parts that each hold the next; thousands of them are more than the library's stack has."""
    parts = {
        f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}, "required": ["x"]}
        for i in range(count)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**parts, f"d{count}": {"type": "integer"}}}


HEAVY = {
    "references": referring(4000),
    "patterns that meet": {"allOf": [{"type": "string", "pattern": f"x{i}"} for i in range(30)]},
}


@pytest.mark.parametrize("name", HEAVY)
def test_what_would_crash_the_library_or_keep_it_busy_is_refused(monkeypatch, name):
    monkeypatch.setattr("qwencli.engine.constrained._TRIED_S", 1.5)
    with pytest.raises(InputError, match="takes too long to read") as caught:
        read_schema(json.dumps(HEAVY[name]), "schema.json")
    assert "\n" not in caught.value.message and caught.value.hint


def test_large_schemas_are_read_apart_and_what_is_wrong_is_said():
    of = referring(60)
    assert json.loads(schema(of)) == of
    of["$defs"]["d60"] = {"type": "nothing"}
    with pytest.raises(InputError, match="Invalid type: nothing"):
        schema(of)


def test_schemas_that_hold_themselves_and_end(engine):
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": {"enum": ["x", "y"]},
                    "inside": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["name", "inside"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }
    assert_meets(engine.generate(ask(tree, seed=2)), tree)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match="llguidance is not installed") as caught:
        read_schema('{"type": "string"}', "schema.json")
    assert "qwencli[schema]" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"kind": "cat", "count": 3, "name": "Tom"}', None),
        ('{ "kind":"cat",\n "count":3,"name":"T\\u00f6m" }', None),
        ('{"kind": "cat", "count": 13, "name": "Tom"}', "against the schema"),
        ('{"kind": "cat", "count": 1', "not JSON"),
        ('{"kind": "cat", "count": 1}', "against the schema"),
        ("", "not JSON"),
    ],
)
def test_texts_are_checked(text, reason):
    found = SchemaCheck(schema(FIELDS))(text)
    assert found is None if reason is None else reason in str(found)


# ---- any schema ----

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=3))
NAMES = st.text("abcdef", min_size=1, max_size=3)


@st.composite
def integers(draw) -> dict[str, Any]:
    low = draw(st.integers(-200, 200))
    return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 300))}


@st.composite
def strings(draw) -> dict[str, Any]:
    least = draw(st.integers(0, 3))
    return {"type": "string", "minLength": least, "maxLength": least + draw(st.integers(0, 4))}


@st.composite
def arrays(draw, inside) -> dict[str, Any]:
    least = draw(st.integers(0, 2))
    most = least + draw(st.integers(0, 2))
    return {"type": "array", "items": draw(inside), "minItems": least, "maxItems": most}


@st.composite
def objects(draw, inside) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inside, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    shape = {"properties": properties, "required": required, "additionalProperties": False}
    return {"type": "object", **shape}


SCHEMAS = st.recursive(
    st.one_of(
        integers(),
        strings(),
        st.builds(lambda values: {"enum": values}, st.lists(SCALARS, min_size=1, max_size=3)),
        st.builds(lambda value: {"const": value}, SCALARS),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
    ),
    lambda inside: st.one_of(
        arrays(inside),
        objects(inside),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inside, min_size=1, max_size=2)),
    ),
    max_leaves=5,
)


def meets(value: Any, of: dict[str, Any]) -> bool:
    """Whether a value meets one of `SCHEMAS`: what the keywords mean, written down again."""
    if "anyOf" in of:
        return any(meets(value, part) for part in of["anyOf"])
    if "enum" in of or "const" in of:
        values = of.get("enum", [of.get("const")])
        return any(type(value) is type(each) and value == each for each in values)
    kind, size = of["type"], len(value) if isinstance(value, str | list | dict) else 0
    if kind == "integer":
        return type(value) is int and of["minimum"] <= value <= of["maximum"]
    if kind == "string":
        return isinstance(value, str) and of["minLength"] <= size <= of["maxLength"]
    if kind == "array":
        fits = isinstance(value, list) and of["minItems"] <= size <= of["maxItems"]
        return fits and all(meets(each, of["items"]) for each in value)
    if kind == "object":
        properties = of["properties"]
        return (
            isinstance(value, dict)
            and set(of["required"]) <= set(value) <= set(properties)
            and all(meets(each, properties[name]) for name, each in value.items())
        )
    return isinstance(value, bool) if kind == "boolean" else value is None


@pytest.mark.parametrize("text", ['"\\u007F"', '"\x7f"', '"\\u0080"', '"\\u2028"', '"\\u0001"'])
def test_a_text_meets_its_schema_however_its_characters_are_written(text):
    one = {"type": "string", "minLength": 1, "maxLength": 1}
    assert SchemaCheck(schema(one))(text) is None
    named = {"type": "object", "properties": {json.loads(text): one}, "additionalProperties": False}
    assert SchemaCheck(schema(named))("{" + f"{text}: {text}" + "}") is None


@settings(max_examples=60)
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_whatever_is_chosen_of_what_masks_allow_meets_the_schema(tokenizer, stop, of, random):
    held = schema(of)
    matcher = Grammars(tokenizer, VOCAB_SIZE, [stop]).matcher(held)
    said = matcher.forced()
    for _ in range(200):
        possible = sorted(allowed(matcher))
        assert possible, "something may always follow"
        token = random.choice(possible)
        matcher.accept(token)
        if token == stop:
            break
        said.append(token)
    else:
        return
    text = tokenizer.decode(said)
    assert meets(json.loads(text), of), text
    assert SchemaCheck(held)(text) is None
