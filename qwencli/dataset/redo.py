"""The condition of `--redo`: SQL that somebody typed, asked of a copy of a manifest."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from qwencli.errors import UsageError

# A condition that is not through after so long joins the set with itself.
_MOST_S = 20.0
_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)


def rows_meeting(db: sqlite3.Connection, condition: str) -> list[tuple[Any, ...]]:
    """Path, field, sample and place of rows of the view `entries`.

    Args:
        db: a copy; it can only be read afterwards.

    Raises:
        UsageError: SQLite does not understand it, it asks for more than the rows, or it takes too
            long.
    """
    until = time.monotonic() + _MOST_S
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
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY
