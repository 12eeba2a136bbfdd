"""What each picture is asked: templates, weights, hints, fields."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.dataset.hints import MAX_HINT_BYTES, is_tag_list, picture_fields, read_hints
from qwencli.dataset.prompting import (
    PromptSet,
    Template,
    Weighted,
    prompt_set,
    read_prompt_file,
    seeded_uniform,
)
from qwencli.errors import InputError, UsageError
from qwencli.messages import DEFAULT_PROMPT, PRESETS

ANY_TEXT = st.text(max_size=60)


def asked(prompts, relative="a/b.png", known=None):
    fields = picture_fields(relative, hints=known)
    return {q.field: q.text for q in prompts.questions(relative, fields)}


def made(**said):
    return prompt_set(default=DEFAULT_PROMPT, **said)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{name} in {dir}", "b in a"),
        ("{{name}} {name}", "{name} b"),
        ('Answer as {"label": "{name}"}', 'Answer as {"label": "b"}'),
        ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 2]}}'),
        ("{} {0} \\d{3} { name }", "{} {0} \\d{3} { name }"),
        ("tags: {tags|none}", "tags: none"),
        ("tags: {tags}", "tags: "),
        ("{{name:5}}", "{name:5}"),
    ],
)
def test_templates(text, filled):
    assert asked(made(prompt=text)) == {"caption": filled}


@pytest.mark.parametrize("field", ["name!r", "name:>10", "name.__class__", "name[0]"])
def test_a_field_is_a_name_and_nothing_more(field):
    with pytest.raises(UsageError, match="is not a field"):
        made(prompt=f"Look: {{{field}}}")


def test_values_are_not_read_as_templates():
    assert Template("{tags}", "--prompt").filled({"tags": "{name}", "name": "x"}) == "{name}"


@given(ANY_TEXT, st.dictionaries(st.sampled_from(["name", "dir", "tags"]), ANY_TEXT))
@settings(max_examples=300)
def test_any_text_is_a_template_or_one_error(text, known):
    try:
        template = Template(text, "--prompt")
    except UsageError:
        return
    filled = template.filled(known)
    if "{" not in text:
        assert filled == text


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("{tgas}", "did you mean {tags}"),
        ("{tgas|none}", "did you mean {tags}"),
        ("{subjct|a person}", "did you mean {subject}"),
        ("{zzzzqq}", "use {name}, {dir}, {tags}"),
        ("{zzzzqq|none} {zzzzqq}", "use {name}, {dir}, {tags}"),
    ],
)
def test_an_unknown_field_is_one_error_with_what_there_is(text, hint):
    with pytest.raises(UsageError, match="not a field, and no picture") as raised:
        made(prompt=text).check_fields([{}, {"subject": "cat"}])
    assert hint in raised.value.hint
    assert "--prompt" in raised.value.message


def test_what_has_something_in_its_place_may_be_unknown():
    prompts = made(prompt="{subject|a person} {tags|none} {mood|}")
    prompts.check_fields([{}])
    assert prompts.questions("a.png", {})[0].text == "a person none "


def test_fields_of_json_files_count_and_no_more_files_are_read_than_needed():
    def hints():
        yield {"subject": "cat"}
        yield {"mood": "calm"}
        raise AssertionError("all fields were found")

    made(prompt="{subject} {mood} {name}").check_fields(hints())
    made(prompt="{name} {caption}").check_fields(hints())


def test_frames_are_checked_too():
    frame = Template("{trigger}, ", "--prefix")
    prompts = made(frames=[frame])
    assert prompts.needs_hints
    with pytest.raises(UsageError, match="--prefix"):
        prompts.check_fields([])
    assert not made(prompt="{name} {dir}").needs_hints


def test_what_is_asked_where_nothing_is_said():
    assert asked(made()) == {"caption": DEFAULT_PROMPT}
    assert asked(made(preset="tags")) == {"caption": PRESETS["tags"]}


def test_several_fields():
    prompts = made(prompt="Describe.", fields=["short", "mood=What mood has {name}?"])
    assert asked(prompts) == {
        "caption": "Describe.",
        "short": PRESETS["short"],
        "mood": "What mood has b?",
    }
    # With fields alone there is no caption beside them.
    assert list(asked(made(fields=["prompt-refine"]))) == ["prompt_refine"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"prompt": "a", "preset": "tags"}, "exclude"),
        ({"prompt": "a", "prompt_file": Path("x")}, "exclude"),
        ({"preset": "nope"}, "unknown"),
        ({"fields": ["nope"]}, "neither"),
        ({"fields": ["a="]}, "asks nothing"),
        ({"fields": ["a b=x"]}, "not a name"),
        ({"fields": ["a=x", "a=y"]}, "twice"),
        ({"prompt": "x", "fields": ["caption=y"]}, "twice"),
    ],
)
def test_options_that_cannot_be_met(said, message):
    with pytest.raises(UsageError, match=message):
        made(**said)


def test_the_choice_depends_on_seed_field_and_path_alone():
    prompts = [Weighted(Template(text, "f"), 1.0) for text in "abcdefgh"]
    here, again = (PromptSet({"caption": prompts}, seed=3) for _ in range(2))
    names = [f"{n}.png" for n in range(200)]
    first = [asked(here, name) for name in names]
    assert first == [asked(again, name) for name in reversed(names)][::-1]
    assert first != [asked(PromptSet({"caption": prompts}, seed=4), name) for name in names]
    # Windows names the same picture by other slashes.
    assert asked(here, "a/b/c.png") == asked(here, "a\\b\\c.png")


def test_no_seed_is_the_same_choice_every_time():
    both = [made(prompt="x", seed=seed) for seed in (None, -1, 0)]
    assert {prompts.seed for prompts in both} == {0}


@given(st.integers(0, 2**32 - 1), st.text(max_size=20))
@settings(max_examples=200)
def test_drawn_is_a_share(seed, name):
    assert 0 <= seeded_uniform(seed, "caption", name) < 1
    assert seeded_uniform(seed, "caption", name) == seeded_uniform(seed, "caption", name)


def test_weights_are_kept(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# ours\n3: often\n\nrarely\n0: never\n", encoding="utf-8")
    prompts = made(prompt_file=path)
    counts = Counter(asked(prompts, f"{n}.png")["caption"] for n in range(4000))
    assert counts.keys() == {"often", "rarely"}
    assert 2800 < counts["often"] < 3200


def test_prompt_files_of_json(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(
        json.dumps({"caption": [{"prompt": "A", "weight": 2}, "B"], "mood": "C"}), encoding="utf-8"
    )
    found = read_prompt_file(path)
    weights = {name: [(p.template.text, p.weight) for p in ps] for name, ps in found.items()}
    assert weights == {"caption": [("A", 2.0), ("B", 1.0)], "mood": [("C", 1.0)]}
    path.write_text(json.dumps(["A", {"prompt": "B"}]), encoding="utf-8")
    assert [p.template.text for p in read_prompt_file(path)["caption"]] == ["A", "B"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompt"),
        (b"# nothing\n", "no prompt"),
        (b"0: never\n", "no prompt"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b'{"caption": [', "not JSON"),
        (b"[]", "no prompt"),
        (b"[1]", "is not a prompt"),
        (b'[{"prompt": "a", "weight": "x"}]', "weight"),
        (b'[{"prompt": "a", "weight": true}]', "weight"),
        (b'[{"prompt": "a", "weight": -1}]', "weight"),
        (b'[{"prompt": "a", "wieght": 1}]', "wieght"),
        (b'[""]', "is empty"),
        (b'{"a b": "c"}', "not a name"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / ("prompts.json" if content[:1] in (b"[", b"{") else "prompts.txt")
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_prompt_file(path)
    assert path.name in raised.value.message


def test_a_prompt_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="prompt-file"):
        read_prompt_file(tmp_path / "none.txt")
    with pytest.raises(InputError, match="prompt-file"):
        read_prompt_file(tmp_path)


def test_hints_beside_a_picture(tmp_path):
    picture = tmp_path / "10_sks dog" / "a.png"
    picture.parent.mkdir()
    assert read_hints(picture) == {"caption": "", "tags": "", "hints": ""}
    picture.with_suffix(".txt").write_text("dog, park, sunny day\n", encoding="utf-8")
    assert read_hints(picture)["tags"] == "dog, park, sunny day"
    picture.with_suffix(".json").write_text(
        json.dumps({"subject": "Rex", "tags": ["dog", "grass"], "outdoor": True, "age": 3}),
        encoding="utf-8",
    )
    known = picture_fields("a.png", picture, read_hints(picture))
    assert known["tags"] == "dog, grass"
    assert known["caption"] == "dog, park, sunny day"
    assert known["hints"] == "subject: Rex\ntags: dog, grass\noutdoor: yes\nage: 3"
    text = Template("{subject}, {age}: {dir}/{name}", "--prompt").filled(known)
    assert text == "Rex, 3: 10_sks dog/a"


def test_a_sentence_is_no_tags(tmp_path):
    picture = tmp_path / "a.png"
    picture.with_suffix(".caption").write_text("A dog, and a cat.", encoding="utf-8")
    known = read_hints(picture, ".caption")
    assert (known["caption"], known["tags"]) == ("A dog, and a cat.", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (MAX_HINT_BYTES + 1), "too large"),
    ],
)
def test_hints_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_hints(tmp_path / "a.png")
    assert "a.json" in raised.value.message


def test_names_that_are_no_text():
    known = picture_fields("d/x\udcff\ny.png")
    known["name"].encode()
    assert "\n" not in known["name"]


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("red hat, blue sky, 1girl", True),
        ("A dog, which runs along the beach, and a small red ball beside it", False),
        ("A dog runs. A cat, sleeps", False),
        ("dog", False),
        ("", False),
    ],
)
def test_lists_of_tags(text, tags):
    assert is_tag_list(text) is tags
