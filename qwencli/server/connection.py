"""A connection of a client: uvicorn's, with ends for what it has none for.

How many there may be depends on the files that this process may open: each is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from qwencli.server.api_errors import ApiError
from qwencli.server.known_heads import FoundHead, KnownHead, KnownHeads, find_head

if sys.platform != "win32":  # where sockets are no files
    import resource

# Connections at once, where the system lets a process have as many files.
MOST_CONNECTIONS = 2048
# Connections that are accepted before one looks at how many there are, and those that hear why they
# are refused.
ACCEPTED_AT_ONCE, REFUSED_AT_ONCE = 64, 128
# The engine's files and all others.
_OTHER_FILES = 256
_SPARE_FILES = _OTHER_FILES + REFUSED_AT_ONCE + 2 * ACCEPTED_AT_ONCE

# Within which the head of a request must be here.
HEAD_S = 30.0
# For how long a connection that is refused may take to say what it wants, and then hear it.
_REFUSED_S = 1.0
# Pauses between two looks whether a client that sends no more still waits for its answer.
_FIRST_LOOK_S, _LAST_LOOK_S = 0.01, 16.0
# What a client sends behind a request that runs, and is read meanwhile.
_READ_AHEAD_BYTES = 1 << 16
# What a stream begins and ends with, as h11 says it of a request whose head is known.
_STREAM_HEAD, _STREAM_END = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"
# Of all servers of this process: what a head says depends on its bytes alone.
_known_heads = KnownHeads()


def most_connections() -> int:
    """How many connections there may be at once: each is a file of this process."""
    if sys.platform != "win32":
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            return min(MOST_CONNECTIONS, max(files - _SPARE_FILES, files // 2))
    return MOST_CONNECTIONS


def allow_files() -> None:
    """Have this process open as many files as `MOST_CONNECTIONS` need, or as many as it may."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        infinity, wanted = resource.RLIM_INFINITY, MOST_CONNECTIONS + _SPARE_FILES
        wanted = wanted if hard == infinity else min(wanted, hard)
        if soft != infinity and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # macOS has a limit below the hard one
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class HttpConnection(H11Protocol):
    """uvicorn's, with an end for clients that do not finish the head of a request, and none for
    those that only say that they send no more; it is the `state["connection"]` of a request (see
    `app.Connection`)."""

    _timer: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None
    _when_lost: Callable[[], None] | None = None
    _stream: Stream | None = None
    _is_refused = _sends_no_more = False
    # Of the request that runs, where its head was known: what h11 has not been told of.
    _untold: _Untold | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        too_many = len(self.connections) - most_connections()
        self._is_refused = too_many > 0
        if self._is_refused:
            transport.write(_plain(ApiError(503, "too many connections")))
            if too_many > REFUSED_AT_ONCE:
                transport.close()
                return
            # What is closed before its request was read is reset, and may not see why.
            self._timer = self.loop.call_later(_REFUSED_S, transport.close)
            return
        self.app_state = {**self.app_state, "connection": self}
        self._timer = self.loop.call_later(HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self.transport.close()
            return
        self._take(bytes(data))  # Windows' loop hands out bytearrays, which are no keys
        if self._is_answering:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _take(self, data: bytes) -> None:
        if self._untold is not None:
            data = self._take_body(data)
            if data:  # of a request behind it
                self.tell_h11()
                super().data_received(data)
            return
        found = None if self._is_answering or not self._is_between else find_head(data)
        # What comes with a request and behind it is left to h11.
        if found is None or len(data) > found.body_at + found.length:
            super().data_received(data)
            return
        head = _known_heads.get(found.key)
        if head is not None:
            self._begin_known(head, found, data)
            return
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            _known_heads.learn(found.key, dict(self.scope))

    @property
    def _is_between(self) -> bool:
        """Whether h11 knows of no request that is not over, and of nothing behind the last one."""
        conn = self.conn
        states = conn.our_state, conn.their_state
        return states == (h11.IDLE, h11.IDLE) and conn.trailing_data == (b"", False)

    def _begin_known(self, head: KnownHead, found: FoundHead, data: bytes) -> None:
        """Begin a request as uvicorn does where h11 tells it of one."""
        self._unset_keepalive_if_required()
        self.headers = head.headers(found.length)
        scope: Any = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
            **head.about,
        }
        self.scope = scope
        self._untold = _Untold(data[: found.body_at], found.length)
        self.cycle = _KnownCycle(
            scope=self.scope,
            conn=self.conn,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            on_response=self.on_response_complete,
        )
        self.cycle.tell_h11 = self.tell_h11
        task = self.loop.create_task(self.cycle.run_asgi(self.app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
        self._take_body(data[found.body_at :])

    def _take_body(self, data: bytes) -> bytes:
        """Take what is of the body of a request of which h11 knows nothing; what is not."""
        untold, cycle = self._untold, self.cycle
        assert untold is not None, "the head was known"
        missing = untold.length - untold.received
        untold.received += min(missing, len(data))
        if cycle.more_body:
            cycle.body += data[:missing]
            cycle.more_body = untold.received < untold.length
            cycle.message_event.set()
        return data[missing:]

    def tell_h11(self) -> None:
        """Tell h11 of the request that runs, where it does not know it: for all but what a
        `Stream` writes it is asked, and so it is for what comes behind."""
        untold, self._untold = self._untold, None
        if untold is not None:
            # What the body is it need not know.
            self.conn.receive_data(untold.head + bytes(untold.received))
            while self.conn.next_event() not in (h11.NEED_DATA, h11.PAUSED):
                pass

    @property
    def is_told(self) -> bool:
        """Whether h11 knows of the request that runs."""
        return self._untold is None

    @property
    def body(self) -> bytes | None:
        """The request's body, once; None where it is not all here yet."""
        cycle = self.cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    def handle_events(self) -> None:
        super().handle_events()
        # uvicorn reads no further while a request runs that others follow: a client that goes
        # would be waited for.
        if (
            self.flow.read_paused
            and self._is_answering
            and not self.cycle.more_body
            and len(self.conn.trailing_data[0]) < _READ_AHEAD_BYTES
        ):
            self.flow.resume_reading()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: it is gone, or has only ended its side and waits. What is
        written to it tells which: the system of one that is gone refuses it, and the next write
        fails. HTTP/1.0 has nothing that may be written before an answer."""
        if self._is_refused or not self._is_answering or self.cycle.more_body:
            return False
        if self.cycle.scope["http_version"] != "1.1":
            return False
        self._sends_no_more = True
        self._look_for_client(_FIRST_LOOK_S)
        return True

    def _look_for_client(self, pause_s: float) -> None:
        if self.cycle.disconnected or self.cycle.response_complete:
            return
        if self._stream is not None:
            self._stream.write_filler()
        elif not self.cycle.response_started:
            self.tell_h11()
            # Any number of these may come before an answer, and clients pass over them.
            going_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(going_on) or b"")
        next_s = min(2 * pause_s, _LAST_LOOK_S)
        self._look = self.loop.call_later(pause_s, self._look_for_client, next_s)

    def on_response_complete(self) -> None:
        self._stop_timer()
        self._stream = self._untold = None
        super().on_response_complete()
        if self._sends_no_more and not self.transport.is_closing():
            # Another request may have come with the one before; half of one has no other half.
            if self._is_answering and not self.cycle.more_body:
                self._look_for_client(_FIRST_LOOK_S)
            else:
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        # h11 is told that the connection is over, and takes no request after that.
        self._untold = None
        super().connection_lost(exc)
        if self._when_lost is not None:
            self._when_lost()

    def shutdown(self) -> None:
        super().shutdown()
        if self._is_answering and self.cycle.more_body:
            # Nobody waits for the rest of a request.
            self.cycle.disconnected = True
            self.transport.write(_plain(ApiError(503, "the server has stopped")))
            self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def when_lost(self, call: Callable[[], None]) -> None:
        self._when_lost = call
        if self.cycle.disconnected:
            call()

    def over(self, call: Callable[[], None]) -> None:
        # A request that was sent behind this one's may have begun already.
        if self._when_lost is call:
            self._when_lost = None

    def abort(self) -> None:
        if self.cycle is not None:
            # Known now, and not only when the loop tells it: uvicorn has a word to say of answers
            # to clients who are there that are not complete.
            self.cycle.disconnected = True
        self.transport.abort()

    def stream(self, headers: Sequence[tuple[bytes, bytes]], filler: bytes) -> Stream:
        self._stream = Stream(self, headers, filler)
        return self._stream

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_plain(ApiError(400, "this is no HTTP request")))
        self.transport.close()

    def _stop_timer(self) -> None:
        for timer in (self._timer, self._look):
            if timer is not None:
                timer.cancel()
        self._timer = self._look = None


@dataclass
class _Untold:
    """A request of which h11 knows nothing: its head, how long its body is, and what is here."""

    head: bytes
    length: int
    received: int = 0


class _KnownCycle(RequestResponseCycle):
    """uvicorn's, of a request of which h11 is told when it is to write the answer."""

    tell_h11: Callable[[], None]

    async def send(self, message: ASGISendEvent) -> None:
        self.tell_h11()
        await super().send(message)


class Stream:
    """An answer with status 200 and of a length that nobody knows yet, written piece by piece.

    It does what uvicorn does in `send`, without a turn of h11 and a write of its own for the head,
    each piece and the end: of many streams these are most of what the server has to do.

    Args:
        filler: a piece that says nothing.
    """

    def __init__(
        self, connection: HttpConnection, headers: Sequence[tuple[bytes, bytes]], filler: bytes
    ) -> None:
        self._connection, self._cycle = connection, connection.cycle
        self._filler = filler
        self._chunked = self._cycle.scope["http_version"] == "1.1"
        self._cycle.response_started, self._cycle.waiting_for_100_continue = True, False
        self._head = b""
        # h11 says how the answer ends, and takes 0.1 ms to look at headers that it knows not.
        self._in_h11 = connection.is_told
        if not self._cycle.disconnected:
            begun = _STREAM_HEAD if not self._in_h11 else self._begin_in_h11()
            told = [b"%b: %b\r\n" % each for each in (*self._cycle.default_headers, *headers)]
            self._head = b"".join((begun, *told, b"\r\n"))

    def _begin_in_h11(self) -> bytes:
        response = h11.Response(status_code=200, headers=[], reason=b"OK")
        return (self._connection.conn.send(response) or b"").removesuffix(b"\r\n")

    @property
    def is_full(self) -> bool:
        """Whether the client takes less than is written: then `room` is waited for."""
        return bool(self._connection.flow.write_paused) and not self._cycle.disconnected

    async def room(self) -> None:
        await self._connection.flow.drain()

    def write_filler(self) -> None:
        if not self.is_full:
            self.write(self._filler)

    def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a piece; nothing happens once the client is gone."""
        cycle, connection = self._cycle, self._connection
        # The loop tells a turn later that the client is gone; asyncio counts what is written until
        # then, and complains.
        if cycle.disconnected or connection.transport.is_closing():
            return
        if data and self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if last:
            data += self._end()
        connection.transport.write(self._head + data)
        self._head = b""
        if last:
            cycle.response_complete = True
            cycle.message_event.set()
            if connection.conn.our_state is h11.MUST_CLOSE or not cycle.keep_alive:
                connection.conn.send(h11.ConnectionClosed())
                connection.transport.close()
            cycle.on_response()

    def _end(self) -> bytes:
        conn = self._connection.conn
        if not self._connection.is_told:
            return _STREAM_END
        if not self._in_h11:  # it was told meanwhile
            self._begin_in_h11()
        return conn.send(h11.EndOfMessage()) or b""


def _plain(error: ApiError) -> bytes:
    """An answer as it goes over the connection, which ends with it."""
    body = error.response().body
    phrase = http.HTTPStatus(error.status).phrase
    head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\n"
    return f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
