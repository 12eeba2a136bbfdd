"""Pictures that are no files of their own: in archives, in tables, at addresses, from a pipe.

Each is found without reading it, and read whole when it is its turn; what it takes is bounded.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from qwencli import __version__
from qwencli.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from http.client import HTTPResponse

SHARD_SUFFIXES = frozenset({".tar", ".parquet"})
# A picture or video that is held whole.
MAX_PART_BYTES = 2**28
# The whole of a download, and the silence in it that is waited for.
DOWNLOAD_S, SILENCE_S = 120.0, 20.0
# What pictures of one row group of a table may take; two are held.
MAX_GROUP_BYTES = 2**31
_ADDRESS = re.compile(r"(https?):/{1,2}([^/].*)", re.IGNORECASE | re.DOTALL)


class Part(Protocol):
    """Where the bytes of a picture are. Raises InputError where they cannot be had."""

    def read(self, name: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Held:
    """What came on stdin."""

    data: bytes = field(repr=False)

    def read(self, name: str) -> bytes:
        return self.data

    def __str__(self) -> str:
        return "stdin"


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar archive that is not compressed."""

    archive: str
    offset: int
    size: int

    def read(self, name: str) -> bytes:
        _check_size(name, self.size)
        try:
            with Path(self.archive).open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise InputError(
                f"{name} cannot be read: {error.strerror}", "check the archive and its disk"
            ) from error
        if len(data) < self.size:
            raise InputError(f"{name}: the archive ends inside it", "copy or download it again")
        return data


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a Parquet file whose `column` holds the file's bytes, or a struct with them."""

    table: str
    column: str
    group: int
    row: int

    def read(self, name: str) -> bytes:
        with _GROUPS_LOCK:
            values = _row_group(self.table, self.column, self.group)
        value = values[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise InputError(f"{name} holds no picture", "leave the row out")
        _check_size(name, len(data))
        return data


@dataclass(frozen=True, slots=True)
class Address:
    """A picture of the web, by http or https."""

    url: str

    def read(self, name: str) -> bytes:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise InputError(f"{self.url} is not opened: --offline", "leave out --offline")
        import http.client
        import urllib.error

        try:
            with _open_address(self.url) as response:
                return _downloaded(response, self.url)
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
        except TimeoutError:
            reason = f"nothing came for {SILENCE_S:.0f} s"
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        raise InputError(f"{self.url}: {reason}", "check the address, or download the file")

    @property
    def key(self) -> str:
        """A path for what is at the address: the host and the path, and a digest of the query."""
        from urllib.parse import unquote, urlsplit

        parts = urlsplit(self.url)
        path = PurePosixPath(unquote(parts.path).lstrip("/") or "index")
        name = path.name
        if parts.query:
            digest = hashlib.sha256(parts.query.encode("utf-8", "surrogatepass")).hexdigest()[:8]
            name = f"{path.stem}-{digest}{path.suffix}"
        return safe_key(f"{parts.hostname}/{path.with_name(name)}")


def address_of(named: str) -> Address | None:
    """What is named, where that is an address of the web; it may have lost one of its slashes."""
    found = _ADDRESS.fullmatch(named)
    if found is None or os.path.lexists(named):
        return None
    return Address(f"{found[1].lower()}://{found[2]}")


def safe_key(name: str) -> str:
    """A path that stays below the folder it is put in, whatever an archive says."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "/".join(re.sub(r'[\0-\x1f:*?"<>|]', "_", part) for part in parts) or "_"


def members(archive: Path) -> Iterator[tuple[str, Part]]:
    """Names and places of the files in a tar archive.

    Raises:
        InputError: it is compressed, damaged or not there; what stands before the damage was given.
    """
    try:
        with tarfile.open(archive, "r:") as opened:
            for info in opened:
                if info.isreg():
                    yield info.name, Member(str(archive), info.offset_data, info.size)
                # Otherwise every header stays in memory.
                opened.members = []  # type: ignore[attr-defined]
    except tarfile.ReadError as error:
        raise InputError(
            f"{archive} is compressed, damaged or no tar archive: {error}",
            "unpack it (tar -xf) and name the folder, or download it again",
        ) from error
    except (OSError, tarfile.TarError) as error:
        raise InputError(
            f"{archive} cannot be read: {getattr(error, 'strerror', None) or error}",
            "check the path, or download it again",
        ) from error


def table_rows(table: Path) -> Iterator[tuple[str, Part]]:
    """Names and places of the pictures in a Parquet file, as Hugging Face's data sets have them.

    Raises:
        InputError: it is no Parquet file, or has no pictures.
        MissingDependencyError: pyarrow is not installed.
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
                    yield called, TableRow(str(table), column, group, row)
    except (OSError, pyarrow.ArrowException) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{table} cannot be read: {line}", "download it again") from error


def pyarrow_parquet(name: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is a Parquet file: the package pyarrow is not installed",
            "pip install 'qwencli[parquet]', or use .jsonl",
        ) from error
    return pyarrow.parquet


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
    raise InputError(
        f"{table} has no column with pictures (it has {', '.join(schema.names)})",
        "name a file whose column holds the bytes of files, such as `image`",
    )


_GROUPS_LOCK = threading.Lock()


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


def _check_size(name: str, size: int) -> None:
    if size > MAX_PART_BYTES:
        raise InputError(
            f"{name} has {size >> 20} MB, the limit is {MAX_PART_BYTES >> 20}", "leave it out"
        )


def _open_address(url: str) -> HTTPResponse:
    """Open an address, and what it redirects to; nothing but http and https."""
    import urllib.request

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(_quoted(url), headers={"User-Agent": f"qwencli/{__version__}"})
    response = opener.open(request, timeout=SILENCE_S)
    if response is None:
        raise ValueError("it leads to what is neither http nor https")
    found: HTTPResponse = response
    return found


def _quoted(url: str) -> str:
    from urllib.parse import quote

    return quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def _downloaded(response: HTTPResponse, url: str) -> bytes:
    until_s = time.monotonic() + DOWNLOAD_S
    data = bytearray()
    while piece := response.read1(2**16):
        data += piece
        _check_size(url, len(data))
        if time.monotonic() > until_s:
            raise InputError(
                f"{url} takes longer than {DOWNLOAD_S:.0f} s to download", "download the file first"
            )
    if response.length:
        raise InputError(f"{url}: the download ends early", "try --retry-failed")
    return bytes(data)
