"""How an answer is shown while it comes: as plain text, or drawn at a terminal."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from qwencli.messages import VisualPart
from qwencli.output import Output, counted, visible

if TYPE_CHECKING:
    from types import FrameType

    from qwencli.commands.live_lines import LiveLines
    from qwencli.commands.markdown_stream import MarkdownStream
    from qwencli.results import GenerationChunk, GenerationResult

# Seconds between two drawings, and the share of time that drawing may take: the processor is
# wanted for the answer.
DRAW_EVERY_S, DRAW_SHARE = 0.05, 0.1
# Rows of thoughts that are seen while a model thinks.
THOUGHT_ROWS = 4


class Display(Protocol):
    """Where answers and attached pictures are shown.

    `figures` say how the last answer came, each with its unit.
    """

    @property
    def figures(self) -> tuple[str, ...]: ...

    def answer(self) -> AbstractContextManager[Callable[[GenerationChunk], None]]:
        """Yields what shows the chunks of one answer."""

    def attached(self, pictures: Sequence[VisualPart]) -> None: ...

    def answered(self, result: GenerationResult) -> None:
        """An answer is complete."""


class PlainDisplay:
    """Answers as plain text on stdout; see `Output.stream`."""

    figures: tuple[str, ...] = ()

    def __init__(self, output: Output) -> None:
        self._output = output

    @contextmanager
    def answer(self) -> Iterator[Callable[[GenerationChunk], None]]:
        with ExitStack() as stack:
            think = stack.enter_context(self._output.thoughts())
            write: Callable[[str], None] | None = None

            def show(chunk: GenerationChunk) -> None:
                nonlocal write
                if write is None:
                    think(chunk.thoughts)
                    if not chunk.text and chunk.result is None:
                        return
                    stack.pop_all().close()
                    write = stack.enter_context(self._output.stream())
                write(chunk.text)

            yield show

    def attached(self, pictures: Sequence[VisualPart]) -> None:
        pass

    def answered(self, result: GenerationResult) -> None:
        pass


class SilentDisplay(PlainDisplay):
    """Answers are written by other means (`--json`)."""

    @contextmanager
    def answer(self) -> Iterator[Callable[[GenerationChunk], None]]:
        yield lambda chunk: None


class TerminalDisplay:
    """Answers as Markdown, drawn while they come; see `LiveLines` for how.

    While a model thinks the last rows of its thoughts are seen, dimmed; a line of how long that
    took is left of them. Below an unfinished answer stands how fast it comes.

    Args:
        max_seq_len: tokens that the engine holds; None where nobody knows (a server).
    """

    def __init__(self, output: Output, max_seq_len: int | None) -> None:
        self._output, self._max_seq_len = output, max_seq_len
        # Of the last answer: what a prompt shows below itself.
        self.figures: tuple[str, ...] = ()

    @contextmanager
    def answer(self) -> Iterator[Callable[[GenerationChunk], None]]:
        from qwencli.commands.live_lines import LiveLines
        from qwencli.commands.markdown_stream import MarkdownStream

        screen = LiveLines(sys.stdout)
        drawing = _Drawing(screen, MarkdownStream(), not self._output.quiet)
        with _interrupts_wait(drawing):
            drawing.begin()
            try:
                yield drawing.show
            finally:
                drawing.finish()

    def attached(self, pictures: Sequence[VisualPart]) -> None:
        from qwencli.commands.terminal_pictures import show_pictures

        if not self._output.quiet:
            show_pictures(pictures)

    def answered(self, result: GenerationResult) -> None:
        speed, ttft_s = result.timings.decode_tok_per_s, result.timings.ttft_s
        figures = [] if speed is None else [f"{speed:.1f} tok/s"]
        if result.num_prompt_tokens is not None:
            used, room = result.num_prompt_tokens + result.num_new_tokens, self._max_seq_len
            # Short, so that it has room beside the speed on 40 columns.
            full = f"{100 * used / room:.0f}% of {room:,}" if room else f"{used:,} tokens"
            figures.append(f"context {full}")
        if ttft_s is not None:
            figures.append(f"TTFT {_seconds(ttft_s)}")
        self.figures = tuple(figures)


class _Drawing:
    """One answer on its way."""

    def __init__(self, screen: LiveLines, markdown: MarkdownStream, footer: bool) -> None:
        self._screen, self._markdown, self._footer = screen, markdown, footer
        self._began_s = 0.0
        self._first_s: float | None = None
        self._thinking_s: float | None = None
        self._thoughts = ""
        self._answering = False
        self._tokens = 0
        self._next_s = 0.0
        self.busy = False
        self.interrupted = False

    def begin(self) -> None:
        """Say that an answer is awaited; time runs from here on."""
        self.draw()
        self._began_s = time.perf_counter()

    def show(self, chunk: GenerationChunk) -> None:
        now = time.perf_counter()
        # A server does not say how many tokens a piece is; mostly it is one.
        self._tokens += len(chunk.token_ids) or bool(chunk.text or chunk.thoughts)
        if self._first_s is None and self._tokens:
            self._first_s = now
        self._thoughts += chunk.thoughts
        if not self._answering and chunk.text.strip():
            self._answering = True
            self._thinking_s = now - self._began_s
        self._markdown.push(visible(chunk.text, several_lines=True))
        if now >= self._next_s:
            self.draw()
            took_s = time.perf_counter() - now
            self._next_s = now + max(DRAW_EVERY_S, took_s / DRAW_SHARE)

    def draw(self, *, last: bool = False) -> None:
        """Bring the screen up to date. An interrupt waits until that is done."""
        self.busy = True
        try:
            self._screen.draw(*self._lines(shutil.get_terminal_size().columns - 1, last))
        finally:
            self.busy = False
        if self.interrupted and not last:
            self.interrupted = False
            raise KeyboardInterrupt

    def finish(self) -> None:
        self.draw(last=True)
        self._screen.close()

    def _lines(self, width: int, last: bool) -> tuple[list[str], list[str]]:
        """What is final, and what may change yet."""
        from qwencli.commands.markdown_stream import dimmed

        done: list[str] = []
        live: list[str] = []
        if self._thoughts and not self._answering and not last:
            thoughts = dimmed(visible(self._thoughts[-4000:].strip(), several_lines=True), width)
            live = [*thoughts[-THOUGHT_ROWS:], ""]
        elif self._thoughts:
            took = _seconds(self._thinking_s or time.perf_counter() - self._began_s)
            done = [*dimmed(f"thought for {took} (/thoughts shows it)", width), ""]
            self._thoughts = ""
        more_done, unfinished = self._markdown.lines(width, finish=last)
        done += more_done
        live += unfinished
        if self._footer and not last:
            gap = [""] if live and live[-1] else []
            live += [*gap, *dimmed(self._progress(), width)[:1]]
        return done, live

    def _progress(self) -> str:
        if self._first_s is None:
            return "reading ... (Ctrl-C stops)"
        took_s = time.perf_counter() - self._first_s
        pieces = [counted(self._tokens, "token")]
        if self._tokens > 1 and took_s:
            pieces.append(f"{(self._tokens - 1) / took_s:.1f} tok/s")
        return " · ".join([*pieces, f"TTFT {_seconds(self._first_s - self._began_s)}"])


@contextmanager
def _interrupts_wait(drawing: _Drawing) -> Iterator[None]:
    """Ctrl-C comes between two drawings, and never leaves half of one on the screen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not drawing.busy:
            raise KeyboardInterrupt
        drawing.interrupted = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
