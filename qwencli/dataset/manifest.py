"""What is known of every caption of a set, on disk: where it came from, or why there is none.

An SQLite database in the folder `.qwencli` beside the captions. A caption is `writing` before its
file is touched and `done` after the file is on disk, so a run that was killed between the two is
put right by the next one without asking a model again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from qwencli import __version__
from qwencli.dataset.pipeline import Captioned, Failed
from qwencli.dataset.sources import Slot
from qwencli.errors import DatasetError, OutputError, UsageError
from qwencli.output import visible

STATE_FOLDER = ".qwencli"
VERSION = 1
# A condition of --redo that is not through after so long joins the set with itself.
_REDO_S = 20.0
_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
# Keys with bytes that are no UTF-8 are stored as bytes.
StoredKey = str | bytes

_SCHEMA = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, job TEXT NOT NULL, started TEXT NOT NULL, ended TEXT, outcome TEXT,
    version TEXT NOT NULL, settings TEXT NOT NULL, model TEXT, revision TEXT, engine TEXT,
    quantization TEXT, attention TEXT, cache TEXT, kernels TEXT, device TEXT, dtype TEXT
);
CREATE TABLE prompts (hash TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE captions (
    key NOT NULL, field TEXT NOT NULL, sample INTEGER NOT NULL, status TEXT NOT NULL,
    caption TEXT, written TEXT, kept TEXT, reason TEXT, hint TEXT, size INTEGER, mtime_ns INTEGER,
    run INTEGER NOT NULL, time TEXT NOT NULL, prompt_hash TEXT, seed INTEGER, attempts INTEGER,
    finish_reason TEXT, num_prompt_tokens INTEGER, num_image_tokens INTEGER,
    num_new_tokens INTEGER, e2e_s REAL, PRIMARY KEY (key, field, sample)
) WITHOUT ROWID;
CREATE VIEW entries AS SELECT
    c.key AS path, c.field, c.sample, c.status, c.caption, length(c.caption) AS characters,
    c.reason, c.size, c.mtime_ns, c.time, c.seed, c.attempts, c.finish_reason,
    c.num_prompt_tokens, c.num_image_tokens, c.num_new_tokens, c.num_new_tokens AS tokens, c.e2e_s,
    c.prompt_hash, p.text AS prompt, r.id AS run, r.version, r.settings, r.model, r.revision,
    r.engine, r.quantization, r.attention, r.cache, r.kernels, r.device, r.dtype
FROM captions c LEFT JOIN runs r ON r.id = c.run LEFT JOIN prompts p ON p.hash = c.prompt_hash;
"""
_INSERT = """INSERT OR REPLACE INTO captions (
    key, field, sample, status, caption, written, kept, reason, hint, size, mtime_ns, run, time,
    prompt_hash, seed, attempts, finish_reason, num_prompt_tokens, num_image_tokens,
    num_new_tokens, e2e_s
) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"""


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
        below: what stands in front of this run's keys here: the folder of its pictures, from the
            one that captions go to. Pictures of several folders may have captions in one place;
            only those of this one are looked at.

    Raises:
        DatasetError: the file is damaged, or of a newer version.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, below: str = "") -> None:
        self._below = below
        self.path = path
        self._run = 0
        # One thread writes captions while another hears what more runs.
        self._lock = threading.RLock()
        with self._failing():
            # The thread that writes is not the one that reads before and after.
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            # What a file holds and the manifest does not know must not come back after a power cut.
            self._db.execute("PRAGMA synchronous = FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                self._db.close()
                raise DatasetError(
                    f"{path} was written by a newer qwencli", "update qwencli, or move the file"
                )
            if version == 0:
                with self._transaction():
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    def states(self) -> dict[Slot, State]:
        with self._failing():
            jobs = dict(self._db.execute("SELECT id, job FROM runs"))
            rows = self._db.execute(
                "SELECT key, field, sample, status, run, size, mtime_ns, reason, attempts "
                "FROM captions"
            )
            return {
                Slot(key, field, sample): State(status, run, jobs.get(run, ""), *rest)
                for key, field, sample, status, run, *rest in self._own(rows)
            }

    def unfinished_writes(self) -> list[UnfinishedWrite]:
        with self._failing():
            rows = self._db.execute(
                "SELECT key, field, sample, coalesce(written, caption), kept "
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
            self._db.executemany(_INSERT, [self._row(each, status, now) for each in captions])

    def mark_done(
        self, done: Iterable[Slot], failed: Sequence[Failed] = (), refused: Sequence[Failed] = ()
    ) -> None:
        """Captions whose files are on disk, and what has none and why; `refused` was not tried."""
        now = _now()
        with self._transaction():
            self._db.executemany(
                "UPDATE captions SET status = 'done' WHERE key = ? AND field = ? AND sample = ?",
                [self._stored(slot) for slot in done],
            )
            rows = [self._failure(each, now, each.task.attempt + 1) for each in failed]
            rows += [self._failure(each, now, 0) for each in refused]
            self._db.executemany(_INSERT, rows)

    def forget(self, slots: Iterable[Slot]) -> None:
        with self._transaction():
            self._db.executemany(
                "DELETE FROM captions WHERE key = ? AND field = ? AND sample = ?",
                [self._stored(slot) for slot in slots],
            )

    def captions(self) -> Iterator[tuple[Slot, str]]:
        """What is done, and its text, in the order of keys."""
        with self._failing():
            rows = self._db.execute(
                "SELECT key, field, sample, coalesce(written, caption) FROM captions "
                "WHERE status = 'done' ORDER BY key, field, sample"
            )
            for key, field, sample, text in self._own(rows):
                yield Slot(key, field, sample), text

    def failures(self) -> Iterator[dict[str, Any]]:
        """What failed, as the rows of failures.jsonl. Pictures of other folders, whose captions go
        to the same place, have paths from there on."""
        with self._failing():
            for key, *rest in self._db.execute(
                "SELECT key, field, sample, reason, hint, time, attempts FROM captions "
                "WHERE status = 'failed' ORDER BY key, field, sample"
            ):
                names = ("field", "sample", "reason", "hint", "time", "attempts")
                path = _key(key).removeprefix(self._below)
                yield {"path": path, **dict(zip(names, rest, strict=True))}

    def matching(self, condition: str) -> set[Slot]:
        """The slots whose row of the view `entries` meets a condition, which can change nothing.

        Raises:
            UsageError: SQLite does not understand it, it asks for more than the rows, or it takes
                too long.
        """
        until = time.monotonic() + _REDO_S
        address = self.path.absolute().as_uri() + "?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as db:
            columns = [row[1] for row in db.execute("PRAGMA table_info(entries)")]
            db.set_authorizer(_only_read)
            db.set_progress_handler(lambda: time.monotonic() > until, 100_000)
            try:
                # On lines of its own: a comment in it ends there.
                rows = db.execute(
                    f"SELECT path, field, sample FROM entries WHERE (\n{condition}\n)"
                ).fetchall()
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                raise UsageError(
                    f"--redo: {condition!r} is not a condition: {error}",
                    f"as in SQL, of these: {', '.join(columns)}; "
                    "for example: --redo \"finish_reason = 'length'\"",
                ) from error
        try:
            return {Slot(*row) for row in self._own(rows)}
        except (TypeError, ValueError) as error:
            raise UsageError(f"--redo: {condition!r} is not a condition", "see the docs") from error

    def _row(self, written: PendingCaption, status: str, now: str) -> tuple[Any, ...]:
        captioned = written.captioned
        task, result = captioned.task, captioned.result
        text = None if written.text == captioned.caption else written.text
        return (
            *(self._stored(task.slot)), status, captioned.caption, text, written.kept, None, None,
            task.item.size, task.item.mtime_ns, self._run, now, _digest(captioned.prompt),
            captioned.seed, task.attempt + 1, result.finish_reason, result.num_prompt_tokens,
            result.num_image_tokens, result.num_new_tokens, result.timings.e2e_s,
        )  # fmt: skip

    def _failure(self, failed: Failed, now: str, attempts: int) -> tuple[Any, ...]:
        task, error = failed.task, failed.error
        return (
            *(self._stored(task.slot)), "failed", None, None, None, visible(error.message),
            visible(error.hint),
            task.item.size, task.item.mtime_ns, self._run, now, None, None, attempts,
            *[None] * 5,
        )  # fmt: skip

    def _stored(self, slot: Slot) -> tuple[StoredKey, str, int]:
        key = self._below + slot.key
        try:
            key.encode()
        except UnicodeEncodeError:
            return os.fsencode(key), slot.field, slot.sample
        return key, slot.field, slot.sample

    def _own(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Those of this run's folder, with their keys as it has them."""
        below = self._below
        for key, *rest in rows:
            if type(key) is not str:
                key = _key(key)
            if not below or key.startswith(below):
                yield key[len(below) :], *rest

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
            raise OutputError(
                f"{self.path} cannot be written: {error}",
                "free space, change the permissions, or name another place with --output",
            ) from error
        except sqlite3.Error as error:
            raise DatasetError(
                f"{self.path} is damaged: {error}",
                "move it away; captions that are there are kept, as --existing says",
            ) from error


def _only_read(action: int, *about: str | None) -> int:
    """SQLite's authorizer: reading the tables, and its own harmless functions."""
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


def _key(stored: StoredKey) -> str:
    return stored if isinstance(stored, str) else os.fsdecode(stored)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
