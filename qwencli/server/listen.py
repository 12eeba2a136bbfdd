"""Listens at an address and runs the application there, on uvicorn."""

from __future__ import annotations

import asyncio
import errno
import http
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import httptools
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from qwencli.errors import UsageError
from qwencli.server.api_errors import ApiError

# Connections at once: a process has 1,024 files on most systems.
MOST_CONNECTIONS = 900
# Within which the head of a request must be here, and how long it may be.
HEAD_S = 30.0
MOST_HEAD_BYTES = 64 << 10
# For how long what runs may end after Ctrl-C.
LAST_S = 3
# For how long the other side may take nothing, or be gone without a word.
SILENT_S = 60


class _Connection(HttpToolsProtocol):
    """uvicorn's, with an end for clients that do not finish the head of a request, or send a long
    one. Requests know of it by their `state["connection"]`."""

    _timer: asyncio.TimerHandle | None = None
    _num_head_bytes, _data = 0, b""
    # Requests that a client sends before it has an answer run one after the other.
    when_lost: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(_plain(ApiError(503, "too many connections")))
            transport.close()
            return
        self._timer = self.loop.call_later(HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._data = data
        super().data_received(data)
        self._data = b""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._stop_timer()
            self._num_head_bytes = 0
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_plain(ApiError(431, "the head of the request is too long")))
            self.transport.close()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def on_headers_complete(self) -> None:
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() != "1.0"):
            raise ValueError("a request has one host; the parser answers with 400")
        super().on_headers_complete()
        self.scope["state"]["connection"] = _Request(self, self.cycle)

    def _should_upgrade(self) -> bool:
        return True

    def handle_websocket_upgrade(self) -> None:
        """Read a request that asks for another protocol as if it had not. Java's client asks for
        HTTP/2 with each one, and goes on without; the parser takes it that no body follows."""
        upgrade = sys.exception()
        assert isinstance(upgrade, httptools.HttpParserUpgrade), "called where that is caught"
        kept = [each for each in self.headers if each[0] not in (b"connection", b"upgrade")]
        if any(b"close" in value.lower() for name, value in self.headers if name == b"connection"):
            kept.append((b"connection", b"close"))
        told = b"".join(b"%b: %b\r\n" % each for each in kept)
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (self.parser.get_method(), self.url, told)
        self.parser = httptools.HttpRequestParser(self)
        super().data_received(head + self._data[upgrade.args[0] :])

    def on_response_complete(self) -> None:
        self._stop_timer()
        # Nobody reads what is left of a request that was refused.
        is_refused = not self.pipeline and self.cycle.more_body
        super().on_response_complete()
        if is_refused:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self.when_lost is not None:
            self.when_lost()

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_plain(ApiError(400, "this is no HTTP request")))
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Request:
    """What the application sees of the connection that a request came over: `app.Connection`."""

    def __init__(self, connection: _Connection, cycle: RequestResponseCycle) -> None:
        self._connection, self._cycle = connection, cycle

    def when_lost(self, call: Callable[[], None] | None) -> None:
        self._connection.when_lost = call
        if call is not None and self._connection.transport.is_closing():
            call()

    def abort(self) -> None:
        self._connection.transport.abort()

    def stream(self, headers: Sequence[tuple[bytes, bytes]]) -> Stream:
        return Stream(self._connection, self._cycle, headers)


class Stream:
    """An answer with status 200 and of a length that nobody knows yet, written piece by piece.

    It does what uvicorn does in `send`, without a write of its own for the head, each piece and the
    end: of many streams these are most of what the server has to do.
    """

    def __init__(
        self,
        connection: _Connection,
        cycle: RequestResponseCycle,
        headers: Sequence[tuple[bytes, bytes]],
    ) -> None:
        self._connection, self._cycle = connection, cycle
        self._chunked = cycle.scope["http_version"] == "1.1"
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        told = [b"%b: %b\r\n" % each for each in (*cycle.default_headers, *headers)]
        if self._chunked:
            told.append(b"transfer-encoding: chunked\r\n")
        if not cycle.keep_alive:
            told.append(b"connection: close\r\n")
        self._head = b"".join((STATUS_LINE[200], *told, b"\r\n"))

    @property
    def is_full(self) -> bool:
        """Whether the client takes less than is written: then `room` is waited for."""
        return self._connection.flow.write_paused

    async def room(self) -> None:
        await self._connection.flow.drain()

    def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a piece; nothing happens once the client is gone."""
        cycle, transport = self._cycle, self._connection.transport
        if transport.is_closing():
            cycle.disconnected = True
            return
        if data and self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if last and self._chunked:
            data += b"0\r\n\r\n"
        transport.write(self._head + data)
        self._head = b""
        if last:
            cycle.response_complete = True
            cycle.message_event.set()
            if not cycle.keep_alive:
                transport.close()
            cycle.on_response()


def _plain(error: ApiError) -> bytes:
    """An answer as it goes over the connection, which ends with it."""
    body = error.response().body
    phrase = http.HTTPStatus(error.status).phrase
    head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\n"
    return f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 = any that is free.

    Raises:
        UsageError: the address is not this machine's, or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends at once (TCP_NODELAY) on sockets that name their protocol alone. Without it
        # an answer's first event waits for the client to acknowledge the head: 40 ms and more.
        opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # Those that it accepts have it too: what nobody takes is not kept for ever.
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_S * 1000)
            opened.bind((host, port))
            opened.listen(1024)
        except BaseException:
            opened.close()
            raise
    except (OSError, UnicodeError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        raise UsageError(
            f"cannot listen at {host}, port {port}: {getattr(error, 'strerror', None) or error}",
            "choose another --port, or 0 for any that is free"
            if taken
            else "choose another --host",
        ) from error
    return opened


class _Server(uvicorn.Server):
    """uvicorn's, which tells those that wait that it ends, and does not wait for them."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.end_answers()
        await super().shutdown(sockets)


def server_for(app: Starlette) -> uvicorn.Server:
    """uvicorn with our limits; it says nothing of requests but what is a fault of the server's.

    Args:
        app: made by `create_app`.
    """
    return _Server(
        uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=LAST_S,
        ),
        app,
    )


def run_server(
    server: uvicorn.Server, opened: socket.socket, ready: Callable[[], Any] = lambda: None
) -> None:
    """Serve until Ctrl-C, SIGTERM or `server.should_exit`.

    Args:
        ready: called once requests are taken.
    """

    async def serve() -> None:
        serving = asyncio.create_task(server.serve(sockets=[opened]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        ready()
        await serving

    # What uvicorn was ended by comes again when it is through: let it be one thing.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        opened.close()
