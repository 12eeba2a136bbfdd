"""What was said in a chat, what waits to be shown, and the engine that answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwencli.answer_report import caption_record, shortfall, stats_line, unshown
from qwencli.commands.answer_display import Display, PlainDisplay, SilentDisplay
from qwencli.commands.chat_settings import (
    override_saved,
)
from qwencli.commands.open_media import OPENING_ERRORS, open_picture, open_video, open_visual
from qwencli.commands.saved_chat import (
    SavedChat,
    SavedFile,
    SavedTurn,
    forget_oldest,
    read_chat,
    write_chat,
)
from qwencli.config import SamplingOptions
from qwencli.engine.abilities import Abilities, check_loaded
from qwencli.errors import OutputError, UnsupportedModeError, UsageError
from qwencli.messages import (
    GenerationRequest,
    ImagePart,
    Message,
    TextPart,
    VisualPart,
    system_messages,
    text_message,
    user_message,
)
from qwencli.output import Output, counted

if TYPE_CHECKING:
    from qwencli.engine.protocol import Engine
    from qwencli.results import GenerationChunk, GenerationResult

PICTURES = Abilities(pictures=True)


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
        output: Output,
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
        self._engine, self._sampling, self._output = engine, sampling, output
        self._system, self._json, self._stats, self._model = system, json, stats, model
        self._frames, self._thinking, self._keep = frames, thinking, keep
        self._thinking_budget = thinking_budget
        # The budget while there is to be no thinking: 0 ends the thoughts of a model that has no
        # switch for them, where that was said.
        self._unasked = 0 if thinking_budget == 0 else None
        self._noted: set[str] = set()
        self._display = display or (SilentDisplay(output) if json else PlainDisplay(output))
        self._turns: list[Turn] = []
        self._attached: list[VisualPart] = []
        # What was asked last and has no answer; it may be asked again.
        self._unanswered: Message | None = None
        self._last: GenerationResult | None = None

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
                self._output.notice(*unshown({picture.first_of: [picture.name]}))

    def resume(self, path: Path) -> None:
        """Go on with a saved conversation, and keep it in that file from now on.

        What this run was told about system prompt and sampling stands over what was saved.

        Raises:
            InputError: it cannot be read.
        """
        sampling, system = self._sampling, self._system
        self._go_on_with(path)
        self._sampling = override_saved(self._sampling, sampling)
        self._system = system or self._system
        self._keep = path

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
        self._report(result, [part.name for part in visuals_of(question)])
        return result

    def _remember(self, turn: Turn) -> None:
        self._turns.append(turn)
        self._unanswered = None
        shown = visuals_of(turn.question)
        self._attached = [part for part in self._attached if not any(part is s for s in shown)]
        self._keep_turns()

    def _report(self, result: GenerationResult, pictures: list[str]) -> None:
        self._display.answered(result)
        if self._json:
            self._output.json_line(caption_record(result, pictures, self._model))
        for note in result.notes:
            # What holds for one answer often holds for the next.
            if note not in self._noted:
                self._output.notice(f"note: {note}")
                self._noted.add(note)
        missing = shortfall(result)
        if missing is not None:
            self._output.notice(f"note: {missing}")
        if self._stats:
            self._output.report(stats_line(result))

    def _all_pictures(self) -> list[VisualPart]:
        """Every picture and video of the conversation; all are held."""
        return [part for turn in self._turns for part in visuals_of(turn.question)] + self._attached

    def _open_picture(self, path: Path) -> VisualPart:
        return open_picture(path, self._all_pictures())

    def _open_visual(self, path: Path) -> VisualPart:
        return open_visual(path, self._frames, self._all_pictures())

    def _open_video(self, path: Path) -> VisualPart:
        return open_video(path, self._frames, self._all_pictures())

    def _check(self, wanted: Abilities) -> None:
        """Raises UsageError: the model cannot do that."""
        check_loaded(self._model, self._engine, wanted)

    def _last_question(self) -> Message:
        """What was asked last, which is then neither asked nor answered."""
        question, self._unanswered = self._unanswered, None
        if question is None:
            if not self._turns:
                raise UsageError("nothing was asked yet", "type a message")
            question = self._turns.pop().question
        return question

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

    def _go_on_with(self, path: Path) -> None:
        chat = read_chat(path)
        self._turns, self._attached, self._unanswered = [], [], None
        for turn in chat.turns:
            question = user_message(turn.text, tuple(self._reopened(turn.files)))
            self._turns.append(Turn(question, turn.answer, turn.thoughts, turn.stopped))
        self._system = chat.system
        self._sampling = chat.sampling
        other = "" if chat.model == self._model else f" of {chat.model}"
        self._output.notice(f"{counted(len(self._turns), 'turn')}{other} from {path}")
        if self._turns:
            self._output.notice(f"last asked: {text_of(self._turns[-1].question)[:200]}")

    def _reopened(self, files: Iterable[SavedFile]) -> Iterator[VisualPart]:
        for file in files:
            opened = self._open_picture if file.kind == "image" else self._open_video
            try:
                self._check(PICTURES)
                yield opened(Path(file.path))
            except (*OPENING_ERRORS, UnsupportedModeError) as error:
                # What was said about it is still there.
                self._output.error(error)

    def _saved(self) -> SavedChat:
        return SavedChat(
            self._model,
            self._system,
            self._sampling,
            tuple(
                SavedTurn(
                    text_of(turn.question),
                    turn.answer,
                    tuple(map(_saved_file, visuals_of(turn.question))),
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
            self._output.warn(f"this conversation is not kept: {error}")


def _split_thoughts(chunks: Iterable[GenerationChunk]) -> Iterator[GenerationChunk]:
    """Chunks whose thoughts stand apart, where an engine has left them in the text."""
    from qwencli.engine.frontend.detokenizer import ThoughtSplitter

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


def visuals_of(message: Message) -> tuple[VisualPart, ...]:
    return tuple(part for part in message.parts if not isinstance(part, TextPart))


def text_of(message: Message) -> str:
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _saved_file(part: VisualPart) -> SavedFile:
    path = str(Path(part.name).absolute())
    return SavedFile("image" if isinstance(part, ImagePart) else "video", path)
