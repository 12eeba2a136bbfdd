"""What is to be captioned: pictures and videos found in files, folders and lists, without opening
them."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwencli.errors import InputError, UsageError

# Names of video files that `engine.videos` reads.
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".ivf", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv",
})  # fmt: skip
# What a picture is asked where only one thing is asked.
CAPTION = "caption"
# What this program writes beside pictures while it works; left behind by a run that was killed.
PARTIAL_PREFIX, PARTIAL_SUFFIX = ".qwencli-", ".partial"


@dataclass(frozen=True, slots=True)
class Item:
    """One picture or video of a set.

    Args:
        key: its path below `Listing.base`, with `/` between the parts.
        size, mtime_ns: of the file when it was listed; None where it has none.
    """

    key: str
    size: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one caption of a set.

    Args:
        key: the item's.
        field: what was asked, where several things are.
        sample: counts the answers to the same question, from 0.
    """

    key: str
    field: str = CAPTION
    sample: int = 0


@dataclass
class Listing:
    """The items of a set in their natural order, and what was left out.

    Args:
        base: the folder that keys are relative to.
        refused: items that cannot be captioned, and why.
        hidden: files whose name begins with a dot (`._*` of macOS among them).
        others: files that are neither pictures nor videos by their name, by its ending.
        seen: folders and files that several names lead to, counted once each.
        partial: what a killed run left behind while it wrote.
    """

    base: Path
    items: list[Item] = field(default_factory=list)
    refused: list[tuple[Item, InputError]] = field(default_factory=list)
    hidden: int = 0
    others: Counter[str] = field(default_factory=Counter)
    seen: int = 0
    partial: list[Path] = field(default_factory=list)

    def path(self, item: Item) -> Path:
        return self.base / item.key


@dataclass(frozen=True)
class Selection:
    """Which files of a folder are meant.

    Args:
        recursive: those of the folders in it too.
        globs: only those whose path matches one of these; see `glob_pattern`.
    """

    recursive: bool = False
    globs: tuple[str, ...] = ()


def list_inputs(inputs: Sequence[Path], selection: Selection) -> Listing:
    """The pictures and videos that files and folders hold.

    Raises:
        InputError: an input is not there or cannot be read, or they have no folder in common.
        UsageError: a pattern of `selection` is empty.
    """
    listing = Listing(_common_folder(inputs))
    wanted = _Wanted(selection.globs)
    walk = _Walk(listing, wanted, selection.recursive)
    for path in inputs:
        if os.path.isdir(path):
            walk.folder(path)
        else:
            walk.file(path)
    walk.linked_folders()
    return listing


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts `a2` before `a10`."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdecimal() else (0, part) for part in parts)


def glob_pattern(glob: str) -> re.Pattern[str]:
    """What a path below a folder must be: `*` and `?` stay within a part, `**/` is any folders.

    A pattern without a slash is of the name alone.

    Raises:
        UsageError: the pattern is empty.
    """
    if not glob:
        raise UsageError("--glob is empty", "give a pattern such as '*.png'")
    pattern, at = "" if "/" in glob else "(?:.*/)?", 0
    while at < len(glob):
        piece = re.match(r"\*\*/|\*+|\?|\[!?\]?[^]/]*\]|.", glob[at:], re.DOTALL)
        assert piece is not None, "the last alternative takes any character"
        text = piece[0]
        at += len(text)
        if text == "**/":
            pattern += "(?:.*/)?"
        elif text[0] == "*":
            pattern += ".*" if len(text) > 1 else "[^/]*"
        elif text == "?":
            pattern += "[^/]"
        elif text[0] == "[" and len(text) > 1:
            body = text[1:-1].replace("\\", r"\\")
            pattern += "[" + ("^" + body[1:] if body[0] == "!" else body.replace("^", r"\^")) + "]"
        else:
            pattern += re.escape(text)
    return re.compile(pattern, re.DOTALL)


class _Wanted:
    """Tells pictures and videos by their names."""

    def __init__(self, globs: Iterable[str]) -> None:
        from qwencli.engine.frontend.images import PICTURE_SUFFIXES

        self._suffixes = PICTURE_SUFFIXES | VIDEO_SUFFIXES
        self._patterns = [glob_pattern(glob) for glob in globs]

    def __call__(self, relative: str) -> bool:
        if os.path.splitext(relative)[1].lower() not in self._suffixes:
            return False
        return not self._patterns or any(each.fullmatch(relative) for each in self._patterns)


