"""What was named on the command line, in lists and on stdin: paths, addresses, pictures.

A picture that is no file of its own (from a pipe, at an address; in an archive or a table, see
`shards`) is a `Part`: found without reading it, and read whole when it is its turn. What it takes
is bounded.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Protocol

from qwencli import __version__
from qwencli.errors import InputError, system_words

if TYPE_CHECKING:
    from http.client import HTTPResponse

# A picture or video that is held whole.
MAX_PART_BYTES = 2**28
# The whole of a download, and the silence in it that is waited for.
DOWNLOAD_S, SILENCE_S = 120.0, 20.0
# Names of archives with pictures.
_ARCHIVE = re.compile(r"\.tar(\.(gz|bz2|xz|zst))?$|\.t(gz|bz2|xz|zst)$", re.IGNORECASE)
_ADDRESS = re.compile(r"(https?):/{1,2}([^/].*)", re.IGNORECASE | re.DOTALL)


class Part(Protocol):
    """Where the bytes of a picture are. Raises InputError where they cannot be had."""

    def read(self, name: str) -> bytes: ...

    def beside(self, extension: str) -> bytes | None:
        """What lies there under the picture's name with another ending; None where nothing does."""


@dataclass(frozen=True, slots=True)
class StdinPart:
    """What came on stdin."""

    data: bytes = field(repr=False)

    def read(self, name: str) -> bytes:
        return self.data

    def beside(self, extension: str) -> None:
        return None

    def __str__(self) -> str:
        return "stdin"


@dataclass(frozen=True, slots=True)
class UrlPart:
    """A picture of the web, by http or https."""

    url: str

    def beside(self, extension: str) -> None:
        return None

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
        except OSError as error:
            reason = system_words(error)
        except (http.client.HTTPException, ValueError) as error:
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


def url_part(named: str) -> UrlPart | None:
    """What is named, where that is an address of the web; it may have lost one of its slashes."""
    found = _ADDRESS.fullmatch(named)
    if found is None or os.path.lexists(named):
        return None
    return UrlPart(f"{found[1].lower()}://{found[2]}")


def safe_key(name: str) -> str:
    """A path that stays below the folder it is put in, whatever an archive says."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "/".join(re.sub(r'[\0-\x1f:*?"<>|]', "_", part) for part in parts) or "_"


def check_size(name: str, size: int) -> None:
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
        check_size(url, len(data))
        if time.monotonic() > until_s:
            raise InputError(
                f"{url} takes longer than {DOWNLOAD_S:.0f} s to download", "download the file first"
            )
    if response.length:
        raise InputError(f"{url}: the download ends early", "try --retry-failed")
    return bytes(data)


def is_shard(name: str) -> bool:
    """Whether a file with this name holds pictures of a data set."""
    return is_table(name) or _ARCHIVE.search(name) is not None


def is_table(name: str) -> bool:
    return name.lower().endswith(".parquet")


def read_stdin() -> bytes:
    """All of stdin, which must have an end within `MAX_PART_BYTES`.

    Raises:
        InputError: it has none, or cannot be read.
    """
    return _read_to_its_end(sys.stdin.buffer, "stdin", "check what is piped in")


def _read_to_its_end(stream: IO[bytes], name: str, hint: str) -> bytes:
    try:
        data = stream.read(MAX_PART_BYTES + 1)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}", hint) from error
    if len(data) > MAX_PART_BYTES:
        raise InputError(
            f"more than {MAX_PART_BYTES >> 20} MB come through {name}", "write it to a file first"
        )
    return data


def named_inputs(
    named: Sequence[str], filelist: Path | None = None, stdin: Callable[[], bytes] = read_stdin
) -> list[str | StdinPart]:
    """What was named on the command line and in lists: paths, addresses, or a picture itself.

    Args:
        named: `-` is stdin: a picture, or a list of paths.
        filelist: a path a line; `-` is stdin. Paths that are not there from the current folder on
            are looked for from the list's own.

    Raises:
        InputError: a list cannot be read, or has nothing in it; a name is empty.
    """
    inputs: list[str | StdinPart] = []
    for each in named:
        if not each:
            raise InputError(
                "one of the names given is empty", "check the variable that the shell put there"
            )
        if each != "-":
            inputs.append(each)
            continue
        data = stdin()
        inputs += [StdinPart(data)] if _is_picture(data) else _listed(data, "stdin")
    if filelist is not None:
        if str(filelist) == "-":
            return inputs + list(_listed(stdin(), "stdin"))
        hint = "check the path of --filelist"
        try:
            stream = filelist.open("rb")
        except OSError as error:
            raise InputError(f"{filelist} cannot be read: {error.strerror}", hint) from error
        with stream:
            data = _read_to_its_end(stream, str(filelist), hint)
        for path in _listed(data, str(filelist)):
            here = os.path.lexists(path) or url_part(path) is not None
            inputs.append(path if here else str(filelist.parent / path))
    return inputs


def _is_picture(data: bytes) -> bool:
    """Whether these are the bytes of a picture or video, and not a list of paths."""
    from qwencli.engine.frontend.media_files import video_kind

    head = data[:512]
    # A list is text: of other control characters it has none.
    return video_kind(head) is not None or bool(re.search(rb"[\x01-\x08\x0b\x0e-\x1f\x7f]", head))


def _listed(data: bytes, name: str) -> list[str]:
    """Paths, a line each; or each ended by a NUL, as `find -print0` writes them."""
    if b"\0" in data:
        lines = data.split(b"\0")
    else:
        lines = [
            line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        ]
    paths = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise InputError(f"{name} lists no files", "write a path a line")
    return paths


# A letter alone is a drive of Windows.
_FILE_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,3}(?P<rest>.*)", re.DOTALL)


def local_path(path: Path) -> Path:
    """The file that `path` names, which may be a `file://` address as file managers give it.

    Raises InputError for an address of the web.
    """
    found = _FILE_ADDRESS.fullmatch(path.as_posix())
    # lexists: `exists` raises for a name that is too long.
    if found is None or os.path.lexists(path):
        return path
    if found["scheme"].lower() == "file":
        import platform
        from urllib.request import url2pathname

        host, _, rest = found["rest"].partition("/")
        here = host.lower() in ("localhost", platform.node().lower())
        written = "/" + (rest if here else found["rest"])
        decoded = Path(url2pathname(written))
        # Some programs write the name as it is, "%20" and all.
        return Path(written) if os.path.lexists(written) else decoded
    # A path has one slash where the address had two.
    raise InputError(
        f"{found['scheme']}://{found['rest']}: an address of the web is not opened",
        "download the file and give its path",
    )


def without_inner_dots(path: Path) -> Path:
    """The same path without a `..` behind the name of a folder, which may be a link."""
    parts = path.parts
    first = next((n for n, part in enumerate(parts) if part != os.pardir), len(parts))
    if os.pardir not in parts[first:]:
        return path
    if path.name == os.pardir:
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)
