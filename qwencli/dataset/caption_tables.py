"""One file with the captions of a whole set: JSON lines, CSV, Parquet, or kohya's JSON.

The file is made anew, whole, now and then and at the end; what it does not hold yet is in the
manifest. Rows and columns that others have put there stay.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from qwencli.dataset.shards import pyarrow_parquet
from qwencli.dataset.sinks import flush_folder, partial_path, put_in_place
from qwencli.dataset.sources import CAPTION, Slot
from qwencli.errors import InputError, OutputError, UsageError
from qwencli.output import visible

# The columns of Hugging Face's imagefolder (metadata.jsonl, metadata.csv, metadata.parquet).
FILE_NAME, TEXT = "file_name", "text"
# The file is brought up to date so often, but writing it takes no more than this share of the time.
_EVERY_S, _SHARE = 20.0, 0.05
_ROWS = 4096
Row = dict[str, Any]
# A type of the file's kind for each name; None = text.
Columns = Mapping[str, Any]
Reader = Callable[[Path], contextlib.AbstractContextManager[tuple[Columns, Iterator[Row]]]]
# What readers of such files raise where a file is not what its name says.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error)


class Table:
    """A file of captions, a row a picture; its name's ending says which kind.

    Args:
        file_name: how a key is written in it: the picture's path from the file's own folder.

    Raises:
        UsageError: the ending is none of `FORMATS`.
        MissingDependencyError: the package that writes such files is not installed.
    """

    def __init__(self, path: Path, file_name: Callable[[str], str]) -> None:
        if path.suffix.lower() not in FORMATS:
            raise UsageError(
                f"--output {path} is no kind of file that is written",
                f"end it in {', '.join(FORMATS)}; a folder takes a text file for each picture",
            )
        if path.suffix.lower() == ".parquet":
            pyarrow_parquet(f"--output {path}")
        self.path, self._path_of = path, file_name
        self._is_json = path.suffix.lower() in (".jsonl", ".json")
        self._read, self._write = FORMATS[path.suffix.lower()]
        # Captions that the file held when this run began, and those that it does not hold yet.
        self._before: dict[Slot, str] = {}
        self._pending: dict[Slot, str] = {}
        self._flushed_s, self._took_s = time.monotonic(), 0.0

    def _file_name(self, key: str) -> str:
        """As the file has it, and as it is read from there again."""
        name = self._path_of(key)
        return name if self._is_json else _plain(name)

    def name(self, slot: Slot) -> str:
        return f"{self._file_name(slot.key)} ({column(slot)})"

    def existing(self, places: Iterable[tuple[str, Slot]]) -> set[str]:
        """Those that the file has a caption for.

        Raises:
            InputError: there is such a file, and it cannot be read.
        """
        by_name: dict[str, list[Slot]] = {}
        for _, slot in places:
            by_name.setdefault(self._file_name(slot.key), []).append(slot)
        with self._reading() as (_, rows):
            for row in rows:
                for slot in by_name.get(str(row[FILE_NAME]), ()):
                    text = row.get(column(slot))
                    if isinstance(text, str) and text:
                        self._before[slot] = text
        return set(map(self.name, self._before))

    def read(self, slot: Slot) -> str | None:
        return self._before.get(slot)

    def write(self, captions: Sequence[tuple[Slot, str]]) -> list[OutputError | None]:
        """Take captions for the next time that the file is written."""
        self._pending.update(captions)
        return [None] * len(captions)

    def flush(self, *, at_once: bool) -> list[Slot]:
        """Make the file hold everything; returns the captions that are in it now and were not.

        Args:
            at_once: now, and not when it is time again.

        Raises:
            InputError, OutputError: it cannot be read or written; what it held stays.
        """
        wait_s = max(_EVERY_S, self._took_s / _SHARE)
        if not self._pending or not (at_once or time.monotonic() - self._flushed_s > wait_s):
            return []
        started_s = time.monotonic()
        partial = partial_path(self.path)
        new: dict[str, Row] = {}
        for slot, text in self._pending.items():
            new.setdefault(self._file_name(slot.key), {})[column(slot)] = text
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._reading() as (columns, rows):
                added = dict.fromkeys(name for row in new.values() for name in row)
                self._write(partial, {**columns, **added}, _merged(rows, new))
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            put_in_place(partial, self.path)
            flush_folder(self.path.parent)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror or error}",
                "free space, change the permissions, or name another place with --output; no "
                "caption is lost, the same command writes them",
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._flushed_s = time.monotonic()
        self._took_s = self._flushed_s - started_s
        landed = list(self._pending)
        self._pending.clear()
        return landed

    def close(self) -> None: ...

    @contextlib.contextmanager
    def _reading(self) -> Iterator[tuple[Columns, Iterator[Row]]]:
        try:
            if not self.path.exists():
                yield dict.fromkeys((FILE_NAME, TEXT)), iter(())
                return
            with self._read(self.path) as (columns, rows):
                yield columns, rows
        except _UNREADABLE as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{self.path} is there and cannot be read: {line}",
                "mend or move it, or name another file with --output",
            ) from error


def column(slot: Slot) -> str:
    """The column of a caption: `text`, `tags`, `text_2` for a second sample.

    Raises:
        UsageError: it is the column of the picture's path.
    """
    if slot.field == FILE_NAME:
        raise UsageError(f"--field {FILE_NAME} is the column of paths", "name it otherwise")
    name = TEXT if slot.field == CAPTION else slot.field
    return f"{name}_{slot.sample + 1}" if slot.sample else name


def _merged(rows: Iterable[Row], new: dict[str, Row]) -> Iterator[Row]:
    """The rows with what is new of their pictures; then those of pictures that had none."""
    left = dict(new)
    for row in rows:
        yield row | left.pop(str(row[FILE_NAME]), {})
    for name, captions in left.items():
        yield {FILE_NAME: name, **captions}


@contextlib.contextmanager
def _read_jsonl(path: Path) -> Iterator[tuple[Columns, Iterator[Row]]]:
    def rows(file: TextIO) -> Iterator[Row]:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error
                if not isinstance(row, dict) or FILE_NAME not in row:
                    raise ValueError(f"line {number} is not an object with a {FILE_NAME}")
                yield row

    with path.open(encoding="utf-8-sig") as file:
        yield {}, rows(file)


def _write_jsonl(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    with _text_file(path) as file:
        file.writelines(_json(row) + "\n" for row in rows)


@contextlib.contextmanager
def _read_csv(path: Path) -> Iterator[tuple[Columns, Iterator[Row]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        names = list(reader.fieldnames or ())
        if FILE_NAME not in names:
            raise ValueError(f"it has no column {FILE_NAME}")
        yield dict.fromkeys(names), iter(reader)


def _write_csv(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    with _text_file(path) as file:
        # A field is quoted for the characters that end lines: for "\r" too, though none ends in it.
        line = io.StringIO(newline="")
        writer = csv.DictWriter(line, columns, restval="", lineterminator="\r\n")

        def take_line() -> str:
            text = line.getvalue().removesuffix("\r\n") + "\n"
            line.seek(0)
            line.truncate()
            return text

        writer.writeheader()
        file.write(take_line())
        for row in rows:
            if "" in row:
                raise ValueError("a line has more fields than the first")
            writer.writerow({name: _plain(value) for name, value in row.items()})
            file.write(take_line())


@contextlib.contextmanager
def _read_parquet(path: Path) -> Iterator[tuple[Columns, Iterator[Row]]]:
    with pyarrow_parquet(str(path)).ParquetFile(path) as file:
        columns = {column.name: column.type for column in file.schema_arrow}
        if FILE_NAME not in columns:
            raise ValueError(f"it has no column {FILE_NAME}")
        yield columns, (row for batch in file.iter_batches(_ROWS) for row in batch.to_pylist())


def _write_parquet(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    parquet = pyarrow_parquet(str(path))
    import pyarrow

    schema = pyarrow.schema([(name, kind or pyarrow.string()) for name, kind in columns.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        rows = iter(rows)
        while some := list(itertools.islice(rows, _ROWS)):
            plain = [
                {
                    name: row.get(name) if kind else _as_text(row.get(name))
                    for name, kind in columns.items()
                }
                for row in some
            ]
            writer.write_table(pyarrow.Table.from_pylist(plain, schema))


@contextlib.contextmanager
def _read_kohya(path: Path) -> Iterator[tuple[Columns, Iterator[Row]]]:
    """`{"a.png": {"caption": ..., "tags": ...}}`; a bare string is a caption."""
    held = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(held, dict):
        raise ValueError("it is not a JSON object with a picture's path as each key")

    def rows() -> Iterator[Row]:
        for name, about in held.items():
            about = {CAPTION: about} if isinstance(about, str) else dict(about)
            yield {FILE_NAME: name, **_renamed(about, CAPTION, TEXT)}

    yield {}, rows()


def _write_kohya(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    with _text_file(path) as file:
        start = "{\n"
        for row in rows:
            about = _renamed(row, TEXT, CAPTION)
            file.write(f"{start}{_json(str(about.pop(FILE_NAME)))}: {_json(about)}")
            start = ",\n"
        file.write("\n}\n")


def _renamed(row: Row, old: str, new: str) -> Row:
    return {
        new + key.removeprefix(old) if re.fullmatch(rf"{old}(_\d+)?", key) else key: value
        for key, value in row.items()
    }


# An ending -> what reads and what writes such a file.
FORMATS: Mapping[str, tuple[Reader, Callable[[Path, Columns, Iterable[Row]], None]]] = {
    ".jsonl": (_read_jsonl, _write_jsonl),
    ".csv": (_read_csv, _write_csv),
    ".parquet": (_read_parquet, _write_parquet),
    ".json": (_read_kohya, _write_kohya),
}


def _plain(value: Any) -> Any:
    """Text without what no file of text can hold: bytes of names that are no UTF-8."""
    if isinstance(value, str) and not value.isascii():
        return visible(value, several_lines=True) if _has_surrogates(value) else value
    return value


def _as_text(value: Any) -> str | None:
    return value if value is None else _plain(value if isinstance(value, str) else _json(value))


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if _has_surrogates(text) else text


def _text_file(path: Path) -> TextIO:
    return io.TextIOWrapper(path.open("xb"), encoding="utf-8", newline="")
