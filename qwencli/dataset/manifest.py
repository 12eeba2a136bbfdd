"""What is known of every caption of a set, on disk: where it came from, or why there is none.

An SQLite database in a folder `.qwencli`; `set_folder` says in which. A caption is `writing` before
its file is touched and `done` after the file is on disk, so a run that was killed between the two
is put right by the next one without asking a model again.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import sqlite3
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from qwencli import __version__
from qwencli.dataset.manifest_schema import (
    COLUMNS_1,
    INSERT,
    NO_PLACE,
    SetPaths,
    StoredPath,
    failed_rows,
    make_ready,
    open_to_read,
    path_text,
    rows_meeting,
    stored_path,
)
from qwencli.dataset.pipeline import Captioned, Failed
from qwencli.dataset.sources import Slot
from qwencli.errors import DatasetError, OutputError, UsageError
from qwencli.output import visible

STATE_FOLDER = ".qwencli"
# A `Slot`, and the name of its place.
KnownSlot = tuple[str, str, int, str]

_WHERE = "WHERE key = ? AND field = ? AND sample = ? AND place = ?"


class State(NamedTuple):
    """What became of a slot.

    Args:
        status: done, failed, or writing.
        job: what was asked, and how; see `job_hash`.
        size, mtime_ns: of the picture then.
        attempts: 0 of one that was refused as it was listed.
    """

    status: str
    run: int
    job: str
    size: int | None
    mtime_ns: int | None
    reason: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class PendingCaption:
    """A caption and what is to be in its file.

    Args:
        kept: what the file held, where the caption is added to it.
    """

    captioned: Captioned
    text: str
    kept: str | None = None


@dataclass(frozen=True, slots=True)
class UnfinishedWrite:
    """A caption whose file a killed run may have written, or not."""

    slot: Slot
    text: str
    kept: str | None


def job_hash(settings: Mapping[str, Any]) -> str:
    """Equal for runs that would write the same captions."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


