"""Where a command writes: stdout carries the answer alone, stderr everything else.

A command builds an `Output` once. `answer` and `json_line` write to stdout; `notice`, `warn`,
`status` and `table` write to stderr unless the table is itself the answer (`show`).

Whatever is written may quote what strangers wrote: names of files and models, templates, answers.
So all of it passes here through `visible`, and nothing that rich renders is read as markup.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, Literal, TextIO

from qwencli.errors import OutputError, QwenCliError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

# What a terminal obeys instead of showing, what turns the reading order round, and what no
# encoding has. A tab is harmless.
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE_IN_TEXT = re.compile(f"[{_CONTROL}]")
_UNSAFE_IN_LINE = re.compile(f"[{_CONTROL}\n]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def visible(text: str, *, several_lines: bool = False) -> str:
    """The text with control characters written out (`\\x1b`), so that a terminal shows them.

    Args:
        several_lines: line feeds stay what they are.
    """
    if several_lines:
        return _UNSAFE_IN_TEXT.sub(_escape, text.replace("\r\n", "\n"))
    return _UNSAFE_IN_LINE.sub(_escape, text)


def counted(count: int, noun: str, plural: str = "") -> str:
    """ "1 cell", "2 cells", "no cells"; `plural` where it is not the noun and an s."""
    return f"{count or 'no'} {noun if count == 1 else plural or noun + 's'}"


def markdown_page(lines: Iterable[str]) -> str:
    """Lines as one Markdown page; what they quote opens no tag, no link and no line of its own."""
    plain = (_TAG.sub("&lt;", visible(line)).replace("](", "]\\(") for line in lines)
    return "\n".join(plain).rstrip() + "\n"


def _escape(found: re.Match[str]) -> str:
    char = found.group()
    if "\udc80" <= char <= "\udcff":  # a byte of a name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def _escape_for_json(found: re.Match[str]) -> str:
    return f"\\u{ord(found.group()):04x}"


class Output:
    """Where a command writes.

    Args:
        quiet: drop notices and progress; warnings and errors stay.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def answer(self, text: str, *, end: str = "\n") -> None:
        """Write a piece of the answer to stdout, at once.

        Raises:
            OutputError: stdout cannot take it (a full disk behind a redirection).
        """
        with _stdout() as stdout:
            stdout.write(visible(text, several_lines=True) + end)
            stdout.flush()

    @contextmanager
    def stream(self) -> Iterator[Callable[[str], None]]:
        """Yields what writes the pieces of one answer to stdout; its end ends the line.

        At a terminal lines break between words, where the terminal itself would break inside
        them; anywhere else the text stays as it is.

        Raises:
            OutputError: see `answer`.
        """
        if not sys.stdout.isatty():
            yield lambda text: self.answer(text, end="")
            self.answer("")
            return
        wrap = WordWrap(shutil.get_terminal_size().columns)
        try:
            yield lambda text: self.answer(wrap.push(text), end="")
        except BaseException:
            self.answer(wrap.finish(), end="")
            raise
        self.answer(wrap.finish())

    @contextmanager
    def thoughts(self) -> Iterator[Callable[[str], None]]:
        """Yields what shows the pieces of a model's thoughts, dimmed, to somebody at a terminal.

        They are no part of the answer: with stdout or stderr elsewhere nothing is written.
        """
        if self.quiet or not (sys.stdout.isatty() and sys.stderr.isatty()):
            yield lambda text: None
            return
        console = self._console(stderr=True)
        wrap = WordWrap(console.width)
        shown = False

        def write(text: str) -> None:
            nonlocal shown
            shown = shown or bool(text)
            with suppress(OSError):
                plain = visible(text, several_lines=True)
                console.out(plain, style="dim", end="", highlight=False)
                sys.stderr.flush()

        try:
            yield lambda text: write(wrap.push(text))
        finally:
            write(wrap.finish())
            if shown:
                write("\n\n")

    def json_line(self, value: Any) -> None:
        """Write one JSON object on a line of its own to stdout."""
        line = json.dumps(value, ensure_ascii=False)
        line = _UNSAFE_IN_LINE.sub(_escape_for_json, line)
        # JSON has an escape of its own for what the encoding lacks; stdout's is none of JSON.
        self.answer(line if _encodable(line) else json.dumps(value))

    @property
    def columns(self) -> int:
        """Columns that `show` has for a line."""
        return self._console(stderr=False).width

    def show(self, renderable: RenderableType) -> None:
        """Render a table or text that is the command's answer, to stdout.

        Raises:
            OutputError: see `answer`.
        """
        with _stdout():
            self._console(stderr=False).print(_Visible(renderable))

    def table(self, renderable: RenderableType) -> None:
        """Render something that accompanies the answer, to stderr."""
        if not self.quiet:
            with suppress(OSError):
                self._console(stderr=True).print(_Visible(renderable))

    def notice(self, *lines: str) -> None:
        if not self.quiet:
            self._lines(*lines)

    def report(self, *lines: str) -> None:
        """Write what was asked for beside the answer (`--stats`): quiet does not silence it."""
        self._lines(*lines)

    def warn(self, text: str) -> None:
        self._lines(f"warning: {text}")

    def error(self, error: QwenCliError, about: Sequence[str] = ()) -> None:
        """Write an error as its one line: what is wrong and where, then what to do.

        Args:
            about: the inputs that it is about; said first where its message names none of them.
        """
        said = error.message
        if about and not any(name in said for name in about):
            said = f"{', '.join(about)}: {said}"
        self._lines(f"error: {said}" + (f" ({error.hint})" if error.hint else ""))

    def prompt(self, text: str) -> None:
        """Write the sign that a line is awaited; even when quiet."""
        _to_stderr(visible(text))

    def can_ask(self) -> bool:
        """Whether somebody is there to read a question and to answer it."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def confirm(self, question: str) -> bool:
        """Ask on stderr, even when quiet; Enter alone is a no.

        Raises:
            typer.Abort: Ctrl-C, or the end of the input.
        """
        import typer

        # Python writes the end of a question to stdout, which carries the answer alone.
        with redirect_stdout(sys.stderr):
            return typer.confirm(visible(question), err=True)

    @contextmanager
    def status(self, text: str, more: Callable[[], str] = str) -> Iterator[None]:
        """Show `text` with a spinner while the block runs; nothing when stderr is no terminal.

        Args:
            more: what to add to it, asked for whenever it is drawn, by another thread.
        """
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        with self._console(stderr=True).status(_Changing(lambda: text + more())):
            yield

    @contextmanager
    def bar(
        self, total: int, *, still: bool = False
    ) -> Iterator[Callable[[int, str], None] | None]:
        """Show a bar while the block runs; yields what moves it, to how many are done and with a
        text beside it. None when stderr is no terminal: then lines are to be written.

        Args:
            still: draw only when it is moved, use no processor in between, and leave nothing
                behind: the last move may be of what was never finished.
        """
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (
            *([] if still else [SpinnerColumn()]),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
        )
        console = self._console(stderr=True)
        with Progress(
            *columns, console=console, auto_refresh=not still, transient=still
        ) as progress:
            task = progress.add_task("" if still else f"0 of {total}", total=total)

            def move(done: int, text: str) -> None:
                progress.update(task, completed=done, description=visible(text), refresh=still)

            yield move

    @staticmethod
    def _lines(*lines: str) -> None:
        for line in map(visible, lines):
            if sys.stderr.isatty():
                line = _wrapped(line, shutil.get_terminal_size().columns)
            _to_stderr(line + "\n")

    @staticmethod
    def _console(*, stderr: bool) -> Console:
        from rich.console import Console

        return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


class _Changing:
    """A text that is another one each time it is drawn."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text

    def __rich__(self) -> Text:
        from rich.text import Text

        return Text(visible(self._text()))


