"""Pictures that are no files of their own: from a pipe, at addresses; those of `shards` too.

Each is found without reading it, and read whole when it is its turn; what it takes is bounded.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

from qwencli import __version__
from qwencli.errors import InputError

if TYPE_CHECKING:
    from http.client import HTTPResponse

# A picture or video that is held whole.
MAX_PART_BYTES = 2**28
# The whole of a download, and the silence in it that is waited for.
DOWNLOAD_S, SILENCE_S = 120.0, 20.0
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
