"""Listens at an address and runs the application there, on uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from qwencli.errors import UsageError
from qwencli.server.connection import ACCEPTED_AT_ONCE, HttpConnection, allow_files

# Connections that wait to be accepted.
_BACKLOG = 1024
# For how long clients may still take what was written after Ctrl-C.
LAST_S = 1.0
# For how long the other side may take nothing, or be gone without a word.
SILENT_S = 60


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
            opened.listen(_BACKLOG)
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            # asyncio accepts as many at a time as may wait, which is another number.
            each.listen(_BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.end_answers()
        asyncio.get_running_loop().call_later(LAST_S, self._end_all)
        await super().shutdown(sockets)

    def _end_all(self) -> None:
        for connection in list(self.server_state.connections):
            assert isinstance(connection, HttpConnection), "made with it"
            connection.abort()
        for task in self.server_state.tasks:
            task.cancel()


def server_for(app: Starlette) -> uvicorn.Server:
    """uvicorn with our limits; it says nothing of requests but what is a fault of the server's.

    Args:
        app: made by `create_app`.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        # One that was cancelled, as the last ones are when the server ends, is no fault.
        with contextlib.suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return _Server(
        uvicorn.Config(
            answer,
            http=HttpConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            backlog=ACCEPTED_AT_ONCE,
        ),
        app,
    )


def run_server(
    server: uvicorn.Server,
    opened: socket.socket,
    ready: Callable[[], Any] = lambda: None,
    warn: Callable[[str], Any] = lambda line: None,
) -> None:
    """Serve until Ctrl-C, SIGTERM or `server.should_exit`.

    Args:
        ready: called once requests are taken.
        warn: takes a line about what went wrong in the server itself.
    """
    allow_files()

    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(_AcceptFailures(warn))
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


class _AcceptFailures:
    """Tells in one line that no connection can be opened, once, and leaves all else to the loop.
    Clients wait meanwhile: asyncio tries again every second."""

    def __init__(self, warn: Callable[[str], Any]) -> None:
        self._warn, self._is_told = warn, False

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _OUT_OF_FILES):
            loop.default_exception_handler(context)
        elif not self._is_told:
            self._is_told = True
            self._warn(
                f"cannot open another connection: {(error.strerror or str(error)).lower()}; "
                "clients wait (a higher limit: ulimit -n 4096)"
            )


_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
