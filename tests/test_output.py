"""The output sink."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from qwencli.errors import QwenCliError
from qwencli.output import Output, WordWrap, _wrapped, markdown_page, visible


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
        with Output().stream() as write:
            for piece in ("one tw", "o thr", "ee"):
                write(piece)
        return capsys.readouterr().out

    assert answer() == "one two three\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "8")
    assert answer() == "one two\nthree\n"


def test_a_stopped_answer_shows_what_had_arrived(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt), Output().stream() as write:
        write("half a wo")
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "half a wo"


HOSTILE = "a\x1b]0;title\x07\x1b[2J\rb\x9b31m\u202ec\nerror: forged"


def controls(text):
    return [
        char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t"
    ]


@pytest.mark.parametrize(
    "write",
    [
        lambda sink: sink.notice(HOSTILE),
        lambda sink: sink.warn(HOSTILE),
        lambda sink: sink.report(HOSTILE),
        lambda sink: sink.prompt(HOSTILE),
        lambda sink: sink.error(QwenCliError(HOSTILE, HOSTILE)),
    ],
)
def test_what_is_quoted_in_a_line_stays_in_that_line(write, capsys):
    write(Output())
    err = capsys.readouterr().err
    assert not controls(err)
    assert err.count("\n") <= 1
    assert r"a\x1b]0;title\x07\x1b[2J\rb\x9b31m\u202ec\nerror: forged" in err


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_cannot_steer_the_terminal(terminal, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    with Output().stream() as write:
        for char in HOSTILE:
            write(char)
    out = capsys.readouterr().out
    assert not controls(out)
    assert out.count("\n") == 2


def test_thoughts_cannot_steer_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Output().thoughts() as think:
        think(HOSTILE)
    assert "\x1b]" not in capsys.readouterr().err


@given(st.text(st.characters(), max_size=40))
def test_json_is_one_line_of_plain_characters_and_loses_nothing(text):
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        Output().json_line({"caption": text})
    written = stdout.getvalue()
    assert not controls(written)
    assert written.count("\n") == 1
    assert json.loads(written) == {"caption": text}


@given(st.text(st.characters(), max_size=40))
def test_visible_text_is_plain_and_readable_text_stays(text):
    assert not controls(visible(text))
    assert "\n" not in visible(text)
    assert visible(visible(text)) == visible(text)
    assert visible("Grüße, 日本語 👩‍🚀 \t") == "Grüße, 日本語 👩‍🚀 \t"


def test_a_byte_that_is_not_utf_8_is_shown_as_that_byte():
    assert visible(os.fsdecode(b"a\xff.png")) == r"a\xff.png"


@pytest.mark.parametrize("show", ["show", "table"])
def test_tables_show_names_as_they_are(show, capsys):
    table = Table(title="[v1] :smile:")
    table.add_column("[/x]")
    table.add_row("[red]m[/red] \x1b[2J")
    getattr(Output(), show)(table)
    out = "".join(capsys.readouterr())
    for part in ("[v1] :smile:", "[/x]", r"[red]m[/red] \x1b[2J"):
        assert part in out
    assert not controls(out)


def test_a_status_shows_names_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Output().status("loading [/x]\x1b]0;t\x07"):
        pass
    assert "\x1b]0;" not in capsys.readouterr().err


def test_a_status_says_how_far_it_is_at_a_terminal_alone(capsys, monkeypatch):
    asked = []

    def more():
        asked.append(1)
        return f": {len(asked)} of 9 GB"

    with Output().status("loading m", more):
        pass
    assert not asked
    assert not capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Output().status("loading m", more):
        pass
    shown = capsys.readouterr().err
    assert asked and f"loading m: {len(asked)} of 9 GB" in shown


def test_what_a_markdown_page_quotes_opens_no_tag_link_or_line():
    page = markdown_page(["# Page", "- <script>x</script> a < b\n# forged", "![x](http://e.x/a)"])
    assert page == ("# Page\n- &lt;script>x&lt;/script> a < b\\n# forged\n![x]\\(http://e.x/a)\n")
