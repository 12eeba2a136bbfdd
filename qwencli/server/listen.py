"""Listens at an address and runs the application there, on uvicorn."""

from __future__ import annotations

import asyncio
import errno
import http
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwencli.errors import UsageError
from qwencli.server.api_errors import ApiError

# Connections at once: a process has 1,024 files on most systems.
MOST_CONNECTIONS = 900
# Within which the head of a request must be here.
HEAD_S = 30.0
# For how long what runs may end after Ctrl-C.
LAST_S = 3
# For how long the other side may take nothing, or be gone without a word.
SILENT_S = 60


class _Connection(H11Protocol):
    """uvicorn's, with an end for clients that do not finish the head of a request; it is the
    `state["connection"]` of a request (see `app.Connection`)."""

    _timer: asyncio.TimerHandle | None = None
    _when_lost: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(_plain(ApiError(503, "too many connections")))
            transport.close()
            return
        self.app_state = {**self.app_state, "connection": self}
        self._timer = self.loop.call_later(HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def on_response_complete(self) -> None:
        self._stop_timer()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self._when_lost is not None:
            self._when_lost()

    def when_lost(self, call: Callable[[], None]) -> None:
        self._when_lost = call
        if self.cycle.disconnected:
            call()

    def over(self, call: Callable[[], None]) -> None:
        # A request that was sent behind this one's may have begun already.
        if self._when_lost is call:
            self._when_lost = None

    def abort(self) -> None:
        self.transport.abort()

    def stream(self, headers: Sequence[tuple[bytes, bytes]]) -> Stream:
        return Stream(self, headers)

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_plain(ApiError(400, "this is no HTTP request")))
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Stream:
    """An answer with status 200 and of a length that nobody knows yet, written piece by piece.

    It does what uvicorn does in `send`, without a turn of h11 and a write of its own for the head,
    each piece and the end: of many streams these are most of what the server has to do.
    """

    def __init__(self, connection: _Connection, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._connection, self._cycle = connection, connection.cycle
        self._chunked = self._cycle.scope["http_version"] == "1.1"
        self._cycle.response_started, self._cycle.waiting_for_100_continue = True, False
        self._head = b""
        if not self._cycle.disconnected:
            # h11 says how the answer ends, and takes 0.1 ms to look at headers that it knows not.
            response = h11.Response(status_code=200, headers=[], reason=b"OK")
            begun = (connection.conn.send(response) or b"").removesuffix(b"\r\n")
            told = [b"%b: %b\r\n" % each for each in (*self._cycle.default_headers, *headers)]
            self._head = b"".join((begun, *told, b"\r\n"))

    @property
    def is_full(self) -> bool:
        """Whether the client takes less than is written: then `room` is waited for."""
        return bool(self._connection.flow.write_paused) and not self._cycle.disconnected

    async def room(self) -> None:
        await self._connection.flow.drain()

    def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a piece; nothing happens once the client is gone."""
        cycle, connection = self._cycle, self._connection
        if cycle.disconnected:
            return
        if data and self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if last:
            data += connection.conn.send(h11.EndOfMessage()) or b""
        connection.transport.write(self._head + data)
        self._head = b""
        if last:
            cycle.response_complete = True
            cycle.message_event.set()
            if connection.conn.our_state is h11.MUST_CLOSE or not cycle.keep_alive:
                connection.conn.send(h11.ConnectionClosed())
                connection.transport.close()
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
