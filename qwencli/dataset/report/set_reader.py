"""A captioned set as it lies on disk, whoever captioned it.

The text of a caption is what a trainer would read: that of the file beside the picture, else of
`metadata.jsonl`, else what the manifest has. Where a caption came from, and what failed, is known
from the manifest of `qwencli caption`, else from `failures.jsonl`.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwencli.dataset.manifest import STATE_FOLDER
from qwencli.dataset.report.survey import Entry
from qwencli.dataset.set_folder import FAILURES, MANIFEST
from qwencli.dataset.sinks import Sidecars
from qwencli.dataset.sources import CAPTION, Listing, Selection, Slot, list_inputs
from qwencli.errors import DatasetError, InputError, OutputError

METADATA = "metadata.jsonl"
# Columns of the manifest that a reader of the sheet wants to know, by the names shown.
_FACTS = {
    "r.model": "model", "r.revision": "revision", "r.quantization": "quantization",
    "p.text": "prompt", "c.seed": "seed", "c.finish_reason": "finish_reason",
    "c.num_new_tokens": "tokens", "c.attempts": "attempts", "c.time": "time",
    "r.version": "qwencli",
}  # fmt: skip


def read_set(folder: Path, caption_extension: str) -> tuple[Listing, list[Entry]]:
    """The pictures below a folder and their captions; pictures themselves are not opened.

    Raises:
        InputError: the folder is not there or cannot be read.
        DatasetError: its manifest is damaged.
        UsageError: the ending is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "name the folder of the pictures")
    listing = list_inputs([str(folder)], Selection(recursive=True))
    known = _manifests(folder / STATE_FOLDER)
    metadata = _metadata(folder / METADATA)
    failures = _failures(folder / FAILURES) if not known else {}
    sidecars = Sidecars(listing.base, caption_extension)
    try:
        entries = []
        for item in listing.items:
            entry = known.get(item.key, Entry(item.key))
            if item.key in failures:
                entry = replace(entry, failure=failures[item.key])
            try:
                text = sidecars.read(Slot(item.key)) or metadata.get(item.key)
            except OutputError as error:
                entries.append(replace(entry, caption=None, failure=error.message))
                continue
            if text is not None:
                facts = dict(entry.facts)
                if entry.caption is not None and text.strip() != entry.caption.strip():
                    facts["edited"] = f"was: {entry.caption}"
                # What somebody has captioned since is no failure any more.
                entry = replace(entry, caption=text.strip(), failure=None, facts=facts)
            entries.append(entry)
    finally:
        sidecars.close()
    entries += [
        Entry(item.key, failure=error.message, unreadable=error.message)
        for item, error in listing.refused
    ]
    return listing, entries


def _manifests(folder: Path) -> dict[str, Entry]:
    """What the manifests of a set know: that of text files first, then of other outputs."""
    known: dict[str, Entry] = {}
    others = sorted(path for path in folder.glob("*.sqlite") if path.name != MANIFEST)
    for path in (folder / MANIFEST, *others):
        known = {**_manifest(path), **known}
    return known


def _manifest(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        return {}
    found: dict[str, Entry] = {}
    try:
        for key, field, sample, status, caption, reason, *facts in _rows(path):
            entry = found.get(key, Entry(key))
            if (field, sample) != (CAPTION, 0):
                name = f"{field} {sample + 1}" if sample else field
                text = caption if status == "done" else f"failed: {reason}"
                entry = replace(entry, others={**entry.others, name: text})
            elif status == "done":
                told = zip(_FACTS.values(), facts, strict=True)
                said = {name: value for name, value in told if value is not None}
                entry = replace(entry, caption=caption, facts=said)
            elif status == "failed":
                entry = replace(entry, failure=reason or "failed")
            found[key] = entry
    except sqlite3.Error as error:
        raise DatasetError(
            f"{path} cannot be read: {error}", "move it away; the caption files are read then"
        ) from error
    return found


def _rows(path: Path) -> Iterator[tuple[Any, ...]]:
    address = path.absolute().as_uri()
    try:
        yield from _selected(f"{address}?mode=ro")
    except sqlite3.OperationalError:
        # A folder that cannot be written: SQLite has no place there for what readers share.
        yield from _selected(f"{address}?immutable=1")


def _selected(address: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(address, uri=True)) as db:
        rows = db.execute(
            "SELECT c.key, c.field, c.sample, c.status, coalesce(c.written, c.caption), c.reason, "
            f"{', '.join(_FACTS)} FROM captions c LEFT JOIN runs r ON r.id = c.run "
            "LEFT JOIN prompts p ON p.hash = c.prompt_hash"
        ).fetchall()
    return [(os.fsdecode(key), *rest) for key, *rest in rows]


def _metadata(path: Path) -> dict[str, str]:
    """Captions of Hugging Face's imagefolder: `file_name`, and `text` or `caption`."""
    found = {}
    for row in _json_lines(path):
        name, text = row.get("file_name"), row.get("text", row.get("caption"))
        if isinstance(name, str) and isinstance(text, str) and text.strip():
            found[name] = text
    return found


def _failures(path: Path) -> dict[str, str]:
    return {
        str(row["path"]): str(row.get("reason") or "failed")
        for row in _json_lines(path)
        if "path" in row and row.get("field", CAPTION) == CAPTION
    }


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSONL file; lines that are none are passed over: others wrote them."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError:
        return
