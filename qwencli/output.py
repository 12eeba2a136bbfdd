"""The one output sink: stdout carries the answer alone, stderr everything else.

A command builds a `Sink` once. `answer` and `json_line` write to stdout; `notice`, `warn`,
`status` and `table` write to stderr unless the table is itself the answer (`show`).
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qwencli.errors import OutputError, QwenCliError
from qwencli.word_wrap import WordWrap

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Sink:
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
        try:
            sys.stdout.write(text + end)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot write the answer: {error.strerror}", "free space, or write it elsewhere"
            ) from error

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
            console.out(text, style="dim", end="", highlight=False)
            sys.stderr.flush()

        try:
            yield lambda text: write(wrap.push(text))
        finally:
            write(wrap.finish())
            if shown:
                console.out("\n")

    def json_line(self, value: Any) -> None:
        """Write one JSON object on a line of its own to stdout."""
        self.answer(json.dumps(value, ensure_ascii=False))

    def show(self, renderable: RenderableType) -> None:
        """Render a table or text that is the command's answer, to stdout."""
        self._console(stderr=False).print(renderable)

    def table(self, renderable: RenderableType) -> None:
        """Render something that accompanies the answer, to stderr."""
        if not self.quiet:
            self._console(stderr=True).print(renderable)

    def notice(self, text: str) -> None:
        if not self.quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}")

    def error(self, error: QwenCliError) -> None:
        """Write an error as its one line: what is wrong and where, then what to do."""
        self._line(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""))

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show `text` with a spinner while the block runs; nothing when stderr is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        with self._console(stderr=True).status(text):
            yield

    @staticmethod
    def _line(text: str) -> None:
        if sys.stderr.isatty():
            text = _wrapped(text, shutil.get_terminal_size().columns)
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    @staticmethod
    def _console(*, stderr: bool) -> Console:
        from rich.console import Console

        return Console(stderr=stderr, highlight=False)


def _wrapped(text: str, columns: int) -> str:
    """Break lines that are too long between words; a terminal breaks inside them."""
    return "\n".join(
        textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        if len(line) > columns
        else line
        for line in text.split("\n")
    )