class Manifest:
    """The database of one set. One process writes it at a time.

    Args:
        paths: of this run's captions, whose rows alone are looked at where nothing else is said.
        look_only: a copy in memory; nothing is written. The file need not be there.

    Raises:
        DatasetError: the file is damaged, of a newer version, or something else.
        OutputError: it cannot be written.
    """

    def __init__(
        self, path: Path, paths: SetPaths | None = None, *, look_only: bool = False
    ) -> None:
        self._paths = paths or SetPaths()
        self.path = path
        self._run = 0
        # One thread writes captions while another hears what more runs.
        self._lock = threading.RLock()
        with self._failing():
            # The thread that writes is not the one that reads before and after.
            self._db = sqlite3.connect(
                ":memory:" if look_only else path, check_same_thread=False, isolation_level=None
            )
            try:
                if look_only and path.is_file():
                    with open_to_read(path) as db:
                        db.backup(self._db)
                make_ready(self._db, self.path, self._paths)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        self._db.close()

    @property
    def folder(self) -> Path:
        """The one that paths in it begin at."""
        return self.path.parent.parent

    def states(self) -> dict[KnownSlot, State]:
        """What became of this run's slots, and of others whose paths begin as theirs."""
        pictures, captions = self._paths.pictures, self._paths.captions
        with self._failing():
            jobs = dict(self._db.execute("SELECT id, job FROM runs"))
            rows = self._db.execute(
                "SELECT key, field, sample, place, status, run, size, mtime_ns, reason, attempts "
                "FROM captions"
            )
            found = {}
            for key, field, sample, place, status, run, *rest in rows:
                if type(key) is not str:
                    key = path_text(key)
                if type(place) is not str:
                    place = path_text(place)
                if key.startswith(pictures) and place.startswith(captions):
                    slot = key[len(pictures) :], field, sample, place[len(captions) :]
                    found[slot] = State(status, run, jobs.get(run, ""), *rest)
        return found

    def unfinished_writes(self) -> list[UnfinishedWrite]:
        with self._failing():
            rows = self._db.execute(
                "SELECT key, field, sample, place, coalesce(written, caption), kept "
                "FROM captions WHERE status = 'writing'"
            )
            return [
                UnfinishedWrite(Slot(key, field, sample), text, kept)
                for key, field, sample, text, kept in self._own(rows)
            ]

    def unfinished_run(self, job: str) -> int | None:
        """The newest run of this job, where it was stopped or killed."""
        with self._failing():
            found = self._db.execute(
                "SELECT id, outcome FROM runs WHERE job = ? ORDER BY id DESC LIMIT 1", (job,)
            ).fetchone()
        return found[0] if found and found[1] != "complete" else None

    def begin(self, job: str, settings: Mapping[str, Any], going_on: int | None) -> None:
        """A run that begins, or one that goes on; what is kept from now on is of this run."""
        with self._transaction():
            if going_on is not None:
                self._run = going_on
                self._db.execute("UPDATE runs SET outcome = NULL WHERE id = ?", (going_on,))
                return
            cursor = self._db.execute(
                "INSERT INTO runs (job, started, version, settings) VALUES (?, ?, ?, ?)",
                (job, _now(), __version__, json.dumps(settings, default=str)),
            )
            assert cursor.lastrowid is not None, "a row was inserted"
            self._run = cursor.lastrowid

    def loaded(self, facts: Mapping[str, str | None]) -> None:
        """What really runs: columns of `runs` and their values."""
        places = ", ".join(f"{name} = ?" for name in facts)
        with self._transaction():
            self._db.execute(
                f"UPDATE runs SET {places} WHERE id = ?",
                (*facts.values(), self._run),
            )

    def end(self, outcome: str) -> None:
        with self._transaction():
            self._db.execute(
                "UPDATE runs SET ended = ?, outcome = ? WHERE id = ?", (_now(), outcome, self._run)
            )

    def mark_writing(self, captions: Sequence[PendingCaption], status: str = "writing") -> None:
        """Note captions before their files are touched; on disk when this returns."""
        if not captions:
            return
        now = _now()
        asked = {each.captioned.prompt for each in captions}
        prompts = {_digest(prompt): visible(prompt, several_lines=True) for prompt in asked}
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO prompts VALUES (?, ?)", prompts.items())
            # Of a picture that is gone, or it would not be written there.
            self._db.executemany(
                "DELETE FROM captions WHERE place = ?4 AND status != 'failed' "
                "AND NOT (key = ?1 AND field = ?2 AND sample = ?3)",
                [self._stored(each.captioned.task.slot) for each in captions],
            )
            self._db.executemany(INSERT, [self._row(each, status, now) for each in captions])

    def mark_done(
        self, done: Iterable[Slot], failed: Sequence[Failed] = (), refused: Sequence[Failed] = ()
    ) -> None:
        """Captions whose files are on disk, and what has none and why; `refused` was not tried."""
        now = _now()
        with self._transaction():
            self._db.executemany(
                f"UPDATE captions SET status = 'done' {_WHERE}",
                [self._stored(slot) for slot in done],
            )
            rows = [self._failure(each, now, each.task.attempt + 1) for each in failed]
            rows += [self._failure(each, now, 0) for each in refused]
            self._db.executemany(INSERT, rows)

    def forget(self, slots: Iterable[Slot]) -> None:
        with self._transaction():
            self._db.executemany(
                f"DELETE FROM captions {_WHERE}",
                [self._stored(slot) for slot in slots],
            )

    def captions(self) -> Iterator[tuple[Slot, str]]:
        """What is done, and its text, in the order of keys."""
        with self._failing():
            rows = self._db.execute(
                "SELECT key, field, sample, place, coalesce(written, caption) FROM captions "
                "WHERE status = 'done' ORDER BY key, field, sample"
            )
            for key, field, sample, text in self._own(rows):
                yield Slot(key, field, sample), text

    def owners(self) -> dict[str, str]:
        """Whose the captions are that are done, by the names of their places in this run: paths of
        pictures that are there, from the manifest's folder."""
        before, folder = self._paths.captions, self.folder
        with self._failing():
            rows = self._db.execute(
                "SELECT place, key, in_part FROM captions WHERE status != 'failed'"
            )
            found = {path_text(place): (path_text(key), in_part) for place, key, in_part in rows}
        return {
            place[len(before) :]: key
            for place, (key, in_part) in found.items()
            if place.startswith(before) and (in_part or os.path.lexists(folder / key))
        }

    def forget_gone(self, listed: Container[str]) -> None:
        """Forget failures of earlier runs whose picture is neither there nor `listed`, by its key
        in this run."""
        folder, pictures = self.folder, self._paths.pictures
        with self._transaction():
            rows = self._db.execute(
                "SELECT key, field, sample, place FROM captions "
                "WHERE status = 'failed' AND run != ? AND NOT in_part",
                (self._run,),
            ).fetchall()
            gone = [
                row
                for row in rows
                if not os.path.lexists(folder / path_text(row[0]))
                and path_text(row[0]).removeprefix(pictures) not in listed
            ]
            self._db.executemany(f"DELETE FROM captions {_WHERE}", gone)

    def failures(self) -> list[dict[str, Any]]:
        """What failed, as the rows of failures.jsonl. Paths are from the folder that captions go
        to; of pictures of this run from their own, where this is the manifest's."""
        paths = self._paths
        with self._failing():
            return failed_rows(self._db, "" if paths.captions else paths.pictures)

    def take_over(self, other: Path, below: str, *, from_above: bool = False) -> None:
        """Copy what the manifest of a folder in this one knows, and this one not or from before.

        Args:
            below: the path of its folder from this one's, with a slash behind it.
            from_above: it is the other way round: of a manifest above, what is in this folder.
        """
        columns = (*COLUMNS_1, "place", "in_part")
        new_runs: dict[int, int | None] = {}
        with (
            closing(Manifest(other, SetPaths(name=self._paths.name), look_only=True)) as inner,
            self._transaction(),
        ):
            prompts = inner._db.execute("SELECT * FROM prompts")
            self._db.executemany("INSERT OR IGNORE INTO prompts VALUES (?, ?)", prompts)
            for row in inner._db.execute(f"SELECT {', '.join(columns)} FROM captions"):
                known = dict(zip(columns, row, strict=True))
                paths = {name: path_text(known[name]) for name in ("key", "place")}
                if from_above and not all(path.startswith(below) for path in paths.values()):
                    continue
                for name, path in paths.items():
                    if path != NO_PLACE:
                        path = path[len(below) :] if from_above else below + path
                        known[name] = stored_path(posixpath.normpath(path))
                slot = [known[name] for name in ("key", "field", "sample", "place")]
                here = self._db.execute(f"SELECT time FROM captions {_WHERE}", slot).fetchone()
                if here is not None and here[0] >= known["time"]:
                    continue
                run = known["run"]
                if run not in new_runs:
                    new_runs[run] = self._copy_run(inner, run)
                known["run"] = new_runs[run]
                self._db.execute(INSERT, tuple(known.values()))

    def _copy_run(self, other: Manifest, run: int) -> int | None:
        found = other._db.execute("SELECT * FROM runs WHERE id = ?", (run,)).fetchone()
        if found is None:
            return 0
        row = found[1:]
        marks = ", ".join("?" * len(row))
        return self._db.execute(f"INSERT INTO runs VALUES (NULL, {marks})", row).lastrowid

    def matching(self, condition: str) -> set[Slot]:
        """The slots whose row of the view `entries` meets a condition, which can change nothing.

        Raises:
            UsageError: SQLite does not understand it, it asks for more than the rows, or it takes
                too long.
        """
        with closing(sqlite3.connect(":memory:")) as db:
            with self._failing():
                self._db.backup(db)
            rows = rows_meeting(db, condition)
        try:
            return {Slot(*row) for row in self._own(rows)}
        except (TypeError, ValueError) as error:
            raise UsageError(f"--redo: {condition!r} is not a condition", "see the docs") from error

    def _row(self, written: PendingCaption, status: str, now: str) -> tuple[Any, ...]:
        captioned = written.captioned
        task, result = captioned.task, captioned.result
        text = None if written.text == captioned.caption else written.text
        *key, place = self._stored(task.slot)
        return (
            *key, status, captioned.caption, text, written.kept, None, None,
            task.item.size, task.item.mtime_ns, self._run, now, _digest(captioned.prompt),
            captioned.seed, task.attempt + 1, result.finish_reason, result.num_prompt_tokens,
            result.num_image_tokens, result.num_new_tokens, result.timings.e2e_s,
            place, task.item.part is not None,
        )  # fmt: skip

    def _failure(self, failed: Failed, now: str, attempts: int) -> tuple[Any, ...]:
        task, error = failed.task, failed.error
        *key, place = self._stored(task.slot)
        return (
            *key, "failed", None, None, None, visible(error.message),
            visible(error.hint),
            task.item.size, task.item.mtime_ns, self._run, now, None, None, attempts,
            *[None] * 5, place, task.item.part is not None,
        )  # fmt: skip

    def _stored(self, slot: Slot) -> tuple[StoredPath, str, int, StoredPath]:
        key, place = self._paths.pictures + slot.key, self._paths.place(slot)
        return stored_path(key), slot.field, slot.sample, stored_path(place)

    def _own(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Those of this run's captions, with their keys as it has them."""
        below, place_of = self._paths.pictures, self._paths.place
        for key, field, sample, place, *rest in rows:
            if type(key) is not str:
                key = path_text(key)
            if not key.startswith(below):
                continue
            key = key[len(below) :]
            # A manifest that came with a data set may say anything: nothing outside is written.
            if key.startswith(("../", "/")) or "/../" in key:
                continue
            if place_of(Slot(key, field, sample)) == path_text(place):
                yield key, field, sample, *rest

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._failing():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
                raise DatasetError(
                    f"{self.path} is a database of something else: {error}", "move it away"
                ) from error
            raise OutputError(
                f"{self.path} cannot be written: {error}",
                "free space, change the permissions, or name another place with --output",
            ) from error
        except sqlite3.Error as error:
            raise DatasetError(
                f"{self.path} is damaged: {error}",
                "move it away; captions that are there are kept, as --existing says",
            ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
