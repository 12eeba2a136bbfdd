"""A captioned set as it lies on disk, whoever captioned it.

The text of a caption is what a trainer would read: that of the file beside the picture, else of
`metadata.jsonl`, else what the manifest has. Where a caption came from, and what failed, is known
from the manifest of `qwencli caption`, else from `failures.jsonl`.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwencli.dataset.manifest import STATE_FOLDER
from qwencli.dataset.manifest_schema import (
    SetPaths,
    StoredPath,
    make_ready,
    open_to_read,
    path_text,
)
from qwencli.dataset.report.survey import Entry
from qwencli.dataset.set_folder import (
    inner_sets,
    manifest_folder,
    manifest_name,
)
from qwencli.dataset.sinks import Sidecars
from qwencli.dataset.sources import (
    CAPTION,
    FAILURES,
    Item,
    Listing,
    Selection,
    Slot,
    list_inputs,
    natural_key,
)
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
    """The pictures below a folder and their captions, or those whose captions `--output` brought
    there; pictures themselves are not opened.

    Raises:
        InputError: the folder is not there or cannot be read.
        DatasetError: its manifest is damaged.
        UsageError: the ending is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "name the folder of the pictures")
    listing = list_inputs([str(folder)], Selection(recursive=True))
    if not listing.items and not listing.refused:
        return _read_output(folder, caption_extension)
    sidecars = Sidecars(listing.base, caption_extension)
    known, owners = _known(listing, sidecars)
    metadata = _metadata(folder / METADATA)
    failures = _failures(folder / FAILURES) if not known else {}
    listed = {item.key for item in listing.items}
    try:
        entries = []
        for item in listing.items:
            entry = known.get(item.key, Entry(item.key))
            if item.key in failures:
                entry = replace(entry, failure=failures[item.key])
            try:
                slot = Slot(item.key)
                # A file that another picture has its caption in is not this one's.
                owner = owners.get(sidecars.name(slot), slot).key
                is_own = owner == item.key or owner not in listed
                text = (sidecars.read(slot) if is_own else None) or metadata.get(item.key)
            except OutputError as error:
                entries.append(replace(entry, caption=None, failure=error.message))
                continue
            entries.append(entry if text is None else _with_text(entry, text))
    finally:
        sidecars.close()
    entries += [
        Entry(item.key, failure=error.message, unreadable=error.message)
        for item, error in listing.refused
    ]
    return listing, entries


def _read_output(folder: Path, caption_extension: str) -> tuple[Listing, list[Entry]]:
    """The captions in a folder without pictures, of those that its manifest names."""
    sidecars = Sidecars(folder, caption_extension)
    sidecars.close()
    here, name = Path(os.path.realpath(folder)), manifest_name(sidecars.extension)
    path = manifest_folder(here, name) / STATE_FOLDER / name
    files: dict[str, Slot] = {}
    known = _manifest(path, here, lambda file, _: not file.startswith("../"), files)
    # Of pictures that are gone, and of those in archives, there is nothing to show.
    entries = {key: entry for key, entry in known.items() if (here / key).is_file()}
    for file, slot in files.items():
        if slot.key in entries and slot == Slot(slot.key):
            with suppress(OSError, ValueError):
                text = (here / file).read_text(encoding="utf-8-sig")
                entries[slot.key] = _with_text(entries[slot.key], text)
    keys = sorted(entries, key=natural_key)
    return Listing(here, [Item(key) for key in keys]), [entries[key] for key in keys]


def _with_text(entry: Entry, text: str) -> Entry:
    """With the caption that a file has now."""
    facts = dict(entry.facts)
    if entry.caption is not None and text.strip() != entry.caption.strip():
        facts["edited"] = f"was: {entry.caption}"
    # What somebody has captioned since is no failure any more.
    return replace(entry, caption=text.strip(), failure=None, facts=facts)


def _known(listing: Listing, sidecars: Sidecars) -> tuple[dict[str, Entry], dict[str, Slot]]:
    """What manifests know of pictures: that of the caption files first, then of other outputs; and
    whose the caption files are, by their names."""
    name = manifest_name(sidecars.extension)
    folder = Path(os.path.realpath(listing.base))
    root = manifest_folder(folder, name)
    of_files = [root, *inner_sets(listing, folder, name)]
    paths = [each / STATE_FOLDER / name for each in of_files]
    for each in dict.fromkeys((folder, root)):
        others = (each / STATE_FOLDER).glob("*.sqlite")
        paths += sorted(path for path in others if path.name != name)
    known: dict[str, Entry] = {}
    owners: dict[str, Slot] = {}

    def is_beside(file: str, slot: Slot) -> bool:
        return file == sidecars.name(slot)  # or it went to another folder, with --output

    for path in paths:
        beside = is_beside if path.name == name else None
        for key, entry in _manifest(path, folder, beside, owners).items():
            known.setdefault(key, entry)
    return known, owners


def _manifest(
    path: Path,
    folder: Path,
    is_meant: Callable[[str, Slot], bool] | None,
    owners: dict[str, Slot],
) -> dict[str, Entry]:
    """What a manifest knows, by paths from `folder`.

    Args:
        is_meant: where it is the manifest of caption files: whether one of these, by its path, is.
        owners: gets whose the caption files are.
    """
    if not path.is_file():
        return {}
    found: dict[str, Entry] = {}
    base = path.parent.parent

    def from_here(stored: StoredPath) -> str:
        text = path_text(stored)
        if base == folder:
            return text
        return os.path.relpath(f"{base}/{text}", folder).replace(os.sep, "/")

    try:
        for stored, field, sample, place, status, caption, reason, *facts in _rows(path):
            key = from_here(stored)
            if is_meant is not None:
                file, slot = from_here(place), Slot(key, field, sample)
                if status == "done":
                    owners.setdefault(file, slot)
                if not is_meant(file, slot):
                    continue
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
    except (sqlite3.Error, OutputError) as error:
        raise DatasetError(
            f"{path} cannot be read: {error}", "move it away; the caption files are read then"
        ) from error
    return found


def _rows(path: Path) -> list[tuple[Any, ...]]:
    """Those of a manifest of any version."""
    with closing(sqlite3.connect(":memory:")) as db:
        with open_to_read(path) as there:
            there.backup(db)
        make_ready(db, path, SetPaths())
        return db.execute(
            "SELECT c.key, c.field, c.sample, c.place, c.status, coalesce(c.written, c.caption), "
            f"c.reason, {', '.join(_FACTS)} FROM captions c LEFT JOIN runs r ON r.id = c.run "
            "LEFT JOIN prompts p ON p.hash = c.prompt_hash"
        ).fetchall()


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
