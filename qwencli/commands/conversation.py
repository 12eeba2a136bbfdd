"""The state and the slash commands of a chat."""

from __future__ import annotations

import functools
import itertools
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qwencli.commands.reports import caption_record, shortfall, stats_line
from qwencli.commands.requests import (
    OPENING_ERRORS,
    open_picture,
    open_video,
    system_messages,
)
from qwencli.config import SamplingOptions
from qwencli.errors import (
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    QwenCliError,
    UsageError,
)
from qwencli.messages import (
    GenerationRequest,
    Message,
    TextPart,
    VisualPart,
    text_message,
    user_message,
)
from qwencli.output import Sink

if TYPE_CHECKING:
    from qwencli.engine.base import Engine
    from qwencli.results import GenerationResult

PROMPT = "> "
# Of a line that is piped in: far beyond any context, and bounded.
MOST_CHARS = 4 << 20
HELP = """\
/image PATH...   attach pictures to the next message
/video PATH...   attach videos, animations or folders of frames
/system TEXT     set the system prompt and start over
/clear           start over; attached pictures are dropped
/help            this list
/exit            leave (also Ctrl-D)
Ctrl-C stops an answer and keeps the conversation; at the prompt it leaves."""


class Conversation:
    """Messages so far, pictures waiting for the next one, and the engine that answers."""

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingOptions,
        sink: Sink,
        *,
        system: str | None,
        json: bool,
        stats: bool,
        model: str,
        frames: int | None = None,
    ) -> None:
        self._engine, self._sampling, self._sink = engine, sampling, sink
        self._system, self._json, self._stats, self._model = system, json, stats, model
        self._frames = frames
        self._history: list[Message] = []
        self._attached: list[VisualPart] = []
        self._commands: dict[str, Callable[[str], bool]] = {
            "/image": functools.partial(self._attach_files, "/image", self._open_picture),
            "/video": functools.partial(self._attach_files, "/video", self._open_video),
            "/system": self._set_system,
            "/clear": self._clear,
            "/help": self._help,
            "/exit": self._exit,
            "/quit": self._exit,
        }

    def attach(self, *pictures: VisualPart) -> None:
        self._attached.extend(pictures)

    def converse(self, stdin: TextIO) -> int:
        """Read lines until the end of input or /exit; errors are shown and the talk goes on.

        Returns how many lines failed.
        """
        failed = 0
        at_terminal = stdin.isatty()
        if at_terminal:
            _enable_line_editing()
            self._sink.notice("type a message; /help lists the commands")
        while (line := self._read(stdin, at_terminal)) is not None:
            if not line.strip():
                continue
            try:
                if not self._handle(line.strip()):
                    break
            except KeyboardInterrupt:
                self._sink.notice("", "stopped; the conversation goes on")
            except (InputError, MissingDependencyError, OutOfMemoryError, UsageError) as error:
                failed += 1
                self._sink.error(error)
        return failed

    def ask(self, text: str) -> GenerationResult:
        """Send `text` with the attached pictures, write the answer, and remember both.

        A request that fails or is stopped leaves history and pictures as they were.
        """
        question = user_message(text, tuple(self._attached))
        messages = (*system_messages(self._system), *self._history, question)
        result = self._stream(GenerationRequest(messages, self._sampling))
        self._history += [question, text_message("assistant", result.text)]
        pictures = [picture.name for picture in self._attached]
        self._attached.clear()
        if self._json:
            self._sink.json_line(caption_record(result, pictures, self._model))
        missing = shortfall(result)
        if missing is not None:
            self._sink.notice(f"note: {missing}")
        if self._stats:
            self._sink.report(stats_line(result))
        return result

    def _stream(self, request: GenerationRequest) -> GenerationResult:
        if self._json:
            return self._engine.generate(request)
        chunks = self._engine.stream(request)
        first = []
        with self._sink.thoughts() as think:
            for chunk in chunks:
                think(chunk.thoughts)
                if chunk.text or chunk.result is not None:
                    first = [chunk]
                    break
        with self._sink.stream() as write:
            for chunk in itertools.chain(first, chunks):
                write(chunk.text)
                if chunk.result is not None:
                    result = chunk.result
        return result

    def _read(self, stdin: TextIO, at_terminal: bool) -> str | None:
        if not at_terminal:
            return _piped_line(stdin)
        try:
            if sys.stdout.isatty():
                # Line editing redraws the line, and erases a prompt that it did not write itself.
                return input(PROMPT)
            # input() would write its prompt to stdout, which carries answers alone.
            self._sink.prompt(PROMPT)
            return input()
        except (EOFError, KeyboardInterrupt):
            self._sink.notice("")
            return None

    def _handle(self, line: str) -> bool:
        """Run one line; False means leave."""
        if not line.startswith("/"):
            self.ask(line)
            return True
        name, _, rest = line.partition(" ")
        command = self._commands.get(name)
        if command is None:
            raise UsageError(f"{name} is not a command", "/help lists them")
        return command(rest.strip())

    def _shown(self) -> list[VisualPart]:
        """Every picture and video of the conversation; all are held."""
        parts = [part for message in self._history for part in message.parts]
        return [part for part in parts if not isinstance(part, TextPart)] + self._attached

    def _open_picture(self, path: Path) -> VisualPart:
        return open_picture(path, self._shown())

    def _open_video(self, path: Path) -> VisualPart:
        return open_video(path, self._frames, self._shown())

    def _attach_files(self, name: str, opened: Callable[[Path], VisualPart], rest: str) -> bool:
        paths = _split_paths(rest)
        if not paths:
            raise UsageError(f"{name} needs a path", f"{name} PATH")
        failures: list[QwenCliError] = []
        for path in paths:
            try:
                self.attach(opened(path))
            except OPENING_ERRORS as error:
                failures.append(error)
        for failure in failures[:-1]:
            self._sink.error(failure)
        if self._attached:
            names = ", ".join(picture.name for picture in self._attached)
            self._sink.notice(f"attached: {names}")
        if failures:
            raise failures[-1]
        return True

    def _set_system(self, rest: str) -> bool:
        self._system = rest or None
        return self._clear("")

    def _clear(self, rest: str) -> bool:
        self._history.clear()
        self._attached.clear()
        self._sink.notice("cleared")
        return True

    def _help(self, rest: str) -> bool:
        self._sink.notice(*HELP.splitlines())
        return True

    def _exit(self, rest: str) -> bool:
        return False


def _piped_line(stdin: TextIO) -> str | None:
    """Raises InputError: stdin cannot be read, or has no end of a line."""
    try:
        line = stdin.readline(MOST_CHARS + 1)
    except OSError as error:
        raise InputError(f"stdin cannot be read: {error.strerror}", "check the pipe") from error
    if len(line) > MOST_CHARS:
        raise InputError(f"a line of stdin is longer than {MOST_CHARS} characters", "shorten it")
    return line.removeprefix("\ufeff") or None


def _split_paths(text: str) -> list[Path]:
    """Paths separated by spaces; a path with spaces may be quoted, or stand alone unquoted."""
    if _is_file(whole := _at_home(text)):
        return [whole]
    try:
        # posix=False keeps Windows' backslashes; the quotes it leaves are taken off here.
        words = [word.strip("'\"") for word in shlex.split(text, posix=False)]
        return [_at_home(word) for word in words]
    except ValueError as error:
        raise UsageError(str(error).lower(), "close the quotation mark") from error


def _at_home(path: str) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - the other raises for "~nobody"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system allows, for one
        return False


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 - importing it gives input() editing and history
    except ImportError:
        return
