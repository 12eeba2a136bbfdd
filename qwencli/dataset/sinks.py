"""Where captions are written: text files beside the pictures.

A file is always whole: it is written under another name, brought to disk, and then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from qwencli.config import Existing
from qwencli.dataset.manifest import Manifest, PendingCaption
from qwencli.dataset.pipeline import Captioned, Failed, Outcome
from qwencli.dataset.sources import (
    PARTIAL_PREFIX,
    PARTIAL_SUFFIX,
    VIDEO_SUFFIXES,
    Slot,
    sidecar_name,
)
from qwencli.errors import OutputError, UsageError

_SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
FLUSHING_THREADS = 8
# After so many files in a row that cannot be written, the run ends: the disk is full.
MOST_UNWRITTEN = 20
_counter = itertools.count()


class Sink(Protocol):
    """A place for captions."""

    def name(self, slot: Slot) -> str: ...

    def existing(self, places: Iterable[tuple[str, Slot]]) -> set[str]:
        """Names of those places, each with its `name`, that have a caption already."""

    def read(self, slot: Slot) -> str | None: ...

    def write(self, captions: Sequence[tuple[Slot, str]]) -> list[OutputError | None]:
        """Take captions; an error for each that was not taken."""

    def flush(self, *, at_once: bool) -> list[Slot]:
        """Bring what was taken to disk; returns what is there now.

        Args:
            at_once: all of it, and not when it is time.
        """

    def close(self) -> None: ...


class Sidecars:
    """A text file for each caption, below `root`: `a/b.txt` for `a/b.jpg`.

    Another field than `CAPTION` and samples behind the first have their name before the ending:
    `a/b.tags.txt`, `a/b.2.txt`.

    Raises:
        UsageError: the ending is none, or one of pictures.
    """

    def __init__(self, root: Path, extension: str = ".txt") -> None:
        from qwencli.engine.frontend.media_files import PICTURE_SUFFIXES

        extension = extension if extension.startswith(".") else f".{extension}"
        if not extension[1:].strip(". ") or set(extension) & set("/\\\0\n"):
            raise UsageError(f"--caption-extension {extension!r} is not an ending", "such as .txt")
        if extension.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES:
            raise UsageError(
                f"--caption-extension {extension} would overwrite pictures", "use .txt or .caption"
            )
        self.root, self.extension = root, extension
        self._landed: list[Slot] = []
        # Disks bring several files to rest in the time of one.
        self._threads = ThreadPoolExecutor(FLUSHING_THREADS, thread_name_prefix="flush")

    def path(self, slot: Slot) -> Path:
        return self.root / self.name(slot)

    def name(self, slot: Slot) -> str:
        """The file's path below `root`; two slots of one name cannot both be written."""
        return sidecar_name(slot, self.extension)

    def existing(self, places: Iterable[tuple[str, Slot]]) -> set[str]:
        """Those that have a file with something in it; each folder is read once."""
        filled: dict[str, set[str]] = {}
        found = set()
        for place, _ in places:
            folder, _, name = place.rpartition("/")
            if folder not in filled:
                filled[folder] = self._filled(folder)
            if name in filled[folder]:
                found.add(place)
        return found

    def _filled(self, folder: str) -> set[str]:
        """Names of files with this ending that are not empty."""
        try:
            with os.scandir(self.root / folder) as entries:
                return {
                    entry.name
                    for entry in entries
                    if entry.name.endswith(self.extension) and _is_filled(entry)
                }
        except OSError:
            return set()

    def read(self, slot: Slot) -> str | None:
        """What the file holds, without the line end; None where there is none.

        Raises:
            OutputError: it cannot be read, or is no text.
        """
        path = self.path(slot)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}",
                "mend or remove the file",
            ) from error
        return text.rstrip("\r\n") or None

    def write(self, captions: Sequence[tuple[Slot, str]]) -> list[OutputError | None]:
        """Put captions in the place of what their files held; all of it is on disk afterwards."""
        errors = list(self._threads.map(self._write, captions))
        folders = {self.path(slot).parent for slot, _ in captions}
        list(self._threads.map(flush_folder, folders))
        self._landed += [
            slot for (slot, _), error in zip(captions, errors, strict=True) if error is None
        ]
        return errors

    def flush(self, *, at_once: bool) -> list[Slot]:
        landed, self._landed = self._landed, []
        return landed

    def _write(self, caption: tuple[Slot, str]) -> OutputError | None:
        slot, text = caption
        path = self.path(slot)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode("utf-8", "replace") + b"\n")
        except (OSError, ValueError) as error:
            return OutputError(
                f"{path} cannot be written: {getattr(error, 'strerror', None) or error}",
                "free space, change the permissions, or name another place with --output",
            )
        return None

    def close(self) -> None:
        self._threads.shutdown()


def combined(mode: Existing, before: str | None, caption: str) -> str:
    """The text to write where `before` stood."""
    if before is None or mode not in (Existing.APPEND, Existing.PREPEND):
        return caption
    first, second = (before, caption) if mode is Existing.APPEND else (caption, before)
    first = first.rstrip(", \n")
    # Sentences follow each other, and tags are a list.
    return f"{first}{' ' if first.endswith(_SENTENCE_ENDS) else ', '}{second.lstrip()}"


