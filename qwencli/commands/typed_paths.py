"""Which files a line of a chat names: paths behind a command, dropped files, and `@path`."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from qwencli.dataset.named_inputs import local_path
from qwencli.dataset.sources import VIDEO_SUFFIXES
from qwencli.errors import InputError, UsageError

# Pieces in quotes, escaped characters, and others, as a shell puts them together. Possessive: a
# text of many backslashes would be tried in every way to read it.
_WORD = r"(?:'[^']*'|\"[^\"]*\"|\\.|[^\s\\'\"]|\\)++"
_SHELL_WORD = re.compile(rf"({_WORD})(?:\s+|$)")
_MENTION = re.compile(rf"(?<![^\s(\[])@({_WORD})")
# What ends a sentence and not a file's name.
_PUNCTUATION = ".,;:!?)]"


def split_paths(text: str) -> list[Path]:
    """Paths separated by spaces.

    One with spaces may be quoted, have backslashes before them, or stand alone as it is; terminals
    and file managers write a dropped file in one of these ways, or as a `file://` address.
    """
    if text and exists(whole := _as_path(text)):
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
    return next((paths for paths in readings if all(map(exists, paths))), readings[0])


def dropped_files(line: str) -> tuple[list[Path], str]:
    """The files that a line begins with, as a terminal writes those dropped on it, and the rest.

    Their paths are absolute: a word that happens to be the name of a file here is a word.
    """
    whole = _as_path(line)
    if whole.is_absolute() and whole.name and exists(whole):
        return [whole], ""
    files: list[Path] = []
    while word := _SHELL_WORD.match(line):
        try:
            paths = split_paths(word[1])
        except UsageError:
            break
        if not all(path.is_absolute() and path.name and exists(path) for path in paths):
            break
        files += paths
        line = line[word.end() :]
    return files, line


def mentioned_files(text: str) -> tuple[list[Path], str]:
    """The files that a text names as `@path`, and the text with their names in those places.

    Those at its beginning leave nothing. What is neither a file nor named like a picture or video
    stays as it is: an address of mail, a name of somebody.
    """
    files: list[Path] = []
    pieces: list[str] = []
    done = 0
    for found in _MENTION.finditer(text):
        path, rest = _mentioned(found[1])
        if path is None:
            continue
        before = text[done : found.start()]
        leading = not "".join([*pieces, before]).strip()
        pieces.append(before if leading else before + path.name)
        pieces.append(rest)
        files.append(path)
        done = found.end()
    return files, ("".join(pieces) + text[done:]).strip() if files else text


def as_mention(paths: list[Path]) -> str:
    """Files as a person may type them into a message."""
    return " ".join(f"@{shlex.quote(str(path))}" for path in paths)


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name longer than the system allows, or with a null
        return False


def _mentioned(word: str) -> tuple[Path | None, str]:
    """The file that a word behind an @ names, and the punctuation that follows its name."""
    from qwencli.engine.frontend.media_files import PICTURE_SUFFIXES

    bare = word.rstrip(_PUNCTUATION)
    readings = {word: "", bare: word[len(bare) :]} if bare else {word: ""}
    paths: dict[Path, str] = {}
    for reading, rest in readings.items():
        try:
            named = split_paths(reading)
        except UsageError:
            continue
        if len(named) == 1 and named[0].name:
            paths[named[0]] = rest
    for path, rest in paths.items():
        if exists(path):
            return path, rest
    for path, rest in paths.items():
        # A typing error: an answer about a picture that the model never saw would be invented.
        if path.suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES:
            return path, rest
    return None, ""


def _as_path(word: str) -> Path:
    path = Path(os.path.expanduser(word))  # noqa: PTH111 - the other raises for "~nobody"
    try:
        return local_path(path)
    except (InputError, OSError):  # told when it is opened
        return path
