"""From an answer to a caption: replaced, banned, cut, framed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.dataset.caption_format import (
    CaptionFormat,
    banned,
    count_words,
    ends_whole,
    parse_ban,
    parse_replace,
    replaced,
    sentences,
)
from qwencli.dataset.prompting import Template
from qwencli.errors import InputError, UsageError

THREE = "A man walks. He wears a red hat! Is it raining?"
WORDS = st.text("ab .,!?。\n", max_size=80)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (THREE, ["A man walks.", "He wears a red hat!", "Is it raining?"]),
        ("Dr. Smith and J. Doe stand at 3.5 m. Fine.", 2),
        ('It says "Stop." A car waits.', 2),
        ("一只猫。它在睡觉。", ["一只猫。", "它在睡觉。"]),
        ("- a cat\n- a dog\n", ["- a cat", "- a dog"]),
        ("1. A cat sits. 2. A dog runs.", 2),
        ("A cat.\n\nA dog.\n", ["A cat.", "A dog."]),
        ("no end", ["no end"]),
        ("Wait... what?", 2),
        ("", []),
    ],
)
def test_sentences(text, found):
    got = sentences(text)
    assert (len(got) if isinstance(found, int) else got) == found


@given(WORDS)
@settings(max_examples=300)
def test_sentences_lose_nothing(text):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


@given(WORDS, st.integers(1, 4), st.integers(1, 30))
@settings(max_examples=300)
def test_limits_hold_and_cut_at_ends(text, most_sentences, most_tokens):
    formatted = CaptionFormat(max_sentences=most_sentences, max_tokens=most_tokens).formatted(text)
    assert count_words(formatted.text) <= most_tokens
    whole = " ".join(text.split())
    assert whole.startswith(formatted.text)
    assert formatted.cut == (formatted.text != whole)
    if formatted.cut and formatted.text and "," not in text and "\n" not in text:
        assert ends_whole(formatted.text)


def test_sentence_and_token_limits():
    assert (
        CaptionFormat(max_sentences=2).formatted(THREE).text == "A man walks. He wears a red hat!"
    )
    assert CaptionFormat(max_tokens=9).formatted(THREE).text == "A man walks."
    assert CaptionFormat(max_tokens=3).formatted(THREE).text == ""
    assert CaptionFormat(max_tokens=5).formatted("a, b b, c, d").text == "a, b b"
    by_letters = CaptionFormat(max_tokens=12, count_tokens=len)
    assert by_letters.formatted(THREE).text == "A man walks."
    assert not CaptionFormat(max_sentences=3).formatted(THREE).cut


def test_a_caption_is_one_line_without_thoughts():
    answer = "<think>\nHm, a cat?\n</think>\n\nA cat.\n\nIt sleeps.\t"
    assert CaptionFormat().formatted(answer).text == "A cat. It sleeps."


@pytest.mark.parametrize(
    ("rules", "text", "result"),
    [
        (["woman=sks woman"], "A woman, Woman! womanly", "A sks woman, sks woman! womanly"),
        (["a=b", "b=a"], "a b", "b a"),
        (["the image shows="], "The image  shows a cat.", "a cat."),
        (["red=", "x=y"], "red, blue, red, x", "blue, y"),
        ([r"a\=b=c"], "is a=b so", "is c so"),
        (["猫=狗"], "一只猫在睡觉", "一只狗在睡觉"),
        (["red hat=cap", "hat=lid"], "a red hat and a hat", "a cap and a lid"),
        (["c++=C"], "in c++ and c", "in C and c"),
        (["x=\\1 \\g<0>"], "x", "\\1 \\g<0>"),
    ],
)
def test_replacements(rules, text, result):
    assert CaptionFormat(replace=parse_replace(rules)).formatted(text).text == result


@given(
    st.lists(st.tuples(st.text("abc. ", min_size=1, max_size=4), st.text("abc", max_size=3))), WORDS
)
@settings(max_examples=300)
def test_replacing_never_fails_and_does_nothing_without_a_match(rules, text):
    rules = [(word, new) for word, new in rules if word.strip()]
    if not rules:
        return
    result = replaced(text, rules)
    if not banned(text, [word for word, _ in rules]):
        assert result == text


def test_banned_words():
    assert banned("A Watermark here", ["watermark"]) == "Watermark"
    assert banned("watermarks", ["watermark"]) is None
    assert banned("有水印的图", ["水印"]) == "水印"
    assert CaptionFormat(ban=["watermark"]).formatted("cat, a watermark, hat").text == "cat, hat"
    # Prose is not mended: a sentence with a hole in it is no caption.
    assert "watermark" in CaptionFormat(ban=["watermark"]).formatted("A cat with a watermark.").text


@pytest.mark.parametrize(
    ("prefix", "suffix", "result"),
    [
        ("sks, ", None, "sks, a cat"),
        ("sks,", ", best quality", "sks, a cat, best quality"),
        ("sks", "at night", "sks a cat at night"),
        ("({dir})", " [{name}]", "(d) a cat [n]"),
        ("{tags|no tags}: ", ".", "no tags: a cat."),
        ("", "", "a cat"),
    ],
)
def test_frames(prefix, suffix, result):
    caption_format = CaptionFormat(
        prefix=None if prefix is None else Template(prefix, "--prefix"),
        suffix=None if suffix is None else Template(suffix, "--suffix"),
    )
    assert caption_format.with_frame("a cat", {"dir": "d", "name": "n"}) == result


def test_lists_from_files(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# none of these\nwatermark\n\nlow quality\n", encoding="utf-8")
    assert parse_ban([f"@{words}", "blurry"]) == ("watermark", "low quality", "blurry")
    words.write_text("a=b\n", encoding="utf-8")
    assert parse_replace([f"@{words}"]) == (("a", "b"),)


def test_lists_that_cannot_be_used(tmp_path):
    for given_ in ("nothing", "=b", " = "):
        with pytest.raises(UsageError, match="--replace"):
            parse_replace([given_])
    with pytest.raises(UsageError, match="--ban"):
        parse_ban([" "])
    with pytest.raises(InputError, match="none"):
        parse_ban([f"@{tmp_path / 'none.txt'}"])
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        parse_replace([f"@{tmp_path / 'x'}"])
