"""What was said in a chat, what waits to be shown, and the slash commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TextIO, runtime_checkable

from qwencli.answer_report import caption_record, shortfall, stats_line, unshown
from qwencli.capabilities import check_thinking
from qwencli.commands.answer_display import Display, PlainDisplay, SilentDisplay
from qwencli.commands.chat_settings import (
    budget_said,
    over_saved,
    setting_said,
    settings_shown,
    switched,
    with_setting,
)
from qwencli.commands.requests import (
    OPENING_ERRORS,
    open_picture,
    open_video,
    open_visual,
    system_messages,
)
from qwencli.commands.saved_chat import (
    SavedChat,
    SavedFile,
    SavedTurn,
    forget_oldest,
    read_chat,
    write_chat,
)
from qwencli.commands.typed_paths import dropped_files, mentioned_files, split_paths
from qwencli.config import SamplingOptions
from qwencli.errors import (
    EndpointError,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    OutputError,
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
from qwencli.output import Output, counted, visible

if TYPE_CHECKING:
    from qwencli.engine.protocol import Engine
    from qwencli.results import GenerationChunk, GenerationResult

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
)


class Command(NamedTuple):
    """A slash command, as /help and completion show it."""

    argument: str
    text: str


COMMANDS = {
    "/image": Command("PATH...", "attach pictures to the next message; so does dropping a file"),
    "/video": Command("PATH...", "attach videos, animations or folders of frames"),
    "/system": Command("TEXT", "set the system prompt and start over"),
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


@dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Args:
        stopped: Ctrl-C ended the answer.
    """

    question: Message
    answer: str
    thoughts: str | None = None
    stopped: bool = False


class PipedLines:
    """Lines of a stream."""

    can_edit = False

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


