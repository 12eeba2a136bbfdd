"""The database of a manifest: its tables, how paths are stored in it, older versions of it, and the
condition of `--redo`, which is SQL that somebody typed and is asked of a copy of it."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.dataset.sources import Slot, sidecar_name
from qwencli.errors import DatasetError, UsageError

VERSION = 2
# Paths with bytes that are no UTF-8 are stored as bytes.
StoredPath = str | bytes

_SCHEMA = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, job TEXT NOT NULL, started TEXT NOT NULL, ended TEXT, outcome TEXT,
    version TEXT NOT NULL, settings TEXT NOT NULL, model TEXT, revision TEXT, engine TEXT,
    quantization TEXT, attention TEXT, cache TEXT, kernels TEXT, device TEXT, dtype TEXT
);
CREATE TABLE prompts (hash TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE captions (
    place NOT NULL, key NOT NULL, field TEXT NOT NULL, sample INTEGER NOT NULL,
    status TEXT NOT NULL,
    caption TEXT, written TEXT, kept TEXT, reason TEXT, hint TEXT, size INTEGER, mtime_ns INTEGER,
    run INTEGER NOT NULL, time TEXT NOT NULL, prompt_hash TEXT, seed INTEGER, attempts INTEGER,
    finish_reason TEXT, num_prompt_tokens INTEGER, num_image_tokens INTEGER,
    num_new_tokens INTEGER, e2e_s REAL, in_part INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (place, key, field, sample)
) WITHOUT ROWID;
CREATE VIEW entries AS SELECT
    c.key AS path, c.place, c.field, c.sample, c.status, c.caption, length(c.caption) AS characters,
    c.reason, c.size, c.mtime_ns, c.time, c.seed, c.attempts, c.finish_reason,
    c.num_prompt_tokens, c.num_image_tokens, c.num_new_tokens, c.num_new_tokens AS tokens, c.e2e_s,
    c.prompt_hash, p.text AS prompt, r.id AS run, r.version, r.settings, r.model, r.revision,
    r.engine, r.quantization, r.attention, r.cache, r.kernels, r.device, r.dtype
FROM captions c LEFT JOIN runs r ON r.id = c.run LEFT JOIN prompts p ON p.hash = c.prompt_hash;
"""
INSERT = """INSERT OR REPLACE INTO captions (
    key, field, sample, status, caption, written, kept, reason, hint, size, mtime_ns, run, time,
    prompt_hash, seed, attempts, finish_reason, num_prompt_tokens, num_image_tokens,
    num_new_tokens, e2e_s, place, in_part
) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"""
# Of captions of version 1, which knew no places, until a run on their pictures tells it.
NO_PLACE = ""
# Columns of a caption in version 1.
COLUMNS_1 = (
    "key", "field", "sample", "status", "caption", "written", "kept", "reason", "hint", "size",
    "mtime_ns", "run", "time", "prompt_hash", "seed", "attempts", "finish_reason",
    "num_prompt_tokens", "num_image_tokens", "num_new_tokens", "e2e_s",
)  # fmt: skip

# A condition that is not through after so long joins the set with itself.
_MOST_CONDITION_S = 20.0
_READING_ACTIONS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)


@dataclass(frozen=True)
class SetPaths:
    """How a run's pictures and captions are called in its manifest: by their paths from the folder
    that has it.

    Args:
        pictures, captions: what stands there in front of the run's keys, and of its places.
        name: the place of a slot, as the sink calls it.
    """

    pictures: str = ""
    captions: str = ""
    name: Callable[[Slot], str] = sidecar_name

    def place(self, slot: Slot) -> str:
        return self.captions + self.name(slot)


