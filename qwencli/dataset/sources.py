"""What is to be captioned: pictures and videos found in files, folders and lists, without opening
them."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwencli.dataset.named_inputs import (
    Part,
    StdinPart,
    UrlPart,
    is_shard,
    is_table,
    local_path,
    safe_key,
    url_part,
    without_inner_dots,
)
from qwencli.dataset.shards import ArchiveMember, NoPicturesError, members, table_rows
from qwencli.engine.machine.python_runtime import gc_paused
from qwencli.errors import InputError, MissingDependencyError, QwenCliError, UsageError

if TYPE_CHECKING:
    from qwencli.messages import VisualPart

# Names of video files that `engine.videos` reads.
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".ivf", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv",
})  # fmt: skip
# What a picture is asked where only one thing is asked.
CAPTION = "caption"
# What failed, as this program lists it beside the captions, and its page about a set.
FAILURES, REPORT = "failures.jsonl", "report.html"
# What this program writes beside pictures while it works; left behind by a run that was killed.
PARTIAL_PREFIX, PARTIAL_SUFFIX = ".qwencli-", ".partial"


class Item(NamedTuple):
    """One picture or video of a set.

    Args:
        key: its path below `Listing.base`, with `/` between the parts.
        size, mtime_ns: of the file when it was listed; None where it has none.
        part: where it is, if it is no file of its own.
    """

    key: str
    size: int | None = None
    mtime_ns: int | None = None
    part: Part | None = None


class Slot(NamedTuple):
    """The place of one caption of a set.

    Args:
        key: the item's.
        field: what was asked, where several things are.
        sample: counts the answers to the same question, from 0.
    """

    key: str
    field: str = CAPTION
    sample: int = 0


def sidecar_name(slot: Slot, extension: str = ".txt") -> str:
    """The file of a caption, from the folder that the key is relative to: `a/b.txt`,
    `a/b.tags.2.txt`."""
    key = slot.key
    start, dot = key.rfind("/") + 1, key.rfind(".")
    # As `os.path.splitext`, which takes several times as long.
    name = key[:dot] if dot > start and key[start] != "." else os.path.splitext(key)[0]
    if slot.field != CAPTION:
        name += f".{slot.field}"
    if slot.sample:
        name += f".{slot.sample + 1}"
    return name + extension


@dataclass
class Listing:
    """The items of a set in their natural order, and what was left out.

    Args:
        base: the folder that keys are relative to.
        refused: items that cannot be captioned, and why.
        hidden: files whose name begins with a dot (`._*` of macOS among them).
        others: files that are neither pictures nor videos by their name, by its ending.
        unmatched: those that are, and that `--glob` leaves out.
        seen: folders and files that several names lead to, counted once each.
        partial: what a killed run left behind while it wrote.
        named: what the user named, where that was one thing; an archive lies in no folder of its
            own.
    """

    base: Path
    items: list[Item] = field(default_factory=list)
    refused: list[tuple[Item, QwenCliError]] = field(default_factory=list)
    hidden: int = 0
    others: Counter[str] = field(default_factory=Counter)
    unmatched: int = 0
    seen: int = 0
    partial: list[Path] = field(default_factory=list)
    named: str = ""

    def path(self, item: Item) -> Path:
        return self.base / item.key

    def name(self, item: Item) -> str:
        """As the user would write it: a path, or an address."""
        return item.part.url if isinstance(item.part, UrlPart) else str(self.path(item))

    def open(
        self, item: Item, frames: int | None = None, max_pixels: int | None = None
    ) -> VisualPart:
        """The picture or video of an item.

        Args:
            frames, max_pixels: see `engine.frontend.videos.open_visual`.

        Raises:
            InputError, MissingDependencyError, OutOfMemoryError: it cannot be had or used.
        """
        from qwencli.engine.frontend.videos import open_visual

        if item.part is None:
            return open_visual(self.path(item), frames, max_pixels=max_pixels)
        name = self.name(item)
        return open_visual(item.part.read(name), frames, name=name, max_pixels=max_pixels)


@dataclass(frozen=True)
class Selection:
    """Which files of a folder are meant.

    Args:
        recursive: those of the folders in it too.
        globs: only those whose path matches one of these; see `glob_pattern`.
    """

    recursive: bool = False
    globs: tuple[str, ...] = ()


@gc_paused()
def list_inputs(inputs: Sequence[str | StdinPart], selection: Selection) -> Listing:
    """The pictures and videos that are meant.

    Args:
        inputs: files, folders, shards (`.tar`, `.parquet`), addresses of the web. Shards in
            folders are meant where there is no picture or video beside or below them.

    Raises:
        InputError: the inputs have no folder in common.
        UsageError: a pattern of `selection` is empty.
    """
    local = [
        _local(each)
        for each in inputs
        if not isinstance(each, StdinPart) and url_part(each) is None
    ]
    listing = Listing(
        _common_folder(local) if local else Path(),
        named=str(inputs[0]) if len(inputs) == 1 else "",
    )
    walk = _Walk(listing, _Wanted(selection.globs), selection.recursive)
    for each in inputs:
        if isinstance(each, StdinPart):
            listing.items.append(Item("stdin", len(each.data), None, each))
        elif (address := url_part(each)) is not None:
            walk.add_part(address.key, address)
        else:
            path = _local(each)
            if os.path.isdir(path):
                walk.folder(path)
            elif is_shard(path.name):
                walk.shard(path)
            else:
                walk.file(path)
    walk.linked_folders()
    walk.shards_in_folders()
    return listing


def _local(named: str) -> Path:
    return without_inner_dots(local_path(Path(named)))


_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> list[str | int]:
    """Sorts `a2` before `a10`: texts and numbers in turns, as those of other names."""
    parts: list[str | int] = [*_DIGITS.split(name)]
    parts[1::2] = map(int, parts[1::2])
    return parts


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


def ending(name: str) -> str:
    """The ending of a file's name, in small letters and with its dot.

    `os.path.splitext` takes several times as long.
    """
    place = name.rfind(".")
    return name[place:].lower() if place > 0 else ""


class _Wanted:
    """Tells pictures and videos by their names."""

    def __init__(self, globs: Iterable[str]) -> None:
        from qwencli.engine.frontend.media_files import PICTURE_SUFFIXES

        self.suffixes = PICTURE_SUFFIXES | VIDEO_SUFFIXES
        self._patterns = [glob_pattern(glob) for glob in globs]

    @property
    def is_narrowed(self) -> bool:
        return bool(self._patterns)

    def __call__(self, below: str, name: str, suffix: str) -> bool:
        """Args: below: the path of its folder, with a slash behind it; or empty."""
        if suffix not in self.suffixes:
            return False
        return not self._patterns or any(each.fullmatch(below + name) for each in self._patterns)


class _Walk:
    """Goes through folders; each real one once, whatever links lead to it."""

    def __init__(self, listing: Listing, wanted: _Wanted, recursive: bool) -> None:
        self._listing, self._wanted, self._recursive = listing, wanted, recursive
        self._base = str(listing.base)
        self._inside_base = self._base + os.sep
        self._folders: set[tuple[int, int]] = set()
        # Of parts; files are known by the folder that has them, whatever links lead there.
        self._keys: set[str] = set()
        self._names: dict[tuple[int, int] | str, set[str]] = {}
        self._known_folders: dict[str, tuple[int, int] | str] = {}
        # Looked at last, so that a folder is listed under its own path where it has one here.
        self._links: list[tuple[str, str]] = []
        # In folders; by their path.
        self._shards: dict[str, str] = {}

    def file(self, path: Path) -> None:
        """A file that was named itself: whatever its name."""
        folder = str(path.parent)
        if folder not in self._known_folders:
            self._known_folders[folder] = _identity(folder)
        if not self._is_new(self._known_folders[folder], path.name):
            return
        try:
            status = path.stat()
        except FileNotFoundError as error:
            from qwencli.engine.frontend.media_files import read_error

            key = self._key(str(path))
            self._listing.refused.append((Item(key), read_error(error, str(path))))
            return
        except (OSError, ValueError):
            status = None  # opening it will tell why
        self._add(self._key(str(path)), status)

    def folder(self, path: Path) -> None:
        self._enter(str(path), "")

    def shard(self, path: Path, kind: str | None = None) -> None:
        """The pictures in an archive or a table.

        Args:
            kind: of a file that nobody named, and which may be a table of something else.
        """
        key = self._key(str(path))
        rows, before = is_table(path.name), len(self._keys)
        try:
            for name, part in (table_rows if rows else members)(path):
                below = safe_key(name)
                if below.rpartition("/")[2].startswith("."):
                    self._listing.hidden += 1
                    continue
                folder, name = _split(below)
                suffix = ending(name)
                if rows or self._wanted(folder, name, suffix):
                    self.add_part(f"{key}/{below}", part)
                else:
                    self._leave_out(suffix)
            if kind is None and len(self._keys) == before and not self._wanted.is_narrowed:
                raise NoPicturesError(f"{path} holds no picture or video", "leave it out")
        except NoPicturesError as error:
            if kind is None:
                self._listing.refused.append((Item(key), error))
            else:
                self._listing.others[kind] += 1
        except (InputError, MissingDependencyError) as error:
            self._listing.refused.append((Item(key), error))

    def add_part(self, key: str, part: Part) -> None:
        if key in self._keys:
            self._listing.seen += 1
            return
        self._keys.add(key)
        size = part.size if isinstance(part, ArchiveMember) else None
        self._listing.items.append(Item(key, size, None, part))

    def shards_in_folders(self) -> None:
        """Take those in folders without pictures: beside pictures they may be anything."""
        if self._listing.items or self._listing.refused:
            self._listing.others.update(self._shards.values())
            return
        for path in sorted(self._shards, key=natural_key):
            self.shard(Path(path), kind=self._shards[path])

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
                identity = (status.st_dev, status.st_ino)
                if identity in self._folders:
                    self._listing.seen += 1
                    continue
                self._folders.add(identity)
                found = self._scan(folder, below)
            except OSError as error:
                reason = f"{folder} cannot be read: {error.strerror}"
                refusal = InputError(reason, "change the folder's permissions, or leave it out")
                self._listing.refused.append((Item(self._key(folder)), refusal))
                continue
            found.sort(key=lambda each: natural_key(each[0].name))
            inside: list[tuple[str, str]] = []
            above = self._key(f"{folder.rstrip(os.sep)}{os.sep}x")[:-1]
            for entry, is_folder in found:
                if is_folder:
                    linked = entry.is_symlink()
                    (self._links if linked else inside).append(
                        (entry.path, f"{below}{entry.name}/")
                    )
                    continue
                if not self._is_new(identity, entry.name):
                    continue
                try:
                    self._add(above + entry.name, entry.stat())
                except OSError:
                    # A link to nowhere, or in a circle; opening it will tell.
                    self._add(above + entry.name, None)
            waiting += reversed(inside)

    def _scan(self, folder: str, below: str) -> list[tuple[os.DirEntry[str], bool]]:
        """Pictures and videos in a folder, and folders to look into; counts what is neither.

        Raises:
            OSError: the folder cannot be read.
        """
        found = []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    if name.startswith(PARTIAL_PREFIX) and name.endswith(PARTIAL_SUFFIX):
                        self._listing.partial.append(Path(entry.path))
                    elif name != ".qwencli":
                        self._listing.hidden += 1
                    continue
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link in a circle; opening it will tell
                    is_folder = False
                if is_folder:
                    if self._recursive:
                        found.append((entry, True))
                    continue
                suffix = ending(name)
                if self._wanted(below, name, suffix):
                    found.append((entry, False))
                elif is_shard(name):
                    self._shards[entry.path] = suffix
                elif name not in (FAILURES, REPORT):
                    self._leave_out(suffix)
        return found

    def _leave_out(self, suffix: str) -> None:
        if suffix in self._wanted.suffixes:
            self._listing.unmatched += 1
        else:
            self._listing.others[suffix] += 1

    def _key(self, path: str) -> str:
        base = self._base
        if path.startswith(self._inside_base):
            relative = path[len(base) + 1 :]
        elif base == os.curdir and not os.path.isabs(path):
            relative = os.path.normpath(path)
        else:
            relative = os.path.relpath(path, base)
        return relative.replace(os.sep, "/")

    def _is_new(self, folder: tuple[int, int] | str, name: str) -> bool:
        """Whether a name in a folder comes for the first time. Two names of one file are two."""
        names = self._names.setdefault(folder, set())
        if name in names:
            self._listing.seen += 1
            return False
        names.add(name)
        return True

    def _add(self, key: str, status: os.stat_result | None) -> None:
        if status is None:
            item = Item(key)
        else:
            item = Item(key, status.st_size, status.st_mtime_ns)
            if not stat.S_ISREG(status.st_mode):
                refusal = InputError(
                    f"{self._listing.path(item)} is not a regular file", "leave it out"
                )
                self._listing.refused.append((item, refusal))
                return
        self._listing.items.append(item)


def _identity(folder: str) -> tuple[int, int] | str:
    """What tells a folder from others; its path, where there is none."""
    try:
        status = os.stat(folder)
    except (OSError, ValueError):
        return folder
    return status.st_dev, status.st_ino


def _split(path: str) -> tuple[str, str]:
    folder, slash, name = path.rpartition("/")
    return folder + slash, name


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
