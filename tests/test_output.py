"""The output sink."""

from __future__ import annotations

import random

import pytest

from qwencli.output import Sink, _wrapped
from qwencli.word_wrap import WordWrap


def test_long_lines_break_between_words():
    assert _wrapped("one two-three four\n  as is", 10) == "one\ntwo-three\nfour\n  as is"


def test_a_word_longer_than_the_line_stays_whole():
    assert _wrapped("see /a/path/longer/than/that", 10) == "see\n/a/path/longer/than/that"


def wrapped(text, columns, cut=1):
    wrap = WordWrap(columns)
    pieces = [wrap.push(text[at : at + cut]) for at in range(0, len(text), cut)]
    return "".join(pieces) + wrap.finish()


@pytest.mark.parametrize("cut", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", "one two\nthree"),
        ("one  two\nthree four", "one  two\nthree\nfour"),
        ("  as it is\n\n", "  as it\nis\n\n"),
        ("a wordlongerthanaline b", "a\nwordlongerthanaline\nb"),
        ("日本語日本語", "日本語日\n本語"),
        ("cafe\u0301 abcd", "cafe\u0301\nabcd"),
        ("trailing ", "trailing "),
    ],
)
def test_a_stream_breaks_between_words_however_it_is_cut(text, expected, cut):
    assert wrapped(text, 8, cut) == expected


def test_wrapping_changes_nothing_but_some_spaces():
    drawn = random.Random(0)
    for _ in range(300):
        words = ["x" * drawn.randint(1, 9) for _ in range(drawn.randint(1, 12))]
        text = " ".join(words)
        lines = wrapped(text, 8, drawn.randint(1, 5)).split("\n")
        assert " ".join(lines) == text
        assert all(len(line) <= 8 or " " not in line for line in lines)


def test_an_answer_is_wrapped_at_a_terminal_alone(capsys, monkeypatch):
    def answer():
        with Sink().stream() as write:
            for piece in ("one tw", "o thr", "ee"):
                write(piece)
        return capsys.readouterr().out

    assert answer() == "one two three\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "8")
    assert answer() == "one two\nthree\n"


def test_a_stopped_answer_shows_what_had_arrived(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt), Sink().stream() as write:
        write("half a wo")
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "half a wo"
