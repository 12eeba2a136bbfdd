"""Answers drawn while they come: the lines of Markdown, and the screen that shows them."""

from __future__ import annotations

import io
import os
import random

import pyte
import pytest

from qwencli.commands import answer_display
from qwencli.commands.answer_display import TerminalDisplay
from qwencli.commands.live_lines import LiveLines
from qwencli.commands.markdown_stream import MarkdownStream
from qwencli.output import Output
from qwencli.results import GenerationChunk

BLOCKS = [
    "# A title",
    "Words *in* **many** styles, `code` and a [link](https://example.org/a) that goes on a while.",
    "A verse\nof two lines <b>and</b> a tag",
    "1. one\n2. two\n   - inside\n\n   a paragraph of it\n3. three\n" + "4. four\n" * 9,
    "- a\n- b\n\n- c",
    "| a | b |\n|---|---|\n| 1 | 漢字 |",
    "```python\n" + "".join(f"def f{i}(x): return {i}\n" for i in range(60)) + "```",
    "> a quote\n> of two lines",
    "Before\n\n***",
    "[1]: https://example.org/one",
    "日本語のとても長い文章はここで折り返されますか。" * 4,
    "An end without an end: **bold, `code, ~~~",
]


def lines_of(source, width=50, piece=None):
    """What is shown of a text that comes whole, or in pieces."""
    stream = MarkdownStream()
    shown, at = [], 0
    while piece and at < len(source):
        size = piece()
        stream.push(source[at : at + size])
        at += size
        shown += stream.lines(width)[0]
    if not piece:
        stream.push(source)
    return shown + stream.lines(width, finish=True)[0]


def test_pieces_give_the_lines_of_the_whole():
    for seed in range(4):
        drawn = random.Random(seed)
        source = "\n\n".join(drawn.sample(BLOCKS, 6))
        whole = lines_of(source)
        assert lines_of(source, piece=lambda drawn=drawn: drawn.randint(1, 60)) == whole, source


def test_nothing_that_a_model_writes_is_lost_or_obeyed():
    text = "\n".join(
        lines_of("<think>a</think>\n\n[1]: https://e.org/1\n\n[x](https://e.org/2)\n\na\nb")
    )
    for written in ("<think>a</think>", "[1]: https://e.org/1", "https://e.org/2", "a\nb"):
        assert written in text
    assert "\x1b]8" not in text


def test_lists_are_numbered_on_as_they_grow():
    source = "".join(f"1. item {n}\n" for n in range(1, 13))
    shown = [line.split() for line in lines_of(source, piece=lambda: 5)]
    assert shown == [[str(n), "item", str(n)] for n in range(1, 13)]


class Screen(io.StringIO):
    """A terminal in memory, and all that was written to it."""

    def __init__(self, columns, rows):
        super().__init__()
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self.feed = pyte.Stream(self.screen).feed

    def write(self, text):
        self.feed(text.replace("\n", "\r\n"))
        return super().write(text)

    def isatty(self):
        return True

    def text(self):
        top = [
            "".join(row[x].data for x in range(self.screen.columns))
            for row in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*top, *self.screen.display]).rstrip()


@pytest.fixture
def terminal(monkeypatch):
    """`terminal(columns, rows)`; it is stdout too, and its size is the terminal's."""

    def make(columns, rows):
        made = Screen(columns, rows)
        monkeypatch.setattr("sys.stdout", made)
        size = os.terminal_size((columns, rows))
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_: size)
        return made

    return make


def test_lines_that_differ_are_drawn_and_no_others(terminal):
    screen = terminal(20, 4)
    lines = LiveLines(screen)
    lines.draw([], ["one", "two", "status"])
    written = len(screen.getvalue())
    lines.draw(["one"], ["two", "three", "status"])
    lines.draw([], ["two", "three", "status"])
    assert "one" not in screen.getvalue()[written:] and "two" not in screen.getvalue()[written:]
    lines.draw(["two", "three", "four", "five"], ["six", "status"])
    lines.draw(["six"], [])
    lines.close()
    assert screen.text() == "one\ntwo\nthree\nfour\nfive\nsix"
    assert "\x1b[2J" not in screen.getvalue() and "\x1b[H" not in screen.getvalue()


def test_a_random_course_ends_in_the_lines_that_were_final(terminal):
    for seed in range(15):
        drawn = random.Random(seed)
        screen = terminal(30, drawn.randint(3, 8))
        lines, final = LiveLines(screen), []
        for step in range(12):
            done = [f"{step} final {n}" for n in range(drawn.randint(0, 5))]
            lines.draw(done, [f"{step} live {n}" for n in range(drawn.randint(0, 2))])
            final += done
        lines.draw(["end"], [])
        lines.close()
        assert screen.text() == "\n".join([*final, "end"]), seed


def test_a_terminal_that_has_become_narrower_is_drawn_anew(terminal):
    screen = terminal(20, 10)
    lines = LiveLines(screen)
    lines.draw(["above"], ["a line of twenty ch", "status"])
    # As terminals do that break lines again: the live lines take three rows now.
    narrow = terminal(10, 10)
    narrow.write("above\na line of \ntwenty ch\nstatus")
    lines._terminal = narrow
    lines.draw([], ["a line of", "twenty ch"])
    lines.draw(["a line of", "twenty ch", "end"], [])
    lines.close()
    assert narrow.text() == "above\na line of\ntwenty ch\nend"


def chunks(text, size=7):
    return [GenerationChunk(text[at : at + size], (1,)) for at in range(0, len(text), size)]


@pytest.mark.parametrize("columns", [40, 80])
def test_an_answer_is_drawn_as_it_comes(terminal, monkeypatch, columns):
    monkeypatch.setattr(answer_display, "DRAW_EVERY_S", 0.0)
    monkeypatch.setattr(answer_display, "DRAW_SHARE", 1e9)
    screen = terminal(columns, 12)
    seen = []
    with TerminalDisplay(Output(), 100).answer() as show:
        assert "reading" in screen.text()
        for n in range(40):
            show(GenerationChunk("", (1,), thoughts=f"I wonder {n} times. "))
        seen.append(screen.text().splitlines())
        for chunk in chunks("\n\nA **bold** word.\n\n" + "1. item\n" * 30):
            show(chunk)
        assert "tok/s" in screen.text()
    assert len(seen[0]) <= 6 and "I wonder 39 times." in seen[0][-3]
    lines = screen.text().splitlines()
    assert lines[0].startswith("thought for ")
    assert lines[2:] == ["A bold word.", "", *(f" {n:2} item" for n in range(1, 31))]
    assert screen.getvalue().endswith("\x1b[?25h")


def test_ctrl_c_leaves_no_half_of_a_drawing(terminal, monkeypatch):
    import signal

    screen = terminal(40, 12)
    monkeypatch.setattr(answer_display, "DRAW_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt), TerminalDisplay(Output(), 100).answer() as show:
        original = screen.write

        def write(text):
            signal.raise_signal(signal.SIGINT)
            return original(text)

        monkeypatch.setattr(screen, "write", write)
        show(GenerationChunk("What came.", (1,)))
        raise AssertionError("stopped before")
    assert screen.text() == "What came."
