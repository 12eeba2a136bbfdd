"""Heads of requests that have come before: clients send the same one with each of their requests.

Reading one takes h11 several times what all else of a short request takes the connection. So what
h11 made of a head is kept, by its bytes, and one that comes again is not read again. Only the
number behind Content-Length may be another. Nothing here knows what HTTP is: a head that h11 has
not taken is not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Longer heads are read each time. So are those of longer bodies, which come in many pieces.
MOST_HEAD_BYTES, MOST_BODY_BYTES = 4096, 1 << 16
# How many are known at once.
HEADS_KEPT = 64
_LENGTH = re.compile(rb"\r\nContent-Length: *([0-9]{1,5})\r\n", re.IGNORECASE)
_END = b"\r\n\r\n"
# What these say changes how a request is read or answered.
_OTHERWISE = (b"transfer-encoding", b"expect", b"upgrade", b"connection", b"trailer", b"te")


@dataclass(frozen=True)
class FoundHead:
    """A head at the beginning of what was received.

    Args:
        key: the head without the number of Content-Length. length: that number.
        body_at: where the body begins.
    """

    key: bytes
    length: int
    body_at: int


def find_head(data: bytes) -> FoundHead | None:
    """None where no whole head of a kind that is kept is there."""
    end = data.find(_END, 0, MOST_HEAD_BYTES)
    if end < 0 or not data.startswith(b"POST "):
        return None
    found = _LENGTH.search(data, 0, end + 2)
    if found is None:
        return None
    length = int(found[1])
    if length > MOST_BODY_BYTES:
        return None
    return FoundHead(data[: found.start(1)] + data[found.end(1) : end], length, end + len(_END))


@dataclass(frozen=True)
class KnownHead:
    """What an HTTP/1.1 request's scope has of its head, but for the number of bytes."""

    about: dict[str, Any]
    before: tuple[tuple[bytes, bytes], ...]
    after: tuple[tuple[bytes, bytes], ...]

    def headers(self, length: int) -> list[tuple[bytes, bytes]]:
        return [*self.before, (b"content-length", b"%d" % length), *self.after]


class KnownHeads:
    """The heads that are known."""

    def __init__(self) -> None:
        self._heads: dict[bytes, KnownHead] = {}

    def get(self, key: bytes) -> KnownHead | None:
        return self._heads.get(key)

    def learn(self, key: bytes, scope: dict[str, Any]) -> None:
        """Keep what h11 made of a head, unless it says how else a request is to be read.

        The one length that it has is the number that the key lacks: what stands in its place in
        another head of the same key are one to five digits too.
        """
        headers = tuple(scope["headers"])
        names = [name for name, _ in headers]
        said = [each for each in headers if each[0] in _OTHERWISE]
        if scope["http_version"] != "1.1" or names.count(b"content-length") != 1:
            return
        # h11 takes a length that is said twice alike, and lines that end without \r: where the head
        # ends and how long the body is must be what `find_head` says, whatever the number.
        if key.lower().count(b"content-length") != 1 or key.count(b"\n") != key.count(b"\r\n"):
            return
        if any(each != (b"connection", b"keep-alive") for each in said):
            return
        at = names.index(b"content-length")
        if len(self._heads) >= HEADS_KEPT:
            self._heads.clear()
        kept = ("method", "path", "raw_path", "query_string")
        about = {name: scope[name] for name in kept}
        self._heads[key] = KnownHead(about, headers[:at], headers[at + 1 :])
