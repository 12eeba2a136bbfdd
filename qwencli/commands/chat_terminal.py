"""Typing at a terminal: several lines, history, completion, pasted and dropped files, a footer."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.commands.chat_session import COMMANDS, PipedLines
from qwencli.commands.chat_settings import SETTINGS
from qwencli.commands.typed_paths import as_mention, dropped_files
from qwencli.dataset.sources import VIDEO_SUFFIXES
from qwencli.output import Output, visible

if TYPE_CHECKING:
    from types import FrameType

    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT, CONTINUATION = "> ", "  "
HISTORY_FILE = "chat_history"
# Lines of a paste follow one another at once; a person's do not.
PASTE_GAP_S = 0.03
# Names that one completion lists.
_MOST_NAMES = 200
# The piece of a path that is being typed: in quotes, or with backslashes before what is special.
_TYPED_PATH = re.compile(r"\"([^\"]*)$|'([^']*)$|((?:\\.|[^\s\\'\"])*)$")
_SPECIAL = re.compile(r"([^\w/.,:+@%~-])")


class TerminalLines:
    """Messages as a person types them.

    Enter sends; Alt-Enter or Ctrl-J begins a new line, and so does Enter behind a backslash. A
    paste is part of the message, however many lines it has; files that are dropped become
    mentions (`@path`). Ctrl-C drops what is typed; where nothing is, it is raised.

    Args:
        footer: what stands below the prompt, the most important piece first.
        history_file: where messages are kept for the next chat; None = nowhere.
    """

    can_edit = has_keyboard = True

    def __init__(
        self,
        output: Output,
        footer: Callable[[], Sequence[str]] = tuple,
        history_file: Path | None = None,
    ) -> None:
        self._output, self._footer, self._history_file = output, footer, history_file
        # Whether what comes was typed while nobody read: lines are messages of their own then.
        self._ahead = False
        self._session: PromptSession[str] | None = None

    def next_line(self, draft: str = "") -> str | None:
        if self._session is None:
            self._session = self._make_session()
            self._output.notice("type a message; /help lists the commands")
        self._ahead = self._ahead or _more_waits(0.0)
        try:
            with _interrupts_noted() as leave_if_interrupted:
                return self._session.prompt(default=draft, pre_run=leave_if_interrupted)
        except EOFError:
            return None

    def _make_session(self) -> PromptSession[str]:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.application import get_app
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.output import create_output
        from prompt_toolkit.styles import Style

        # Answers alone go to stdout where that is a file.
        screen = sys.stdout if sys.stdout.isatty() else sys.stderr
        return PromptSession(
            [("class:prompt", PROMPT)],
            multiline=True,
            prompt_continuation=CONTINUATION,
            history=_history(self._history_file),
            completer=_ChatCompleter().prompt_toolkit(),
            complete_while_typing=Condition(
                lambda: _completes(get_app().current_buffer.document.text_before_cursor)
            ),
            key_bindings=self._keys(),
            bottom_toolbar=self._toolbar,
            reserve_space_for_menu=6,
            enable_suspend=True,
            output=create_output(stdout=screen),
            style=Style.from_dict(
                {"prompt": "bold", "bottom-toolbar": "noreverse ansibrightblack"}
            ),
        )

    def _toolbar(self) -> str:
        from prompt_toolkit.application import get_app
        from rich.cells import cell_len

        columns = get_app().output.get_size().columns
        shown: list[str] = []
        for piece in map(visible, self._footer()):
            if cell_len(" · ".join([*shown, piece])) < columns:
                shown.append(piece)
        return " · ".join(shown)

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()
        keys.add("enter")(self._enter)
        keys.add("escape", "enter")(_new_line)
        keys.add("c-j")(_new_line)
        keys.add("c-c")(_interrupt)
        keys.add("<sigint>")(_interrupt)
        keys.add("<bracketed-paste>")(_paste)
        return keys

    def _enter(self, event: KeyPressEvent) -> None:
        from prompt_toolkit.keys import Keys

        buffer = event.current_buffer
        completing = buffer.complete_state
        if completing is not None and completing.current_completion is not None:
            buffer.complete_state = None
            return
        if buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
            return
        waiting = any(key.key != Keys.CPRResponse for key in event.key_processor.input_queue)
        # What the terminal answers to a question of the prompt's is no key.
        pasted = waiting or (not event.app.renderer.waiting_for_cpr and _more_waits(PASTE_GAP_S))
        is_command = buffer.text.partition(" ")[0] in COMMANDS
        if pasted and not self._ahead and not is_command:
            # A terminal that does not mark what is pasted.
            buffer.insert_text("\n")
            return
        self._ahead = self._ahead and waiting
        buffer.validate_and_handle()


class UndrawnLines(PipedLines):
    """Messages at a terminal that only writes on, such as an editor's: a line each, changed by the
    terminal's own means. Ctrl-C drops what is typed, and is raised."""

    has_keyboard = True

    def __init__(self, output: Output) -> None:
        super().__init__(sys.stdin)
        self._output = output
        self._begun = False

    def next_line(self, draft: str = "") -> str | None:
        if not self._begun:
            self._begun = True
            self._output.notice("type a message; /help lists the commands")
        try:
            self._output.prompt(PROMPT)
            line = super().next_line(draft)
        except KeyboardInterrupt:
            self._output.notice("")
            raise
        if line is None:
            self._output.notice("")
        return line


def can_draw() -> bool:
    """Whether this terminal moves its cursor; as others tell it, where TERM does not say no."""
    return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def history_file() -> Path:
    """Where this user's messages are kept for the next chat."""
    from platformdirs import user_data_path

    return user_data_path("qwencli", appauthor=False) / HISTORY_FILE


