"""What is known of a picture: its path, and the tags, caption and JSON file beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qwencli.errors import InputError

if TYPE_CHECKING:
    from qwencli.dataset.named_inputs import Part


PATH_FIELDS = ("name", "dir")
HINT_FIELDS = ("tags", "caption", "hints")
# A file of hints holds words for one picture; what is larger is something else.
MAX_HINT_BYTES = 1 << 20
MAX_HINT_CHARS = 8000
# What a field of a template can be named.
NAME = re.compile(r"[^\W\d]\w*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]+")


def picture_fields(
    relative: str, file: Path | None = None, hints: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What is known of a picture by field: its path, and its hints.

    Args:
        relative: its path within the set.
        file: where it lies; names the folder of pictures that lie directly in the set's.
    """
    path = PurePosixPath(relative.replace("\\", "/"))
    folder = path.parent.name or (file.absolute().parent.name if file is not None else "")
    return {**(hints or {}), "name": _sayable(path.stem), "dir": _sayable(folder)}


def read_hints(
    file: Path, caption_extension: str = ".txt", part: Part | None = None
) -> dict[str, str]:
    """What files beside a picture say of it: `a.json` by key, and `a.txt` as `caption` and `tags`.

    Tags are those that the JSON file names, else the text where it is a list of tags. `hints` is
    the whole JSON file as `key: value` lines. Files that are not there say nothing.

    Args:
        part: where the picture is, if it is no file of its own: the files are there too.

    Raises:
        InputError: a file is too large, unreadable or malformed. The picture cannot be asked what
            was meant.
    """
    text = _hint_text(file, caption_extension, part)
    values = _hint_values(file, part) if caption_extension != ".json" or part else {}
    known = {key: value for key, value in values.items() if NAME.fullmatch(key)}
    known["hints"] = "\n".join(f"{key}: {value}" for key, value in values.items())[:MAX_HINT_CHARS]
    known["caption"] = text or known.get("caption", "")
    known["tags"] = known.get("tags") or (text if is_tag_list(text) else "")
    return known


def _beside(file: Path, extension: str) -> Path:
    # with_suffix refuses names such as "..."; a name without a dot gets one.
    return file.with_name(file.name.removesuffix(file.suffix) + extension)


def _hint_text(picture: Path, extension: str, part: Part | None) -> str:
    file = _beside(picture, extension)
    try:
        if part is not None:
            data = part.beside(extension) or b""
        else:
            with file.open("rb") as opened:
                data = opened.read(MAX_HINT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise InputError(
            f"{file}: {error.strerror or error}", "make it readable, or take it away"
        ) from error
    if len(data) > MAX_HINT_BYTES:
        raise InputError(f"{file} is too large for hints", "keep hints under 1 MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8", "save it as UTF-8") from error
    return _clean(text)


def _hint_values(picture: Path, part: Part | None) -> dict[str, str]:
    file = _beside(picture, ".json")
    text = _hint_text(picture, ".json", part)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}", "correct it, or take it away") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object", 'write {"subject": "..."}')
    return {key: said for key, entry in value.items() if (said := _as_text(entry))}


def _as_text(value: Any) -> str:
    """A value of JSON as words: lists by commas, nothing for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(filter(None, map(_as_text, value)))[:MAX_HINT_CHARS]
    if isinstance(value, dict):
        said = (f"{key}: {word}" for key, entry in value.items() if (word := _as_text(entry)))
        return "; ".join(said)[:MAX_HINT_CHARS]
    return _clean(str(value))


def _sayable(name: str) -> str:
    """A name of a file as text of one line: names may hold line feeds and what is no Unicode."""
    return _clean(name.encode("utf-8", "replace").decode()).replace("\n", " ")


def _clean(text: str) -> str:
    return _CONTROL.sub(" ", text.replace("\r\n", "\n")).strip()[:MAX_HINT_CHARS]


def is_tag_list(text: str) -> bool:
    """Whether a text is tags with commas between, not sentences."""
    tags = [tag.strip() for tag in text.split(",")]
    if not text.strip() or re.search(r"[.!?。！？]\s", text.strip()):
        return False
    long = sum(len(tag.split()) > 4 for tag in tags)
    return len(tags) > 1 and 4 * long <= len(tags) and not text.rstrip().endswith((".", "。"))