class _Walk:
    """Goes through folders; each real one once, whatever links lead to it."""

    def __init__(self, listing: Listing, wanted: _Wanted, recursive: bool) -> None:
        self._listing, self._wanted, self._recursive = listing, wanted, recursive
        self._folders: set[tuple[int, int]] = set()
        self._keys: set[str] = set()
        # Looked at last, so that a folder is listed under its own path where it has one here.
        self._links: list[tuple[str, str]] = []

    def file(self, path: Path) -> None:
        """A file that was named itself: whatever its name."""
        try:
            status = path.stat()
        except (OSError, ValueError):
            self._add(self._key(str(path)), None)  # opening it will tell why
        else:
            self._add(self._key(str(path)), status)

    def folder(self, path: Path) -> None:
        self._enter(str(path), "")

    def linked_folders(self) -> None:
        while self._links:
            path, below = self._links.pop(0)
            self._enter(path, below)

    def _enter(self, folder: str, below: str) -> None:
        """List a folder and those in it; `below` is its path under the folder that was named."""
        waiting = [(folder, below)]
        while waiting:
            folder, below = waiting.pop()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in self._folders:
                    self._listing.seen += 1
                    continue
                self._folders.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda entry: natural_key(entry.name))
            except OSError as error:
                reason = f"{folder} cannot be read: {error.strerror}"
                refusal = InputError(reason, "change the folder's permissions, or leave it out")
                self._listing.refused.append((Item(self._key(folder)), refusal))
                continue
            inside: list[tuple[str, str]] = []
            for entry in found:
                self._entry(entry, below + entry.name, inside)
            waiting += reversed(inside)

    def _entry(self, entry: os.DirEntry[str], below: str, inside: list[tuple[str, str]]) -> None:
        if entry.name.startswith("."):
            if entry.name.startswith(PARTIAL_PREFIX) and entry.name.endswith(PARTIAL_SUFFIX):
                self._listing.partial.append(Path(entry.path))
            elif entry.name != ".qwencli":
                self._listing.hidden += 1
            return
        try:
            if entry.is_dir():
                if self._recursive:
                    linked = entry.is_symlink()
                    (self._links if linked else inside).append((entry.path, below + "/"))
                return
            if not self._wanted(below):
                self._listing.others[os.path.splitext(entry.name)[1].lower()] += 1
                return
            status = entry.stat()
        except OSError:
            # A link to nowhere, or in a circle; opening it will tell.
            if self._wanted(below):
                self._add(self._key(entry.path), None)
            return
        self._add(self._key(entry.path), status)

    def _key(self, path: str) -> str:
        base = str(self._listing.base)
        if path.startswith(base + os.sep):
            relative = path[len(base) + 1 :]
        elif base == os.curdir and not os.path.isabs(path):
            relative = os.path.normpath(path)
        else:
            relative = os.path.relpath(path, base)
        return relative.replace(os.sep, "/")

    def _add(self, key: str, status: os.stat_result | None) -> None:
        if key in self._keys:
            self._listing.seen += 1
            return
        self._keys.add(key)
        if status is None:
            item = Item(key)
        else:
            item = Item(key, status.st_size, status.st_mtime_ns)
            if not stat.S_ISREG(status.st_mode):
                refusal = InputError(
                    f"{self._listing.path(item)} is no regular file", "leave it out"
                )
                self._listing.refused.append((item, refusal))
                return
        self._listing.items.append(item)


def _common_folder(inputs: Sequence[Path]) -> Path:
    """The folder that all inputs lie in, as the user would write it.

    Raises:
        InputError: there is none (two drives of Windows).
    """
    folders = [path if os.path.isdir(path) else path.parent for path in inputs]
    if len(set(folders)) == 1:
        return folders[0]
    try:
        return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
    except ValueError as error:
        raise InputError(
            "the inputs are on several drives", "caption the pictures of each drive on their own"
        ) from error


def in_folders(keys: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Keys by their folder (`""` is the base), in order."""
    by_folder: dict[str, list[str]] = {}
    for key in keys:
        by_folder.setdefault(key.rpartition("/")[0], []).append(key)
    yield from by_folder.items()
