"""The state and the slash commands of a chat."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qwencli.commands.reports import caption_record, shortfall, stats_line, unshown
from qwencli.commands.requests import (
    OPENING_ERRORS,
    open_picture,
    open_video,
    open_visual,
    system_messages,
)
from qwencli.config import SamplingOptions
from qwencli.dataset.sources import local_path
from qwencli.errors import (
    EndpointError,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    QwenCliError,
    UsageError,
)
from qwencli.messages import (
    GenerationRequest,
    ImagePart,
    Message,
    TextPart,
    VisualPart,
    text_message,
    user_message,
)
from qwencli.output import Output, visible

if TYPE_CHECKING:
    from qwencli.engine.protocol import Engine
    from qwencli.results import GenerationResult

PROMPT = "> "
# Of a line that is piped in: far beyond any context, and bounded.
MOST_CHARS = 4 << 20
HELP = """\
/image PATH...   attach pictures to the next message; so does dropping a file
/video PATH...   attach videos, animations or folders of frames
/system TEXT     set the system prompt and start over
/clear           start over; attached pictures are dropped
/help            this list
/exit            leave (also Ctrl-D)
Text that is pasted is one message, however many lines it has.
Ctrl-C stops an answer and keeps the conversation; at the prompt it drops
what is typed, and leaves when pressed again."""
# What a line may raise, while the conversation goes on; a server may be there again later.
_GOES_ON = (InputError, MissingDependencyError, OutOfMemoryError, UsageError, EndpointError)
PASTE_START, PASTE_END = "\x1b[200~", "\x1b[201~"
# What begins with a slash by mistake. Code does so too ("/* ...", "// ..."), and pasted texts.
_COMMAND_OR_PATH = re.compile(r"/[\w.~-][^\n]*")
# Pieces in quotes, escaped characters, and others, as a shell puts them together. Possessive: a
# text of many backslashes would be tried in every way to read it.
_SHELL_WORD = re.compile(r"((?:'[^']*'|\"[^\"]*\"|\\.|[^\s\\'\"]|\\)++)(?:\s+|$)")
# Lines of a paste follow one another at once; a person's do not.
PASTE_GAP_S = 0.03


class Conversation:
    """Messages so far, pictures waiting for the next one, and the engine that answers."""

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingOptions,
        sink: Output,
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
        self._interrupted = False
        self._unread: list[str] = []
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
        """Show pictures with the next message, and say of which files a part alone is shown."""
        self._attached.extend(pictures)
        for picture in pictures:
            if isinstance(picture, ImagePart) and picture.first_of is not None:
                self._sink.notice(*unshown({picture.first_of: [picture.name]}))

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
            except _GOES_ON as error:
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
        for note in result.notes:
            self._sink.notice(f"note: {note}")
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
        if self._unread:
            return self._unread.pop(0)
        try:
            text = self._typed(stdin)
        except EOFError:
            self._sink.notice("")
            return None
        except KeyboardInterrupt:
            if self._interrupted and not _half_typed():
                self._sink.notice("")
                return None
            self._interrupted = True
            self._sink.notice("", "Ctrl-C again leaves, and so does Ctrl-D")
            return ""
        self._interrupted = False
        return text

    def _typed(self, stdin: TextIO) -> str:
        """What is typed up to Enter, or pasted: all of its lines."""
        typed_ahead = _more_waits(stdin, 0.0)
        if sys.stdout.isatty():
            # Line editing redraws the line, and erases a prompt that it did not write itself.
            text = input(PROMPT)
        else:
            # input() would write its prompt to stdout, which carries answers alone.
            self._sink.prompt(PROMPT)
            text = input()
        if PASTE_START in text:
            while text.rfind(PASTE_END) < text.rfind(PASTE_START):
                text += "\n" + input()
            return text.replace(PASTE_START, "").replace(PASTE_END, "")
        # Lines typed during an answer are messages of their own.
        while not typed_ahead and _more_waits(stdin, PASTE_GAP_S):
            line = input()
            if line.partition(" ")[0] in self._commands:
                self._unread.append(line)
                break
            text += "\n" + line
        return text

    def _handle(self, line: str) -> bool:
        """Run one line; False means leave."""
        name, *rest = line.split(maxsplit=1)
        if command := self._commands.get(name):
            return command(*rest or [""])
        files, text = _dropped(line)
        if files and (line.startswith("/") or not text):
            self._attach(files, self._open_visual)
            if text:
                self.ask(text)
        elif re.fullmatch(_COMMAND_OR_PATH, line):
            raise UsageError(f"{visible(name)} is not a command, nor a file", "/help lists them")
        else:
            self.ask(line)
        return True

    def _shown(self) -> list[VisualPart]:
        """Every picture and video of the conversation; all are held."""
        parts = [part for message in self._history for part in message.parts]
        return [part for part in parts if not isinstance(part, TextPart)] + self._attached

    def _open_picture(self, path: Path) -> VisualPart:
        return open_picture(path, self._shown())

    def _open_visual(self, path: Path) -> VisualPart:
        return open_visual(path, self._frames, self._shown())

    def _open_video(self, path: Path) -> VisualPart:
        return open_video(path, self._frames, self._shown())

    def _attach_files(self, name: str, opened: Callable[[Path], VisualPart], rest: str) -> bool:
        paths = _split_paths(rest)
        if not paths:
            raise UsageError(f"{name} needs a path", f"{name} PATH")
        self._attach(paths, opened)
        return True

    def _attach(self, paths: Sequence[Path], opened: Callable[[Path], VisualPart]) -> None:
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
        raise InputError(
            f"stdin cannot be read: {error.strerror or error}", "check what is piped in"
        ) from error
    if len(line) > MOST_CHARS:
        raise InputError(f"a line of stdin is longer than {MOST_CHARS} characters", "shorten it")
    return line.removeprefix("\ufeff") or None


def _split_paths(text: str) -> list[Path]:
    """Paths separated by spaces.

    One with spaces may be quoted, have backslashes before them, or stand alone as it is; terminals
    and file managers write a dropped file in one of these ways, or as a `file://` address.
    """
    if text and _exists(whole := _as_path(text)):
        return [whole]
    readings = []
    for posix in (True, False):
        try:
            words = shlex.split(text, posix=posix)
        except ValueError as error:
            failure = UsageError(str(error).lower(), "close the quotation mark")
            continue
        # posix=False keeps Windows' backslashes; the quotes it leaves are taken off here.
        readings.append([_as_path(word if posix else word.strip("'\"")) for word in words])
    if not readings:
        raise failure
    if os.name == "nt" or re.search(r"(?:^|[\s'\"])(?:[A-Za-z]:\\|\\\\)", text):
        readings.reverse()
    return next((paths for paths in readings if all(map(_exists, paths))), readings[0])


def _dropped(line: str) -> tuple[list[Path], str]:
    """The files that a line begins with, as a terminal writes those dropped on it, and the rest.

    Their paths are absolute: a word that happens to be the name of a file here is a word.
    """
    whole = _as_path(line)
    if whole.is_absolute() and whole.name and _exists(whole):
        return [whole], ""
    files: list[Path] = []
    while word := _SHELL_WORD.match(line):
        try:
            paths = _split_paths(word[1])
        except UsageError:
            break
        if not all(path.is_absolute() and path.name and _exists(path) for path in paths):
            break
        files += paths
        line = line[word.end() :]
    return files, line


def _as_path(word: str) -> Path:
    path = Path(os.path.expanduser(word))  # noqa: PTH111 - the other raises for "~nobody"
    try:
        return local_path(path)
    except (InputError, OSError):  # told when it is opened
        return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name longer than the system allows, or with a null
        return False


def _more_waits(stdin: TextIO, seconds: float) -> bool:
    """Whether a line is there to be read, now or within `seconds`."""
    if sys.platform == "win32":
        import msvcrt
        import time

        time.sleep(seconds)
        return msvcrt.kbhit()
    import select

    return bool(select.select([stdin], [], [], seconds)[0])


def _half_typed() -> str:
    """What stood in the line that Ctrl-C dropped, where line editing knows it."""
    editing = sys.modules.get("readline")
    return editing.get_line_buffer() if editing is not None and sys.stdout.isatty() else ""


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 - importing it gives input() editing and history
    except ImportError:
        return
