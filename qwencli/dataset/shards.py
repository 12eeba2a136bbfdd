"""Pictures in the shards of data sets: tar archives and Parquet tables.

Each is found without reading it, and read whole when it is its turn.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import lzma
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from qwencli.dataset.named_inputs import Part, check_size
from qwencli.engine.machine.packages import require
from qwencli.errors import InputError

# How compressed archives begin, and the module of the standard library that reads them.
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "lzma",
    b"\x28\xb5\x2f\xfd": "compression.zstd",
}


# Pictures hardly become smaller. What grows more than this is made to fill a disk.
_MOST_GROWTH, _SMALL_BYTES = 20, 2**30
# Files beside a picture in an archive that may be hints.
_HINT_SUFFIXES = (".json", ".txt", ".caption")
# What pictures of one row group of a table may take; two are held.
MAX_GROUP_BYTES = 2**31


class NoPicturesError(InputError):
    """A table of something else, or an archive of it."""


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """A file in a tar archive.

    Args:
        offset: in the archive, where that is compressed in what it unpacks to.
        hints: (ending, offset, size) of files of the same name.
    """

    archive: str
    offset: int
    size: int
    hints: tuple[tuple[str, int, int], ...] = ()

    def read(self, name: str) -> bytes:
        check_size(name, self.size)
        return self._bytes(name, self.offset, self.size)

    def beside(self, extension: str) -> bytes | None:
        for ending, offset, size in self.hints:
            if ending == extension:
                check_size(f"{self.archive}: {extension}", size)
                return self._bytes(f"{self.archive}: {extension}", offset, size)
        return None

    def _bytes(self, name: str, offset: int, size: int) -> bytes:
        try:
            with _plain_archive(self.archive) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise InputError(
                f"{name} cannot be read: {error.strerror or error}",
                "check the archive and its disk",
            ) from error
        if len(data) < size:
            raise InputError(f"{name}: the archive ends inside it", "copy or download it again")
        return data


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """A row of a Parquet file whose `column` holds the file's bytes, or a struct with them."""

    table: str
    column: str
    group: int
    row: int

    def beside(self, extension: str) -> bytes | None:
        if extension != ".json":
            return None
        with _GROUPS_LOCK:
            rows = _row_group_hints(self.table, self.column, self.group)
        return json.dumps(rows[self.row], default=str).encode() if rows else None

    def read(self, name: str) -> bytes:
        with _GROUPS_LOCK:
            values = _row_group(self.table, self.column, self.group)
        value = values[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise InputError(f"{name} holds no picture", "leave the row out")
        check_size(name, len(data))
        return data


def members(archive: Path) -> Iterator[tuple[str, Part]]:
    """Names and places of the files in a tar archive, which may be compressed.

    Those that may be hints of another one are told to that one as well.

    Raises:
        InputError: it is damaged or not there; what stands before the damage was given.
    """
    import tarfile

    found: list[tuple[str, int, int]] = []
    failure: InputError | None = None
    try:
        with _plain_archive(str(archive)) as file, tarfile.open(fileobj=file, mode="r:") as opened:
            for info in opened:
                if info.isreg():
                    found.append((info.name, info.offset_data, info.size))
                # Otherwise every header stays in memory.
                opened.members = []  # type: ignore[attr-defined]
    except tarfile.ReadError as error:
        failure = InputError(
            f"{archive} is damaged or no tar archive: {error}", "download it again"
        )
    except (OSError, EOFError, tarfile.TarError) as error:
        failure = InputError(
            f"{archive} cannot be read: {getattr(error, 'strerror', None) or error}",
            "check the path, or download it again",
        )
    hints: dict[str, list[tuple[str, int, int]]] = {}
    for name, offset, size in found:
        stem, dot, ending = name.rpartition(".")
        if dot + ending.lower() in _HINT_SUFFIXES:
            hints.setdefault(stem, []).append((dot + ending.lower(), offset, size))
    for name, offset, size in found:
        beside = tuple(hints.get(name.rpartition(".")[0], ()))
        yield name, ArchiveMember(str(archive), offset, size, beside)
    if failure is not None:
        raise failure


@contextmanager
def _plain_archive(archive: str) -> Iterator[BinaryIO]:
    """A tar archive as a file that is not compressed; one user of it at a time.

    Raises:
        OSError: it cannot be read, or there is no room to unpack it.
        InputError: this Python does not unpack it.
    """
    with Path(archive).open("rb") as packed:
        begins = packed.read(6)
        module = next((m for magic, m in _COMPRESSIONS.items() if begins.startswith(magic)), None)
        if module is None:
            packed.seek(0)
            yield packed
            return
        status = os.fstat(packed.fileno())
    with _UNPACKING:
        unpacked = _unpacked(archive, module, status.st_mtime_ns, status.st_size)
        unpacked.file.seek(0)
        yield unpacked.file


_UNPACKING = threading.Lock()


class _Unpacked:
    """A file without a name, closed when nobody holds this any more, at the latest at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def __del__(self) -> None:
        self.file.close()


@functools.lru_cache(maxsize=2)
def _unpacked(archive: str, module: str, mtime_ns: int, size: int) -> _Unpacked:
    """What an archive unpacks to."""
    import tempfile

    try:
        opener = importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{archive} is compressed in a way that Python reads from 3.14 on",
            "unpack it: zstd -d, and name the .tar",
        ) from error
    # Not a plain file everywhere: Windows wraps it.
    plain = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - closed below, or when dropped
    try:
        most = max(_SMALL_BYTES, size * _MOST_GROWTH)
        with opener.open(archive, "rb") as packed:
            while piece := _piece(packed):
                plain.write(piece)
                if plain.tell() > most:
                    raise InputError(
                        f"{archive} unpacks to more than {most >> 20} MB", "unpack it yourself"
                    )
        plain.flush()
    except BaseException:
        plain.close()
        raise
    return _Unpacked(plain)


def _piece(packed: io.BufferedIOBase) -> bytes:
    """The next piece; nothing behind a damage: that is told like the end of a cut archive."""
    try:
        return packed.read1(2**17)
    except (EOFError, OSError, zlib.error, lzma.LZMAError):
        return b""


def table_rows(table: Path) -> Iterator[tuple[str, Part]]:
    """Names and places of the pictures in a Parquet file, as Hugging Face's data sets have them.

    Raises:
        InputError: it is no Parquet file, or has no pictures.
        MissingDependencyError: pyarrow is not installed, or is too old.
    """
    parquet = pyarrow_parquet(f"{table}")
    import pyarrow

    try:
        with parquet.ParquetFile(table) as file:
            column, has_paths = _picture_column(file.schema_arrow, table)
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                names = [None] * count
                if has_paths:
                    read = file.read_row_group(group, columns=[f"{column}.path"])
                    names = [value and value.get("path") for value in read[column].to_pylist()]
                for row, name in enumerate(names):
                    number = f"{group:04d}-{row:06d}"
                    called = f"{number}-{PurePosixPath(name).name}" if name else f"{number}.img"
                    yield called, ParquetRow(str(table), column, group, row)
    except (OSError, pyarrow.ArrowException) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{table} cannot be read: {line}", "download it again") from error


def pyarrow_parquet(name: str) -> Any:
    return require(
        "pyarrow.parquet",
        f"{name} is a Parquet file",
        "pip install 'qwencli[parquet]'",
        "use .jsonl",
    )


def _picture_column(schema: Any, table: Path) -> tuple[str, bool]:
    """The column with pictures, and whether it has their paths too."""
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    for wanted in ("image", "img", "picture", None):
        for column in schema:
            if wanted is not None and column.name != wanted:
                continue
            if holds_bytes(column.type):
                return column.name, False
            if pyarrow.types.is_struct(column.type):
                inside = {part.name: part.type for part in column.type}
                if "bytes" in inside and holds_bytes(inside["bytes"]):
                    return column.name, "path" in inside
    raise NoPicturesError(
        f"{table} has no column with pictures (it has {', '.join(schema.names)})",
        "name a file whose column holds the bytes of files, such as `image`",
    )


_GROUPS_LOCK = threading.Lock()


@functools.lru_cache(maxsize=2)
def _row_group_hints(table: str, column: str, group: int) -> list[dict[str, Any]]:
    """What a row group has beside the pictures, a row each."""
    parquet = pyarrow_parquet(table)
    import pyarrow

    try:
        with parquet.ParquetFile(table) as file:
            names = [name for name in file.schema_arrow.names if name != column]
            if not names:
                return []
            rows: list[dict[str, Any]] = file.read_row_group(group, columns=names).to_pylist()
            return rows
    except (OSError, pyarrow.ArrowException) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{table} cannot be read: {line}", "download it again") from error


@functools.lru_cache(maxsize=2)
def _row_group(table: str, column: str, group: int) -> Any:
    parquet = pyarrow_parquet(table)
    import pyarrow

    try:
        with parquet.ParquetFile(table) as file:
            size = file.metadata.row_group(group).total_byte_size
            if size > MAX_GROUP_BYTES:
                raise InputError(
                    f"{table}: a row group of {size / 1e9:.1f} GB", "write it with smaller groups"
                )
            return file.read_row_group(group, columns=[column])[column]
    except (OSError, pyarrow.ArrowException) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{table} cannot be read: {line}", "download it again") from error
