"""A CSV file that rows are added to as they happen, and that a kill cannot spoil.

Each `append` reaches the file as a whole or not at all: a failed write is cut off again, and a
line torn by a kill is cut off when the file is next opened.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwencli.errors import BenchError, OutputError

Row = Mapping[str, Any]

# What columns were called in campaigns of earlier versions -> what they are called now.
RENAMED: Mapping[str, str] = {
    "bound": "bottleneck",
    "core_loop_us": "cpu_loop_us",
    "memory_walk_us": "pointer_chase_us",
    "watched_itl_ms": "itl_probe_on_ms",
    "bare_itl_ms": "itl_probe_off_ms",
}

# Rows in memory take fifteen times their bytes in the file, and a small one may unpack to anything.
MOST_UNPACKED_BYTES = 2**27

# What a spreadsheet would compute when it opens the file: it is kept behind an apostrophe, which
# reading takes off again. A number is none.
_FORMULA = re.compile(r"'*(?:[=@\t]|[+-](?!(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?$|$))", re.IGNORECASE)


def format_value(value: Any) -> str:
    """None is an empty field; floats keep nine decimals (ns for a time in s)."""
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(round(value, 9))
    if not isinstance(value, str):
        return str(value)
    # One record is one line: that is what makes a torn one recognisable.
    text = " ".join(str(value).splitlines())
    return f"'{text}" if _FORMULA.match(text) else text


def _encode(columns: tuple[str, ...], rows: Iterable[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        unknown = row.keys() - set(columns)
        assert not unknown, f"not a column: {unknown}"
        writer.writerow([format_value(row.get(column)) for column in columns])
    return text.getvalue().encode()


class RowFile:
    """Open for appending; a context manager.

    `repaired_lines` counts torn lines that opening has cut off (0 or 1).

    Raises:
        OutputError: the file cannot be opened or written.
        BenchError: it exists with other columns.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self.columns = columns
        self.repaired_lines = 0
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            self._prepare()
        except BaseException:
            self._file.close()
            raise

    def _prepare(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self.repaired_lines = 1
            self._file.truncate(whole)
        self._end = whole
        header = _encode(self.columns, [{column: column for column in self.columns}])
        if whole == 0:
            self._write(header)
        elif content[: content.index(b"\n") + 1] != header:
            raise _other_columns(self.path)

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and hand them to the disk before returning."""
        data = _encode(self.columns, rows)
        self._check_there()
        if data:
            self._write(data)

    def _check_there(self) -> None:
        """Raise OutputError where rows would go to a file that nobody finds again."""
        try:
            there = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError:
            there = False
        if not there:
            raise OutputError(
                f"{self.path} is gone: the folder was deleted, moved or replaced meanwhile",
                "measure again, and leave the folder alone until the campaign has ended",
            )

    def _write(self, data: bytes) -> None:
        try:
            written = self._file.write(data)
            if written != len(data):  # a full disk may take a part before it refuses
                raise OSError(28, f"only {written} of {len(data)} bytes fit")
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # the next opening cuts off what this cannot
                self._file.truncate(self._end)
            raise _cannot_write(self.path, error) from error
        self._end += len(data)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}",
        "free some space or choose another --out; rows already written are kept, --resume goes on",
    )


@dataclass(frozen=True)
class Table:
    """A CSV file as it was read: `header` is empty where there is no file; `lines` has the line of
    each row, the header's being 1; `written` the header as it stands there, before columns of
    earlier versions got the names of now."""

    path: Path
    header: tuple[str, ...]
    rows: list[dict[str, str]]
    lines: Sequence[int]
    written: tuple[str, ...] = ()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of `read_table`."""
    return read_table(path).rows


def read_table(path: Path) -> Table:
    """All whole rows as strings; a torn last line is left out. No rows when there is no file.

    A campaign that is kept may hold its larger files compressed, as NAME.csv.gz.

    Raises:
        BenchError: it cannot be read, is no UTF-8 or no CSV, or a line has not one field a column.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        if path.exists():
            content = path.read_bytes()
        elif packed.exists():
            path, content = packed, _unpacked(packed)
        else:
            return Table(path, (), [], ())
        text = content[: content.rfind(b"\n") + 1].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _broken(path, f"line {line} is not UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, getattr(error, "strerror", None) or str(error)) from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines = [], []
    header: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    try:
        for fields in reader:
            if not fields:
                continue
            if not header:
                written = tuple(fields)
                header = tuple(RENAMED.get(name, name) for name in written)
                continue
            if len(fields) != len(header):
                wrong = f"has {len(fields)} fields, not {len(header)}"
                raise _broken(path, f"line {reader.line_num} {wrong}")
            rows.append(dict(zip(header, map(_as_written, fields), strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise _broken(path, f"line {reader.line_num}: {error}") from error
    if len(set(header)) < len(header):
        raise _broken(path, "line 1 names a column twice")
    return Table(path, header, rows, lines, written)


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        content = file.read(MOST_UNPACKED_BYTES + 1)
    if len(content) > MOST_UNPACKED_BYTES:
        raise BenchError(
            f"{path} holds more than {MOST_UNPACKED_BYTES >> 20} MB of rows",
            "if you know where it comes from, unpack it: gunzip FILE",
        )
    return content


def _as_written(field: str) -> str:
    return field[1:] if field.startswith("'") and _FORMULA.match(field) else field


def _other_columns(path: Path) -> BenchError:
    return BenchError(
        f"{path} has other columns", "it was written by another version; use a new --out"
    )


def _broken(path: Path, why: str) -> BenchError:
    return BenchError(f"{path} is broken: {why}", "restore the file, or measure again")


def write_rows(path: Path, columns: tuple[str, ...], rows: Iterable[Row]) -> None:
    """Replace the file as a whole: it is the old one or the new one, never half of one."""
    replace_file(path, _encode(columns, [{c: c for c in columns}, *rows]))


def keep_rows(path: Path, columns: tuple[str, ...], wanted: Callable[[Row], bool]) -> int:
    """Drop the rows that are not wanted; returns how many. The file is rewritten only then.

    Raises:
        BenchError: it is broken, or has other columns.
    """
    table = read_table(path)
    if table.header and table.written != columns:
        raise _other_columns(path)
    rows = table.rows
    kept = [row for row in rows if wanted(row)]
    if len(kept) < len(rows):
        write_rows(path, columns, kept)
    return len(rows) - len(kept)


def replace_file(path: Path, data: bytes) -> None:
    """Write beside, then rename.

    Raises:
        OutputError: it cannot be written; the old file is untouched.
    """
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise _cannot_write(path, error) from error