def partial_path(path: Path) -> Path:
    """Where to write what shall become `path`."""
    # A name of its own: that of the file may be as long as names can be.
    return path.parent / f"{PARTIAL_PREFIX}{os.getpid()}-{next(_counter)}{PARTIAL_SUFFIX}"


def is_left_behind(partial: Path) -> bool:
    """Whether the run that was to rename this file is gone."""
    number = partial.name.removeprefix(PARTIAL_PREFIX).partition("-")[0]
    # Windows removes no file that is open. In a container the next run has the same number.
    if os.name == "nt" or not number.isdecimal() or int(number) in (0, os.getpid()):
        return True
    try:
        os.kill(int(number), 0)
    except PermissionError:
        return False
    except (OSError, OverflowError):
        return True
    return False


def write_whole(path: Path, data: bytes) -> None:
    """Make `path` hold `data`: at no moment does it hold a part.

    Raises:
        OSError: nothing was changed.
    """
    partial = partial_path(path)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished file to where it goes, over a file that is there.

    Raises:
        OSError: it cannot be; or a device or a pipe is there, which the rename would remove.
    """
    # /dev/stdout is a link to what may well be a file.
    is_open_file = path.is_symlink() and path.readlink().parts[:2] == (os.sep, "proc")
    if is_open_file or (path.exists() and not path.is_file() and not path.is_dir()):
        raise FileExistsError(errno.EEXIST, "a device or a pipe is there, no file")
    partial.replace(path)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, where the system has a call for that."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _is_filled(entry: os.DirEntry[str]) -> bool:
    try:
        status = entry.stat()
    except OSError:
        return False
    return status.st_size > 0 and not stat.S_ISDIR(status.st_mode)


class CaptionWriter:
    """Keeps outcomes: captions in their files, and what is known of each in the manifest.

    Args:
        redone: slots whose captions replace what is there, whatever `existing` says.
    """

    def __init__(
        self,
        manifest: Manifest,
        sink: Sink,
        existing: Existing,
        redone: Container[Slot] = (),
    ) -> None:
        self._manifest, self._sink = manifest, sink
        self._existing, self._redone = existing, redone
        self._failed_in_a_row = 0

    def write(self, outcomes: list[Outcome], keep: Callable[[Outcome], None]) -> None:
        """Keep them; what cannot be written has failed.

        Raises:
            OutputError: the manifest takes nothing any more, or so many files in a row.
        """
        failed: list[Failed] = []

        def fail(outcome: Failed) -> None:
            # Told at once: the manifest may be on the disk that is full.
            keep(outcome)
            failed.append(outcome)

        pending: list[PendingCaption] = []
        for outcome in outcomes:
            try:
                if isinstance(outcome, Captioned):
                    pending.append(self._composed(outcome))
                else:
                    fail(outcome)
            except OutputError as error:
                fail(Failed(outcome.task, error))
        self._manifest.mark_writing(pending)
        errors = self._sink.write([(each.captioned.task.slot, each.text) for each in pending])
        for written, refused in zip(pending, errors, strict=True):
            self._failed_in_a_row = self._failed_in_a_row + 1 if refused else 0
            if refused is not None:
                fail(Failed(written.captioned.task, refused))
        self._manifest.mark_done(self._sink.flush(at_once=False), failed)
        for written, refused in zip(pending, errors, strict=True):
            if refused is None:
                keep(written.captioned)
        if self._failed_in_a_row >= MOST_UNWRITTEN:
            last = next(refused for refused in reversed(errors) if refused)
            raise OutputError(f"{last.message}, nor were {MOST_UNWRITTEN - 1} before it", last.hint)

    def _composed(self, captioned: Captioned) -> PendingCaption:
        slot = captioned.task.slot
        adds = self._existing in (Existing.APPEND, Existing.PREPEND) and slot not in self._redone
        before = None
        try:
            before = self._sink.read(slot)
        except OutputError:
            if adds:
                raise
        text = combined(self._existing, before, captioned.caption) if adds else captioned.caption
        return PendingCaption(captioned, text, before)


def recover(manifest: Manifest, sink: Sink) -> int:
    """Write what a killed run had begun to write; returns how many captions that gave.

    What stands in a file that somebody has changed since stays, and its caption is forgotten.
    """
    to_write, done, gone = [], [], []
    for each in manifest.unfinished_writes():
        try:
            now = sink.read(each.slot)
        except OutputError:
            gone.append(each.slot)
            continue
        if now == each.text.rstrip("\r\n"):
            done.append(each.slot)
        elif now == each.kept:
            to_write.append((each.slot, each.text))
        else:
            gone.append(each.slot)
    errors = sink.write(to_write)
    gone += [slot for (slot, _), error in zip(to_write, errors, strict=True) if error]
    done += sink.flush(at_once=True)
    manifest.forget(gone)
    manifest.mark_done(done)
    return len(done)