class _Visible:
    """A renderable whose text passes through `visible`, colours and layout as they are."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for segment in console.render(self._renderable, options):
            text = visible(segment.text, several_lines=True)
            yield segment if segment.control else Segment(text, segment.style)


@contextmanager
def _stdout() -> Iterator[TextIO]:
    """Raises OutputError where stdout cannot take what is written (full, closed)."""
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write the answer: {error.strerror}", "free space, or write it elsewhere"
        ) from error


def _to_stderr(text: str) -> None:
    """Where stderr takes nothing, nobody can be told so; the answer is still wanted."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def ready_streams() -> None:
    """Make stdin, stdout and stderr usable, however this process was started.

    A closed one is opened, so that no other file gets its number: stdin is at its end, stderr
    goes nowhere, and stdout refuses what is written to it. Bytes and characters that an encoding
    does not have are kept or written out, and never an error of the stream.
    """
    # In this order: the system gives the lowest free number.
    if sys.stdin is None:
        sys.stdin = _opened_on_nothing(os.O_RDONLY, "r")
    if sys.stdout is None:
        sys.stdout = _opened_on_nothing(os.O_RDONLY, "w")
    if sys.stderr is None:
        sys.stderr = _opened_on_nothing(os.O_WRONLY, "w")
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _opened_on_nothing(flags: int, mode: Literal["r", "w"]) -> TextIO:
    descriptor = os.open(os.devnull, flags)
    os.set_inheritable(descriptor, True)
    return open(descriptor, mode, encoding="utf-8")  # noqa: PTH123 - a descriptor


def release_streams() -> None:
    """Drop what stdout and stderr have refused, which Python would try again at its exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _encodable(text: str) -> bool:
    """Whether stdout's encoding has every character; on Windows a redirected one lacks most."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _wrapped(text: str, columns: int) -> str:
    """Break lines that are too long between words; a terminal breaks inside them."""
    return "\n".join(
        textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        if len(line) > columns
        else line
        for line in text.split("\n")
    )


class WordWrap:
    """Breaks a stream of text into lines between words, piece by piece as it arrives.

    All pieces together are the text, with a line feed in the place of some of its spaces.

    The word at the end of what has arrived is held back until it is whole. Wide characters
    (Chinese, Japanese, Korean) are words of their own, as their scripts have no spaces. A word
    that is longer than a line is the terminal's to break.

    Args:
        columns: width of a line.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._column = 0
        self._space = ""
        self._word = ""

    def push(self, text: str) -> str:
        """What may be written now."""
        return "".join(self._char(char) for char in text)

    def finish(self) -> str:
        """What was held back."""
        rest = self._flush() + self._space
        self._space = ""
        return rest

    def _char(self, char: str) -> str:
        if char == "\n":
            done = self._flush() + self._space
            self._space, self._column = "", 0
            return done + char
        if char.isspace():
            done = self._flush()
            self._space += char
            return done
        if _cells(char) == 2:
            done = self._flush()
            self._word = char
            return done
        done = self._flush() if self._word and _cells(self._word[-1]) == 2 else ""
        self._word += char
        return done

    def _flush(self) -> str:
        """The held word, on this line if it fits, else on the next."""
        if not self._word:
            return ""
        width = sum(map(_cells, self._word))
        space, word = self._space, self._word
        self._space = self._word = ""
        if self._column and self._column + len(space) + width > self._columns:
            space, self._column = "\n", 0
        self._column += len(space.strip("\n")) + width
        return space + word


def _cells(char: str) -> int:
    """Columns of a terminal that `char` takes (Unicode Standard Annex 11)."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