class Conversation:
    """Messages so far, pictures waiting for the next one, and the engine that answers.

    Args:
        thinking: let a model that can think before it answers do so; thinking_budget: for so many
            tokens, see `GenerationRequest`.
        keep: the file that each turn is saved in; None = none.
    """

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
        thinking: bool = False,
        thinking_budget: int | None = None,
        display: Display | None = None,
        keep: Path | None = None,
    ) -> None:
        self._engine, self._sampling, self._sink = engine, sampling, sink
        self._system, self._json, self._stats, self._model = system, json, stats, model
        self._frames, self._thinking, self._keep = frames, thinking, keep
        self._thinking_budget = thinking_budget
        # The budget while there is to be no thinking: 0 ends the thoughts of a model that has no
        # switch for them, where that was said.
        self._unasked = 0 if thinking_budget == 0 else None
        self._noted: set[str] = set()
        self._display = display or (SilentDisplay(sink) if json else PlainDisplay(sink))
        self._turns: list[Turn] = []
        self._attached: list[VisualPart] = []
        # What was asked last and has no answer; it may be asked again.
        self._unanswered: Message | None = None
        self._draft = ""
        self._lines: Lines | None = None
        self._last: GenerationResult | None = None
        self._commands: dict[str, Callable[[str], bool | None]] = {
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

    @property
    def footer(self) -> tuple[str, ...]:
        """How things are, for a line below the prompt; what matters most comes first."""
        waiting = counted(len(self._attached), "picture")
        attached = (f"{waiting} attached",) if self._attached else ()
        return (*attached, *self._display.figures, self._model)

    @property
    def kept(self) -> Path | None:
        """The file that has this conversation, once it has a turn."""
        return self._keep if self._turns else None

    def attach(self, *pictures: VisualPart) -> None:
        """Show pictures with the next message, and say of which files a part alone is shown."""
        self._attached.extend(pictures)
        self._display.attached(pictures)
        for picture in pictures:
            if isinstance(picture, ImagePart) and picture.first_of is not None:
                self._sink.notice(*unshown({picture.first_of: [picture.name]}))

    def resume(self, path: Path) -> None:
        """Go on with a saved conversation, and keep it in that file from now on.

        What this run was told about system prompt and sampling stands over what was saved.

        Raises:
            InputError: it cannot be read.
        """
        sampling, system = self._sampling, self._system
        self._go_on_with(path)
        self._sampling = over_saved(self._sampling, sampling)
        self._system = system or self._system
        self._keep = path

    def converse(self, lines: Lines | TextIO) -> int:
        """Read lines until the end of input or /exit; errors are shown and the talk goes on.

        Returns how many lines failed.
        """
        failed = 0
        self._lines = lines if isinstance(lines, Lines) else PipedLines(lines)
        while True:
            draft, self._draft = self._draft, ""
            try:
                line = self._lines.next_line(draft)
            except KeyboardInterrupt:
                if not self._lines.can_edit:
                    raise
                continue  # meant for an answer that has just ended
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
                self._sink.error(error)

    def say(self, text: str) -> None:
        """Send `text`; files that it mentions are shown with it, and alone they are attached."""
        files, text = mentioned_files(text)
        if files:
            self._attach(files, self._open_visual)
        if text:
            self.ask(text)

    def ask(self, text: str) -> GenerationResult:
        """Send `text` with the attached pictures, write the answer, and remember both.

        A request that fails leaves history and pictures as they were; of one that is stopped what
        came is remembered.
        """
        return self._answer(user_message(text, tuple(self._attached)))

    def _answer(self, question: Message) -> GenerationResult:
        history = (part for turn in self._turns for part in _messages(turn))
        messages = (*system_messages(self._system), *history, question)
        self._unanswered = question
        thoughts: list[str] = []
        answer: list[str] = []
        request = GenerationRequest(
            messages,
            self._sampling,
            thinking=self._thinking,
            thinking_budget=self._thinking_budget if self._thinking else self._unasked,
        )
        try:
            with self._display.answer() as show:
                for chunk in _split_thoughts(self._engine.stream(request)):
                    thoughts.append(chunk.thoughts)
                    answer.append(chunk.text)
                    show(chunk)
        except KeyboardInterrupt:
            if said := "".join(answer).strip():
                self._remember(Turn(question, said, "".join(thoughts).strip() or None, True))
            raise
        result = chunk.result
        assert result is not None, "a stream ends with the chunk that carries its result"
        self._remember(Turn(question, result.text, result.thoughts))
        self._last = result
        self._report(result, [part.name for part in _visuals(question)])
        return result

    def _remember(self, turn: Turn) -> None:
        self._turns.append(turn)
        self._unanswered = None
        shown = _visuals(turn.question)
        self._attached = [part for part in self._attached if not any(part is s for s in shown)]
        self._keep_turns()

    def _report(self, result: GenerationResult, pictures: list[str]) -> None:
        self._display.answered(result)
        if self._json:
            self._sink.json_line(caption_record(result, pictures, self._model))
        for note in result.notes:
            # What holds for one answer often holds for the next.
            if note not in self._noted:
                self._sink.notice(f"note: {note}")
                self._noted.add(note)
        missing = shortfall(result)
        if missing is not None:
            self._sink.notice(f"note: {missing}")
        if self._stats:
            self._sink.report(stats_line(result))

    def _say_stopped(self) -> None:
        if self._unanswered is None and self._turns and self._turns[-1].stopped:
            kept = "what came is kept: /retry asks again, /undo forgets it"
        else:
            kept = "the conversation goes on: /retry asks again"
        self._sink.notice("", f"stopped; {kept}")

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
            raise UsageError(f"{visible(name)} is not a command, nor a file", "/help lists them")
        else:
            self.say(line)
        return True

    def _shown(self) -> list[VisualPart]:
        """Every picture and video of the conversation; all are held."""
        return [part for turn in self._turns for part in _visuals(turn.question)] + self._attached

    def _open_picture(self, path: Path) -> VisualPart:
        return open_picture(path, self._shown())

    def _open_visual(self, path: Path) -> VisualPart:
        return open_visual(path, self._frames, self._shown())

    def _open_video(self, path: Path) -> VisualPart:
        return open_video(path, self._frames, self._shown())

    def _attach_files(self, name: str, opened: Callable[[Path], VisualPart], rest: str) -> None:
        paths = split_paths(rest)
        if not paths:
            raise UsageError(f"{name} needs a path", f"{name} PATH")
        self._attach(paths, opened)

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

    def _set_system(self, rest: str) -> None:
        self._system = rest or None
        self._clear("")

    def _clear(self, rest: str) -> None:
        self._turns.clear()
        self._attached.clear()
        self._unanswered = None
        self._sink.notice("cleared")

    def _set(self, rest: str) -> None:
        name, value = setting_said(rest) if rest else ("", "")
        if name == "thinking":
            thinking = switched(name, value)
            self._check_thinking(thinking)
            self._thinking, self._unasked = thinking, 0
            if self._thinking_budget == 0:
                self._thinking_budget = None
        elif name == "thinking_budget":
            budget = budget_said(value)
            self._check_thinking(bool(budget))
            self._thinking_budget = budget
            # As on the command line: who bounds thoughts wants some, and 0 means none.
            if self._thinking_budget is not None:
                self._thinking, self._unasked = self._thinking_budget > 0, 0
        elif name:
            self._sampling = with_setting(self._sampling, name, value)
        switch = f"thinking={'on' if self._thinking else 'off'}"
        most = "default" if self._thinking_budget is None else self._thinking_budget
        shown = [*settings_shown(self._sampling), switch, f"thinking_budget={most}"]
        self._sink.notice(", ".join(shown))

    def _check_thinking(self, wanted: bool) -> None:
        """Raises UsageError: the model has no thoughts."""
        check_thinking(self._model, can_think=self._engine.can_think, wanted=wanted)

    def _last_question(self) -> Message:
        """What was asked last, which is then neither asked nor answered."""
        question, self._unanswered = self._unanswered, None
        if question is None:
            if not self._turns:
                raise UsageError("nothing was asked yet", "type a message")
            question = self._turns.pop().question
        return question

    def _retry(self, rest: str) -> None:
        before, question = (self._turns.copy(), self._unanswered), self._last_question()
        fixed = self._sampling.do_sample is False or (self._sampling.seed or -1) >= 0
        if fixed and before[1] is None and not before[0][-1].stopped:
            self._sink.notice("note: the same seed or greedy gives the same answer (see /set)")
        self._again(question, *before)

    def _edit(self, rest: str) -> None:
        if not rest and not (self._lines and self._lines.can_edit):
            raise UsageError("/edit needs the new text", "/edit TEXT")
        before, question = (self._turns.copy(), self._unanswered), self._last_question()
        if rest:
            self._again(user_message(rest, _visuals(question)), *before)
            return
        self._draft, self._unanswered = _text(question), question
        waiting = [p for p in _visuals(question) if not any(p is a for a in self._attached)]
        self._attached = [*waiting, *self._attached]

    def _again(self, question: Message, turns: list[Turn], unanswered: Message | None) -> None:
        """Have a question answered in the place of the last; where nothing came all is as before.

        Args:
            turns, unanswered: as they were before.
        """
        try:
            self._answer(question)
        except BaseException:
            if self._unanswered is not None:
                self._turns, self._unanswered = turns, unanswered
            raise

    def _undo(self, rest: str) -> None:
        if not self._turns:
            raise UsageError("nothing was asked yet", "type a message")
        self._unanswered = None
        forgotten = self._turns.pop()
        self._keep_turns()
        self._sink.notice(f"forgotten: {_text(forgotten.question)[:60]}")

    def _save(self, rest: str) -> None:
        if not rest and self._keep is None:
            raise UsageError("/save needs a file", "/save FILE")
        [path, *_] = split_paths(rest) if rest else [self._keep]
        assert path is not None
        write_chat(path, self._saved())
        self._sink.notice(f"saved: {path}")

    def _load(self, rest: str) -> None:
        paths = split_paths(rest)
        if len(paths) != 1:
            raise UsageError("/load needs one file", "/load FILE")
        self._go_on_with(paths[0])

    def _go_on_with(self, path: Path) -> None:
        chat = read_chat(path)
        self._turns, self._attached, self._unanswered = [], [], None
        for turn in chat.turns:
            question = user_message(turn.text, tuple(self._reopened(turn.files)))
            self._turns.append(Turn(question, turn.answer, turn.thoughts, turn.stopped))
        self._system = chat.system
        self._sampling = chat.sampling
        other = "" if chat.model == self._model else f" of {chat.model}"
        self._sink.notice(f"{counted(len(self._turns), 'turn')}{other} from {path}")
        if self._turns:
            self._sink.notice(f"last asked: {_text(self._turns[-1].question)[:200]}")

    def _reopened(self, files: Iterable[SavedFile]) -> Iterator[VisualPart]:
        for file in files:
            opened = self._open_picture if file.kind == "image" else self._open_video
            try:
                yield opened(Path(file.path))
            except OPENING_ERRORS as error:
                # What was said about it is still there.
                self._sink.error(error)

    def _saved(self) -> SavedChat:
        return SavedChat(
            self._model,
            self._system,
            self._sampling,
            tuple(
                SavedTurn(
                    _text(turn.question),
                    turn.answer,
                    tuple(map(_saved_file, _visuals(turn.question))),
                    turn.thoughts,
                    turn.stopped,
                )
                for turn in self._turns
            ),
        )

    def _keep_turns(self) -> None:
        """Where that is not possible it is said once, and the talk goes on."""
        if self._keep is None:
            return
        try:
            write_chat(self._keep, self._saved())
            forget_oldest(self._keep.parent)
        except (OSError, OutputError) as error:
            self._keep = None
            self._sink.warn(f"this conversation is not kept: {error}")

    def _show_thoughts(self, rest: str) -> None:
        thoughts = self._turns[-1].thoughts if self._turns else None
        self._sink.notice(*(thoughts or "the last answer came without thoughts").splitlines())

    def _show_stats(self, rest: str) -> None:
        if self._last is None:
            raise UsageError("nothing was answered yet", "type a message")
        self._sink.report(stats_line(self._last))

    def _help(self, rest: str) -> None:
        for name, command in COMMANDS.items():
            self._sink.notice(f"{f'{name} {command.argument}':19}{command.text}")
        self._sink.notice(*KEYS.splitlines())

    def _exit(self, rest: str) -> bool:
        return False


def _split_thoughts(chunks: Iterable[GenerationChunk]) -> Iterator[GenerationChunk]:
    """Chunks whose thoughts stand apart, where an engine has left them in the text."""
    from qwencli.engine.frontend.tokenizer import ThoughtSplitter

    splitter = ThoughtSplitter(inside=False)
    whole = ThoughtSplitter(inside=False)
    for chunk in chunks:
        thoughts, text = splitter.push(chunk.text)
        result = chunk.result
        if result is not None:
            more, rest = splitter.finish()
            thoughts, text = thoughts + more, text + rest
            said = [*whole.push(result.text), *whole.finish()]
            if apart := (said[0] + said[2]).strip():
                joined = "\n".join(filter(None, (result.thoughts, apart)))
                result = replace(result, text=said[1] + said[3], thoughts=joined)
        yield replace(chunk, text=text, thoughts=chunk.thoughts + thoughts, result=result)


def _messages(turn: Turn) -> tuple[Message, Message]:
    return turn.question, text_message("assistant", turn.answer)


def _visuals(message: Message) -> tuple[VisualPart, ...]:
    return tuple(part for part in message.parts if not isinstance(part, TextPart))


def _text(message: Message) -> str:
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _saved_file(part: VisualPart) -> SavedFile:
    path = str(Path(part.name).absolute())
    return SavedFile("image" if isinstance(part, ImagePart) else "video", path)