@contextmanager
def quiet_keys() -> Iterator[None]:
    """What is typed meanwhile is not echoed, and waits for whoever reads next; Ctrl-C works."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = termios.tcgetattr(keyboard)
    quiet[0] &= ~termios.ICRNL  # Enter stays Enter
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


@contextmanager
def _interrupts_noted() -> Iterator[Callable[[], None]]:
    """Ctrl-C never ends the work of setting a prompt up or down; yields what the prompt is to run
    first, where one that came in between takes effect."""
    from prompt_toolkit.application import get_app

    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = True

    def leave_if_interrupted() -> None:
        if noted:
            get_app().exit(exception=KeyboardInterrupt)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield leave_if_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _new_line(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")


def _interrupt(event: KeyPressEvent) -> None:
    """Drop what is typed; where nothing is, it is for the reader to decide."""
    if event.current_buffer.text:
        event.current_buffer.reset()
    else:
        event.app.exit(exception=KeyboardInterrupt, style="class:aborting")


def _paste(event: KeyPressEvent) -> None:
    """Insert what is pasted. Files that are dropped become mentions: what they are is seen."""
    text = event.data.replace("\r\n", "\n").replace("\r", "\n")
    files, rest = dropped_files(text.strip())
    before = event.current_buffer.document.current_line_before_cursor
    if files and not rest and not before.startswith("/"):
        text = as_mention(files) + " "
        if before and not before[-1].isspace():
            text = " " + text
    event.current_buffer.insert_text(text)


def _more_waits(seconds: float) -> bool:
    """Whether a key is there to be read, now or within `seconds`."""
    if sys.platform == "win32":
        import msvcrt
        import time

        time.sleep(seconds)
        return msvcrt.kbhit()
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _history(path: Path | None) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class PrivateHistory(FileHistory):
        """What was typed before; where the file cannot be written it is forgotten."""

        def store_string(self, string: str) -> None:
            with suppress(OSError, ValueError):
                super().store_string(string)

        def load_history_strings(self) -> Iterable[str]:
            with suppress(OSError, ValueError):
                return super().load_history_strings()
            return ()

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return PrivateHistory(path)


def _completes(text: str) -> bool:
    """Whether a list is shown without being asked for: behind a slash, and behind an @."""
    return "\n" not in text and (text.startswith("/") or bool(re.search(r"(?:^|\s)@\S*$", text)))


class _ChatCompleter:
    """Commands, settings, and paths where a path is expected."""

    def prompt_toolkit(self) -> Any:
        from prompt_toolkit.completion import Completer

        complete = self.completions

        class ChatCompleter(Completer):
            def get_completions(self, document: Document, event: object) -> Iterator[Completion]:
                return complete(document.text_before_cursor)

        return ChatCompleter()

    def completions(self, text: str) -> Iterator[Completion]:
        from prompt_toolkit.completion import Completion

        name, space, rest = text.partition(" ")
        if not space and text.startswith("/"):
            for command, about in COMMANDS.items():
                if command.startswith(text):
                    shown = f"{command} {about.argument}".strip()
                    yield Completion(command, -len(text), shown, about.text)
            if "/" in text[1:]:
                yield from _paths(text, None)
        elif name == "/set" and "=" not in rest:
            for setting in SETTINGS:
                if setting.startswith(rest):
                    yield Completion(f"{setting}=", -len(rest), setting)
        elif name in ("/image", "/video"):
            yield from _paths(rest, _suffixes(name))
        elif name in ("/load", "/save"):
            yield from _paths(rest, frozenset({".json"}))
        elif mention := re.search(r"(?:^|[\s(\[])@((?:\\.|[^\s\\]|(?<=@)'[^']*)*)$", text):
            yield from _paths(mention[1], _suffixes("/image") | _suffixes("/video"))


def _suffixes(command: str) -> frozenset[str]:
    from qwencli.engine.frontend.media_files import PICTURE_SUFFIXES

    return VIDEO_SUFFIXES | {".gif"} if command == "/video" else PICTURE_SUFFIXES


def _paths(text: str, suffixes: frozenset[str] | None) -> Iterator[Completion]:
    """Folders, and files of these endings, that a path may go on to."""
    from prompt_toolkit.completion import Completion

    typed = _TYPED_PATH.search(text)
    if typed is None:
        return
    raw = next((group for group in typed.groups() if group is not None), "")
    quote = typed[0][: len(typed[0]) - len(raw)]
    path = raw if quote else re.sub(r"\\(.)", r"\1", raw)
    folder, begun = os.path.split(os.path.expanduser(path))  # noqa: PTH111 - "~nobody" is no error
    replaced = len(raw) if quote else len(raw.rpartition("/")[2])
    for name, is_folder in _entries(folder or ".", begun):
        if not is_folder and suffixes is not None and Path(name).suffix.lower() not in suffixes:
            continue
        written = name + "/" * is_folder
        if quote:
            # The whole of it, as only then the folder in front is kept.
            written = path[: len(path) - len(begun)] + written
        else:
            written = _SPECIAL.sub(r"\\\1", written)
        yield Completion(written, -replaced, name + "/" * is_folder)


def _entries(folder: str, begun: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what begins so; folders that cannot be read have none."""
    found: list[tuple[str, bool]] = []
    with suppress(OSError, ValueError), os.scandir(folder) as entries:
        for entry in entries:
            hidden = entry.name.startswith(".") and not begun.startswith(".")
            if hidden or not entry.name.lower().startswith(begun.lower()):
                continue
            found.append((entry.name, entry.is_dir()))
            if len(found) == _MOST_NAMES:
                break
    return sorted(found)
