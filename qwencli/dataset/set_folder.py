"""Which folder has the manifest of a set, for one run at a time.

It is the nearest folder from the captions upwards whose `.qwencli` has one, as git finds its own;
where none has, the captions' folder itself. A manifest met further down, of a set captioned before,
is taken over. So a folder and those in it have one manifest and one lock, whichever came first.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.dataset.caption_tables import FORMATS, Table
from qwencli.dataset.manifest import STATE_FOLDER, Manifest
from qwencli.dataset.manifest_schema import SetPaths, failed_rows, open_to_read
from qwencli.dataset.named_inputs import without_inner_dots
from qwencli.dataset.sinks import Sidecars, Sink, write_whole
from qwencli.dataset.sources import FAILURES, PARTIAL_PREFIX, PARTIAL_SUFFIX, Listing
from qwencli.errors import DatasetError, OutputError, UsageError
from qwencli.folder_lock import FolderLock

MANIFEST = "manifest.sqlite"
_HELD = "wait for it to end, or stop it; the same command goes on then"


@dataclass(frozen=True)
class OutputPlace:
    """Where captions go.

    Args:
        folder: of the caption files, or of the one file.
        manifest: the name of the database that knows them.
        suffix: of the files that captions are written to.
    """

    folder: Path
    sink: Sink
    manifest: str
    suffix: str

    @property
    def is_one_file(self) -> bool:
        return isinstance(self.sink, Table)


def output_place(listing: Listing, output: Path | None, extension: str) -> OutputPlace:
    """Where captions go: to `output`, a table or a folder, or beside the pictures.

    Raises:
        UsageError: the pictures have no place beside them.
    """
    if output is not None:
        output = without_inner_dots(output)
    if output is None or os.path.isdir(output) or not output.suffix:
        if output is None and any(item.part for item in listing.items):
            raise UsageError(
                "captions of archives, tables and addresses have no place of their own",
                "name one with --output, such as --output captions.jsonl or --output captions",
            )
        sidecars = Sidecars(output or listing.base, extension)
        return OutputPlace(
            sidecars.root, sidecars, manifest_name(sidecars.extension), sidecars.extension
        )
    above = folder_below(output.parent, listing.base)
    table = Table(output, lambda key: above + key)
    return OutputPlace(output.parent, table, f"{output.name}.sqlite", output.suffix.lower())


def manifest_name(extension: str) -> str:
    """The manifest of caption files with this ending."""
    return MANIFEST if extension == ".txt" else f"{extension[1:]}.sqlite"


def folder_below(root: Path, folder: Path) -> str:
    """The path of a folder from `root` on, with a slash behind it; empty where it is that one."""
    here, there = Path(os.path.abspath(root)), Path(os.path.abspath(folder))
    if not there.is_relative_to(here):
        # What `..` means, only the file system knows.
        here, there = Path(os.path.realpath(here)), Path(os.path.realpath(there))
    try:
        path = os.path.relpath(there, here)
    except ValueError:  # on another drive
        path = str(there)
    return "" if path == os.curdir else path.replace(os.sep, "/") + "/"


def manifest_folder(folder: Path, name: str) -> Path:
    """The nearest folder, from this one upwards, that has a manifest of this name; itself where
    none has.

    Args:
        folder: without symbolic links.
    """
    has_one = _is_file(folder / STATE_FOLDER / name)
    return folder if has_one else _folder_above(folder, name) or folder


def _folder_above(folder: Path, name: str) -> Path | None:
    for each in folder.parents:
        state = each / STATE_FOLDER
        if _is_file(state / name) and _is_trusted(state, folder):
            return each
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that nobody may look into
        return False


def _is_trusted(state: Path, folder: Path) -> bool:
    """Whether a `.qwencli` above may say where captions of a folder go: in a place such as /tmp
    anybody may make one."""
    owners = {os.geteuid()} if hasattr(os, "geteuid") else set()
    with suppress(OSError):
        owners.add(folder.stat().st_uid)
    try:
        return state.stat().st_uid in owners
    except OSError:
        return False


@contextmanager
def open_manifest(
    listing: Listing, place: OutputPlace, *, look_only: bool = False
) -> Iterator[Manifest]:
    """The manifest of a set, which no other run has meanwhile; closed at the end.

    Args:
        look_only: a copy, in which the sets in this one are known too; nothing is changed.

    Raises:
        DatasetError, OutputError: the manifest is another run's, damaged or not writable.
    """
    folder, name = Path(os.path.realpath(place.folder)), place.manifest
    root = folder
    if not place.is_one_file:
        root = manifest_folder(folder, name)
    state = root / STATE_FOLDER
    paths = SetPaths(
        folder_below(root, Path(os.path.realpath(listing.base))),
        folder_below(root, folder),
        place.sink.name,
    )
    with ExitStack() as stack:
        if not look_only:
            _make(state)
            stack.callback(FolderLock(state, DatasetError, _HELD, "--output").release)
        is_new = not (state / name).exists()
        manifest = Manifest(state / name, paths, look_only=look_only)
        stack.callback(manifest.close)
        if place.is_one_file:
            yield manifest
            return
        # Looked for once more, now that others find this one: of two runs one sees the other.
        above = _folder_above(root, name) if is_new and not look_only else None
        if above is not None:
            manifest.close()
            _remove(state / name)
            raise DatasetError(f"another run has just begun in {above}", _HELD)
        if not look_only:
            _begin_linked_sets(listing, folder, name)
        for inner in inner_sets(listing, folder, name):
            is_ours, below = not look_only and _hold(stack, inner), folder_below(root, inner)
            manifest.take_over(inner / STATE_FOLDER / name, below)
            if is_ours and Path(os.path.realpath(inner)) == inner:
                _remove(inner / STATE_FOLDER / name)
                write_failures(inner)
            elif is_ours:
                stack.callback(_hand_back, manifest, inner / STATE_FOLDER / name, below)
        yield manifest


def _begin_linked_sets(listing: Listing, folder: Path, name: str) -> None:
    """Have a set in each folder that is reached through a link, where there is none. The way from
    there upwards does not lead here, so a run there could not know what this one does."""
    for each in _folders(listing) - {""}:
        if (folder / each).is_symlink():
            with suppress(OutputError):  # nothing can be written there, captions neither
                _make(folder / each / STATE_FOLDER)
                Manifest(folder / each / STATE_FOLDER / name).close()


def _hand_back(manifest: Manifest, inner: Path, below: str) -> None:
    """Tell the set of a linked folder what is known of it here."""
    with suppress(OutputError), closing(Manifest(inner)) as own:
        own.take_over(manifest.path, below, from_above=True)


def _hold(stack: ExitStack, inner: Path) -> bool:
    """Have no other run write to the set of a folder; False where nobody can.

    Raises:
        DatasetError: one does.
    """
    try:
        lock = FolderLock(inner / STATE_FOLDER, DatasetError, _HELD, "--output")
    except OutputError:  # read-only, or another user's: what is in it is known all the same
        return False
    stack.callback(lock.release)
    return True


def inner_sets(listing: Listing, folder: Path, name: str) -> list[Path]:
    """Folders of captions below `folder` that have a manifest of their own."""
    found = (folder / each for each in sorted(_folders(listing) - {""}))
    return [each for each in found if _is_file(each / STATE_FOLDER / name)]


def partials(listing: Listing, place: OutputPlace) -> list[Path]:
    """What runs were writing, in the folders that captions go to."""
    if os.path.abspath(place.folder) == os.path.abspath(listing.base) and not place.is_one_file:
        return listing.partial
    folders = {""} if place.is_one_file else _folders(listing) | {""}
    return [
        path
        for each in folders
        for path in (place.folder / each).glob(f"{PARTIAL_PREFIX}*{PARTIAL_SUFFIX}")
    ]


def _folders(listing: Listing) -> set[str]:
    """Those that have items, and those above them, from the listing's own."""
    below = {item.key.rpartition("/")[0] for item in listing.items}
    for each in list(below):
        while each := each.rpartition("/")[0]:
            if each in below:
                break
            below.add(each)
    return below


