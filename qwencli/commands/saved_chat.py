"""A conversation as a JSON file: what /save, /load and --resume write and read.

Pictures and videos are kept as paths. Nothing is trusted that a file says: every value is checked.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from qwencli.config import SamplingOptions, check_sampling
from qwencli.errors import InputError, OutputError, UsageError

FORMAT, VERSION = "qwencli chat", 1
# Conversations that are kept of themselves, and how large a file may be that is read.
KEPT, MOST_BYTES = 100, 64 << 20
Kind = Literal["image", "video"]
_TYPES: dict[str, type | tuple[type, ...]] = {
    "do_sample": bool,
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": int,
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "max_new_tokens": int,
    "seed": int,
}


@dataclass(frozen=True)
class SavedFile:
    kind: Kind
    path: str


@dataclass(frozen=True)
class SavedTurn:
    """A message and its answer.

    Args:
        stopped: Ctrl-C ended the answer.
    """

    text: str
    answer: str
    files: tuple[SavedFile, ...] = ()
    thoughts: str | None = None
    stopped: bool = False


@dataclass(frozen=True)
class SavedChat:
    model: str
    system: str | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    turns: tuple[SavedTurn, ...] = ()


def chats_folder() -> Path:
    """Where conversations at a terminal are kept; may not exist."""
    from platformdirs import user_data_path

    return user_data_path("qwencli", appauthor=False) / "chats"


def new_chat_path(folder: Path) -> Path:
    """The file of a conversation that begins now."""
    return folder / f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}-{os.getpid()}.json"


def latest_chat(folder: Path) -> Path:
    """The conversation that was kept last, but for those of which nothing is left (`/undo`).

    Raises:
        InputError: there is none.
    """
    for path in reversed(_kept_files(folder)):
        try:
            empty = not read_chat(path).turns
        except InputError:  # what is wrong with it is said when it is gone on with
            empty = False
        if not empty:
            return path
    raise InputError(
        f"{folder} has no conversation to go on with",
        "those at a terminal are kept there: qwencli chat; one of /save: /load FILE",
    )


def forget_oldest(folder: Path) -> None:
    """Keep the newest `KEPT` conversations."""
    for path in _kept_files(folder)[:-KEPT]:
        path.unlink(missing_ok=True)


def write_chat(path: Path, chat: SavedChat) -> None:
    """Put a conversation into a file that only this user may read: all of it, or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    from qwencli.dataset.sinks import write_whole

    said = {name: value for name, value in asdict(chat.sampling).items() if value not in (None, ())}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "model": chat.model,
        "system": chat.system,
        "sampling": said,
        "messages": [message for turn in chat.turns for message in _messages(turn)],
    }
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name or text that is not Unicode has no UTF-8; JSON has an escape for it.
        write_whole(path, text.encode("utf-8", "surrogatepass"))
        path.chmod(0o600)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}",
            "free space or name another file: /save FILE",
        ) from error


def read_chat(path: Path) -> SavedChat:
    """The conversation in a file.

    Raises:
        InputError: the file cannot be read, or is no conversation.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} is too large to be a conversation", "name another file")
        record = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", "check the path") from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}", "check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a conversation: it is not JSON", "name another") from error
    try:
        return _chat(record)
    except _Malformed as error:
        said = f"{path} is not a conversation: {error}"
        raise InputError(said, "name a file of /save") from error


class _Malformed(Exception):
    """What of a file is not as `write_chat` writes it."""


def _messages(turn: SavedTurn) -> list[dict[str, Any]]:
    question: dict[str, Any] = {"role": "user", "content": turn.text}
    if turn.files:
        question["files"] = [asdict(file) for file in turn.files]
    answer: dict[str, Any] = {"role": "assistant", "content": turn.answer}
    if turn.thoughts is not None:
        answer["thoughts"] = turn.thoughts
    if turn.stopped:
        answer["stopped"] = True
    return [question, answer]


def _chat(record: Any) -> SavedChat:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _Malformed(f'it has no "format": "{FORMAT}"')
    if record.get("version") != VERSION:
        raise _Malformed(f"its version is {record.get('version')!r:.40}, not {VERSION}")
    messages = _typed(record, "messages", list)
    if len(messages) % 2:
        raise _Malformed("its last message has no answer")
    return SavedChat(
        model=_typed(record, "model", str),
        system=_typed(record, "system", (str, type(None))),
        sampling=_sampling(_typed(record, "sampling", dict)),
        turns=tuple(map(_turn, messages[::2], messages[1::2])),
    )


def _turn(question: Any, answer: Any) -> SavedTurn:
    for message, role in ((question, "user"), (answer, "assistant")):
        if not isinstance(message, dict) or message.get("role") != role:
            raise _Malformed("its messages are not those of a user and an assistant in turns")
    return SavedTurn(
        text=_typed(question, "content", str),
        answer=_typed(answer, "content", str),
        files=tuple(map(_file, _typed(question, "files", list, []))),
        thoughts=_typed(answer, "thoughts", (str, type(None))),
        stopped=_typed(answer, "stopped", bool, False),
    )


def _file(record: Any) -> SavedFile:
    if not isinstance(record, dict):
        raise _Malformed("files: expected objects")
    kind = record.get("kind")
    if kind != "image" and kind != "video":
        raise _Malformed(f"files: kind is {kind!r:.40}")
    path = _typed(record, "path", str)
    if "\0" in path:
        raise _Malformed("files: a path with a null")
    return SavedFile("video" if kind == "video" else "image", path)


def _sampling(record: dict[str, Any]) -> SamplingOptions:
    said: dict[str, Any] = {}
    known = {f.name for f in fields(SamplingOptions)}
    for name, value in record.items():
        if name == "stop" and isinstance(value, list) and all(isinstance(s, str) for s in value):
            said[name] = tuple(value)
            continue
        wanted = _TYPES.get(name, ())
        if name not in known or not isinstance(value, wanted):
            raise _Malformed(f"sampling: {name!r:.40} is {value!r:.40}")
        if isinstance(value, bool) and wanted is not bool:
            raise _Malformed(f"sampling: {name} is {value}")
        said[name] = value
    options = SamplingOptions(**said)
    try:
        check_sampling(options)
    except UsageError as error:
        raise _Malformed(error.message) from error
    return options


def _typed(record: dict[str, Any], name: str, wanted: Any, default: Any = None) -> Any:
    value = record.get(name, default)
    if not isinstance(value, wanted):
        raise _Malformed(f"{name} is {value!r:.40}")
    return value


def _kept_files(folder: Path) -> list[Path]:
    """Oldest first."""
    try:
        found = [path for path in folder.iterdir() if path.suffix == ".json"]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)
    except OSError:
        return []