def make_ready(db: sqlite3.Connection, path: Path, paths: SetPaths) -> None:
    """Have a database that was just opened be a manifest of this version.

    Args:
        path: of it, for messages.
        paths: of the run that opens it.

    Raises:
        DatasetError: it is of a newer version.
        sqlite3.Error: it is none.
    """
    db.execute("PRAGMA journal_mode = WAL")
    # What a file holds and the manifest does not know must not come back after a power cut.
    db.execute("PRAGMA synchronous = FULL")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise DatasetError(
            f"{path} was written by a newer qwencli", "update qwencli, or move the file"
        )
    if version == VERSION:
        _place_rows(db, paths)
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        rows = []
        if version == 1:
            rows = db.execute(f"SELECT {', '.join(COLUMNS_1)} FROM captions").fetchall()
            db.execute("DROP VIEW entries")
            db.execute("DROP TABLE captions")
        for statement in _SCHEMA.split(";\n"):
            if version == 0 or "captions" in statement:
                db.execute(statement)
        db.executemany(INSERT, ((*row, NO_PLACE, 0) for row in rows))
        _place_rows(db, paths)
        db.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _place_rows(db: sqlite3.Connection, paths: SetPaths) -> None:
    """Give the captions of version 1 their places. A run knows those of its own pictures alone:
    those of another folder wait for a run on that."""
    found = db.execute(
        "SELECT key, field, sample FROM captions WHERE place = ?", (NO_PLACE,)
    ).fetchall()
    placed = []
    for stored, field, sample in found:
        key = path_text(stored)
        own = key.removeprefix(paths.pictures)
        if key.startswith(paths.pictures) and not own.startswith(("../", "/")):
            place = stored_path(paths.place(Slot(own, field, sample)))
            placed.append((place, stored, field, sample, NO_PLACE))
    if placed:
        db.executemany(
            "UPDATE OR IGNORE captions SET place = ? "
            "WHERE key = ? AND field = ? AND sample = ? AND place = ?",
            placed,
        )


def failed_rows(db: sqlite3.Connection, below: str = "") -> list[dict[str, Any]]:
    """The failures of a manifest, whichever version it is.

    Args:
        below: left out of paths that begin so.
    """
    names = ("path", "field", "sample", "reason", "hint", "time", "attempts")
    rows = db.execute(
        "SELECT key, field, sample, reason, hint, time, attempts FROM captions "
        "WHERE status = 'failed' ORDER BY key, field, sample"
    )
    return [
        dict(zip(names, (path_text(key).removeprefix(below), *rest), strict=True))
        for key, *rest in rows
    ]


@contextmanager
def open_to_read(path: Path) -> Iterator[sqlite3.Connection]:
    """A manifest, which may be written meanwhile. Nothing is left beside it."""
    # Readers of a file that is being written share another beside it. Where nobody writes, it
    # would stay; and in a folder that cannot be written there is no place for it.
    shared = os.path.lexists(f"{path}-wal") and os.access(path.parent, os.W_OK)
    address = f"{path.absolute().as_uri()}?{'mode=ro' if shared else 'immutable=1'}"
    with closing(sqlite3.connect(address, uri=True)) as db:
        yield db


def path_text(stored: StoredPath) -> str:
    return stored if isinstance(stored, str) else os.fsdecode(stored)


def stored_path(text: str) -> StoredPath:
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text)
    return text


def rows_meeting(db: sqlite3.Connection, condition: str) -> list[tuple[Any, ...]]:
    """Path, field, sample and place of rows of the view `entries`.

    Args:
        db: a copy; it can only be read afterwards.

    Raises:
        UsageError: SQLite does not understand it, it asks for more than the rows, or it takes too
            long.
    """
    until = time.monotonic() + _MOST_CONDITION_S
    columns = [row[1] for row in db.execute("PRAGMA table_info(entries)")]
    db.set_authorizer(_only_read)
    db.set_progress_handler(lambda: time.monotonic() > until, 100_000)
    try:
        # On lines of its own: a comment in it ends there.
        return db.execute(
            f"SELECT path, field, sample, place FROM entries WHERE (\n{condition}\n)"
        ).fetchall()
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        raise UsageError(
            f"--redo: {condition!r} is not a condition: {error}",
            f"as in SQL, of these: {', '.join(columns)}; "
            "for example: --redo \"finish_reason = 'length'\"",
        ) from error


def _only_read(action: int, *about: str | None) -> int:
    """SQLite's authorizer: reading the tables, and its own harmless functions."""
    return sqlite3.SQLITE_OK if action in _READING_ACTIONS else sqlite3.SQLITE_DENY
