"""A chat as its user has it: lines come in, slash commands among them, and errors are told."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO, runtime_checkable

from qwencli.answer_report import stats_line
from qwencli.commands.chat_settings import (
    describe_settings,
    parse_budget,
    parse_setting,
    parse_switch,
    with_setting,
)
from qwencli.commands.conversation import PICTURES, Conversation, text_of, visuals_of
from qwencli.commands.open_media import OPENING_ERRORS
from qwencli.commands.saved_chat import (
    write_chat,
)
from qwencli.commands.typed_paths import dropped_files, mentioned_files, split_paths
from qwencli.engine.abilities import Abilities
from qwencli.errors import (
    EndpointError,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    OutputError,
    QwenCliError,
    RequestError,
    UsageError,
)
from qwencli.messages import (
    VisualPart,
    user_message,
)
from qwencli.output import counted, visible

# Of a line that is piped in: far beyond any context, and bounded.
MOST_CHARS = 4 << 20
# What begins with a slash by mistake. Code does so too ("/* ...", "// ..."), and pasted texts.
_COMMAND_OR_PATH = re.compile(r"/[\w.~-][^\n]*")
# What a line may raise, while the conversation goes on; a server may be there again later.
_GOES_ON = (
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    OutputError,
    UsageError,
    EndpointError,
    RequestError,
)


class Command(NamedTuple):
    """A slash command, as /help and completion show it."""

    argument: str
    text: str


COMMANDS = {
    "/image": Command("PATH...", "attach pictures to the next message; so does dropping a file"),
    "/video": Command("PATH...", "attach videos, animations or folders of frames"),
    "/system": Command("[TEXT]", "set the system prompt and start over, or show it"),
    "/set": Command("[NAME=VALUE]", "change sampling from now on, or show it"),
    "/retry": Command("", "answer the last message again"),
    "/edit": Command("[TEXT]", "change the last message and have it answered again"),
    "/undo": Command("", "forget the last message and its answer"),
    "/clear": Command("", "start over; attached pictures are dropped"),
    "/save": Command("[FILE]", "write the conversation to a file"),
    "/load": Command("FILE", "go on with a conversation of /save"),
    "/thoughts": Command("", "what the model thought before its last answer"),
    "/stats": Command("", "timings of the last answer"),
    "/help": Command("", "this list"),
    "/exit": Command("", "leave (also Ctrl-D)"),
}
KEYS = """\
@PATH in a message shows that file. Text that is pasted is one message, however
many lines it has.
Ctrl-C stops an answer and keeps what came; at the prompt it drops what is
typed, and leaves when pressed again."""


@runtime_checkable
class Lines(Protocol):
    """Where messages and commands come from."""

    def next_line(self, draft: str = "") -> str | None:
        """The next one; None at the end. `draft` is there to be changed."""

    @property
    def can_edit(self) -> bool:
        """Whether a draft is shown to somebody."""

    @property
    def has_keyboard(self) -> bool:
        """Whether a first Ctrl-C only drops what is typed."""


class PipedLines:
    """Lines of a stream."""

    can_edit = has_keyboard = False

    def __init__(self, stdin: TextIO) -> None:
        self._stdin = stdin

    def next_line(self, draft: str = "") -> str | None:
        """Raises InputError: stdin cannot be read, or has no end of a line."""
        try:
            line = self._stdin.readline(MOST_CHARS + 1)
        except OSError as error:
            raise InputError(
                f"stdin cannot be read: {error.strerror or error}", "check what is piped in"
            ) from error
        if len(line) > MOST_CHARS:
            raise InputError(
                f"a line of stdin is longer than {MOST_CHARS} characters", "shorten it"
            )
        return line.removeprefix("\ufeff") or None


class ChatSession(Conversation):
    """A conversation held by lines: each is a message, files to attach, or a slash command."""

    _lines: Lines | None = None
    _draft = ""

    @functools.cached_property
    def _commands(self) -> dict[str, Callable[[str], bool | None]]:
        return {
            "/image": lambda rest: self._attach_files("/image", self._open_picture, rest),
            "/video": lambda rest: self._attach_files("/video", self._open_video, rest),
            "/system": self._set_system,
            "/set": self._set,
            "/retry": self._retry,
            "/edit": self._edit,
            "/undo": self._undo,
            "/clear": self._clear,
            "/save": self._save,
            "/load": self._load,
            "/thoughts": self._show_thoughts,
            "/stats": self._show_stats,
            "/help": self._help,
            "/exit": self._exit,
            "/quit": self._exit,
        }

    def converse(self, lines: Lines | TextIO) -> int:
        """Read lines until the end of input or /exit; errors are shown and the talk goes on.

        Returns how many lines failed.
        """
        failed = 0
        leaves = False  # whether the next Ctrl-C does
        self._lines = lines if isinstance(lines, Lines) else PipedLines(lines)
        while True:
            draft, self._draft = self._draft, ""
            try:
                if leaves:
                    self._output.notice("Ctrl-C again leaves, and so does Ctrl-D")
                line = self._lines.next_line(draft)
            except KeyboardInterrupt:
                if not self._lines.has_keyboard:
                    raise
                if leaves:
                    return failed
                leaves = True
                continue
            leaves = False
            if line is None:
                return failed
            if not line.strip():
                continue
            try:
                if not self._handle(line.strip()):
                    return failed
            except KeyboardInterrupt:
                self._say_stopped()
            except _GOES_ON as error:
                failed += 1
                self._output.error(error)

    def say(self, text: str) -> None:
        """Send `text`; files that it mentions are shown with it, and alone they are attached."""
        files, text = mentioned_files(text)
        if files:
            # One that still waits, as its answer was stopped, is not shown twice.
            names = set(map(str, files))
            stopped = visuals_of(self._unanswered) if self._unanswered else ()
            again = {id(part) for part in stopped if part.name in names}
            self._attached = [part for part in self._attached if id(part) not in again]
            self._attach(files, self._open_visual)
        if text:
            self.ask(text)

    def _handle(self, line: str) -> bool:
        """Run one line; False means leave."""
        name, *rest = line.split(maxsplit=1)
        if command := self._commands.get(name):
            return command(*rest or [""]) is not False
        files, text = dropped_files(line)
        if files and (line.startswith("/") or not text):
            self._attach(files, self._open_visual)
            if text:
                self.say(text)
        elif re.fullmatch(_COMMAND_OR_PATH, line):
            raise UsageError(f"{visible(name)} is not a command, nor a file", "/help lists all")
        else:
            self.say(line)
        return True

    def _say_stopped(self) -> None:
        if self._unanswered is None and self._turns and self._turns[-1].stopped:
            kept = "what came is kept: /retry asks again, /undo forgets it"
        else:
            kept = "the conversation goes on: /retry asks again"
        self._output.notice("", f"stopped; {kept}")

    def _attach_files(self, name: str, opened: Callable[[Path], VisualPart], rest: str) -> None:
        paths = split_paths(rest)
        if not paths:
            raise UsageError(f"{name} needs a path", f"{name} PATH")
        self._attach(paths, opened)

    def _attach(self, paths: Sequence[Path], opened: Callable[[Path], VisualPart]) -> None:
        self._check(PICTURES)
        failures: list[QwenCliError] = []
        for path in paths:
            try:
                self.attach(opened(path))
            except OPENING_ERRORS as error:
                failures.append(error)
        for failure in failures[:-1]:
            self._output.error(failure)
        if self._attached:
            names = ", ".join(picture.name for picture in self._attached)
            self._output.notice(f"attached: {names}")
        if failures:
            raise failures[-1]

    def _set_system(self, rest: str) -> None:
        if rest:
            self._system = None if rest.lower() == "default" else rest
        shown = "none" if self._system is None else visible(self._system)
        lines = [f"system prompt: {shown}"]
        if rest:
            lines.append(f"the conversation starts over{self._start_over()}")
        else:
            lines.append("/system TEXT sets one, /system default none; both start over")
        self._output.notice(*lines)

    def _clear(self, rest: str) -> None:
        kept = "" if self._system is None else "; the system prompt stays"
        self._output.notice(f"cleared{self._start_over()}{kept}")

    def _start_over(self) -> str:
        """Forget what was said and what is attached; tells in brackets what that was."""
        counts = ((self._turns, "turn"), (self._attached, "attached picture"))
        dropped = [counted(len(them), noun) for them, noun in counts if them]
        self._turns.clear()
        self._attached.clear()
        self._unanswered = None
        return f" (forgotten: {', '.join(dropped)})" if dropped else ""

    def _set(self, rest: str) -> None:
        name, value = parse_setting(rest) if rest else ("", "")
        if name == "thinking":
            thinking = parse_switch(name, value)
            self._check(Abilities(thoughts=thinking))
            self._thinking, self._unasked = thinking, 0
            if self._thinking_budget == 0:
                self._thinking_budget = None
        elif name == "thinking_budget":
            budget = parse_budget(value)
            self._check(Abilities(thoughts=bool(budget)))
            self._thinking_budget = budget
            # As on the command line: who bounds thoughts wants some, and 0 means none.
            if self._thinking_budget is not None:
                self._thinking, self._unasked = self._thinking_budget > 0, 0
        elif name:
            self._sampling = with_setting(self._sampling, name, value)
        switch = f"thinking={'on' if self._thinking else 'off'}"
        most = "default" if self._thinking_budget is None else self._thinking_budget
        shown = [*describe_settings(self._sampling), switch, f"thinking_budget={most}"]
        self._output.notice(", ".join(shown))

    def _retry(self, rest: str) -> None:
        before, question = (self._turns.copy(), self._unanswered), self._last_question()
        fixed = self._sampling.do_sample is False or (self._sampling.seed or -1) >= 0
        if fixed and before[1] is None and not before[0][-1].stopped:
            self._output.notice("note: the same seed or greedy gives the same answer (see /set)")
        self._again(question, *before)

    def _edit(self, rest: str) -> None:
        if not rest and not (self._lines and self._lines.can_edit):
            raise UsageError("/edit needs the new text", "/edit TEXT")
        before, question = (self._turns.copy(), self._unanswered), self._last_question()
        if rest:
            self._again(user_message(rest, visuals_of(question)), *before)
            return
        self._draft, self._unanswered = text_of(question), question
        waiting = [p for p in visuals_of(question) if not any(p is a for a in self._attached)]
        self._attached = [*waiting, *self._attached]

    def _undo(self, rest: str) -> None:
        if not self._turns:
            raise UsageError("nothing was asked yet", "type a message")
        self._unanswered = None
        forgotten = self._turns.pop()
        self._keep_turns()
        self._output.notice(f"forgotten: {text_of(forgotten.question)[:60]}")

    def _save(self, rest: str) -> None:
        if not rest and self._keep is None:
            raise UsageError("/save needs a file", "/save FILE")
        paths = split_paths(rest) if rest else [self._keep]
        if len(paths) != 1:
            raise UsageError("/save needs one file", f"put its name in quotes: /save {rest!r}")
        path = paths[0]
        assert path is not None
        write_chat(path, self._saved())
        self._output.notice(f"saved: {path}")

    def _load(self, rest: str) -> None:
        paths = split_paths(rest)
        if len(paths) != 1:
            raise UsageError("/load needs one file", "/load FILE")
        self._go_on_with(paths[0])

    def _show_thoughts(self, rest: str) -> None:
        thoughts = self._turns[-1].thoughts if self._turns else None
        self._output.notice(*(thoughts or "the last answer came without thoughts").splitlines())

    def _show_stats(self, rest: str) -> None:
        if self._last is None:
            raise UsageError("nothing was answered yet", "type a message")
        self._output.report(stats_line(self._last))

    def _help(self, rest: str) -> None:
        for name, command in COMMANDS.items():
            self._output.notice(f"{f'{name} {command.argument}':19}{command.text}")
        self._output.notice(*KEYS.splitlines())

    def _exit(self, rest: str) -> bool:
        return False