def _make(state: Path) -> None:
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if state.exists():
            raise OutputError(
                f"{state} is a file, and the folder of a manifest is to be there",
                "move it away, or name a folder for the captions with --output",
            ) from error
        raise OutputError(
            f"{state.parent} cannot be written: {error.strerror}",
            "change its permissions, or name a folder for the captions with --output",
        ) from error


def _remove(manifest: Path) -> None:
    try:
        # The database first: without what waits in the file beside it, it may be no database. What
        # is left beside none is nothing.
        for ending in ("", "-wal", "-shm"):
            Path(f"{manifest}{ending}").unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{manifest} cannot be removed: {error.strerror}", "change the folder's permissions"
        ) from error


def write_failures(root: Path, manifest: Manifest | None = None) -> Path | None:
    """Bring `failures.jsonl` of a folder up to date, from all its manifests; its path, where there
    is something in it.

    Args:
        manifest: the one that is open; its rows are first.

    Raises:
        OutputError: it cannot be written.
    """
    path, rows = root / FAILURES, []
    if manifest is not None:
        rows = [{**row, "output": _output(manifest.path)} for row in manifest.failures()]
    for other in sorted((root / STATE_FOLDER).glob("*.sqlite")):
        if manifest is None or other != manifest.path:
            rows += [{**row, "output": _output(other)} for row in _failures_of(other)]
    try:
        if rows:
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            return path
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}", "free space, or mend its permissions"
        ) from error
    return None


def _failures_of(path: Path) -> Iterable[Mapping[str, Any]]:
    """Those that another output of the same folder has; none where they cannot be read."""
    with (
        suppress(sqlite3.Error),
        open_to_read(path) as db,
    ):
        return failed_rows(db)
    return ()


def _output(manifest: Path) -> str:
    """The captions that a manifest is of: `.txt`, or the name of a table."""
    name = manifest.name.removesuffix(".sqlite")
    if manifest.name == MANIFEST:
        return ".txt"
    return name if Path(name).suffix in FORMATS else f".{name}"
