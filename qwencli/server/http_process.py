"""A process that speaks HTTP for an engine, so that the engine has its interpreter for itself.

The process that has the engine opens the socket and starts this one, which runs the application on
uvicorn; `engine_client` says what passes between them. Either ends with the other.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qwencli.engine.machine.child_process import start_process
from qwencli.errors import EngineError, QwenCliError
from qwencli.server.answers import EngineStoppedError, stopped
from qwencli.server.channel import Channel
from qwencli.server.engine_client import ChannelOutlet, EngineClient, Forwarded, RemoteEngine
from qwencli.server.engine_thread import EngineThread
from qwencli.server.listen import LAST_S
from qwencli.server.settings import ServerSettings

if TYPE_CHECKING:
    if sys.platform == "win32":  # what `Pipe` gives there
        from multiprocessing.connection import PipeConnection as Connection
    else:
        from multiprocessing.connection import Connection

# Between two looks whether the process is still there.
_LOOK_S = 0.5
# For how long it may take to end when it is told to.
_END_S = LAST_S + 4.0


class HttpProcess:
    """The process, from the engine's side. It is started at once and imports what it needs while
    the engine is loaded; `close` ends it.

    Args:
        opened: listens already.
        warn: takes a line about what went wrong there.
    """

    def __init__(
        self,
        opened: socket.socket,
        settings: ServerSettings,
        warn: Callable[[str], Any] = lambda line: None,
    ) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._warn = warn
        self._listening: threading.Thread | None = None
        self._process = start_process(serve_http, (theirs, opened, settings), "http", daemon=True)
        theirs.close()
        opened.close()
        self._channel = Channel(ours)

    def serve(self, thread: EngineThread, ready: Callable[[], Any] = lambda: None) -> None:
        """Answer with an engine that is loaded until Ctrl-C or SIGTERM, or until it has failed.

        Args:
            ready: called once requests are taken.

        Raises:
            EngineError: the process has ended by itself.
        """
        self.begin(thread, ready)
        # What a program is ended by is one thing.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self.wait()
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)

    def wait(self) -> None:
        """Until the process has ended. Raises as `serve`."""
        while self._process.is_alive():
            self._process.join(_LOOK_S)
        self.check()

    def check(self) -> None:
        """Raises EngineError where the process has ended by itself."""
        if self._process.exitcode:
            raise EngineError(
                f"the process that speaks HTTP has ended with {self._process.exitcode}",
                "start the server again; what it said stands above",
            )

    def begin(self, thread: EngineThread, ready: Callable[[], Any] = lambda: None) -> None:
        """As `serve`, but return at once."""
        thread.on_failure = lambda: self._channel.send(("failed", thread.failure or stopped()))
        self._channel.send(("serve", RemoteEngine.of(thread)))
        self._listening = threading.Thread(
            target=self._listen, args=(thread, ready), name="http requests", daemon=True
        )
        self._listening.start()

    def close(self) -> None:
        """Have it end: what is written goes out, and all others are told that nothing comes."""
        if self._listening is not None:
            self._channel.send(("end",))
            self._process.join(_END_S)
        if self._process.is_alive():
            self.kill()
            self._process.join()
        if self._listening is not None:
            self._listening.join()
        self._channel.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def _listen(self, thread: EngineThread, ready: Callable[[], Any]) -> None:
        unfinished: dict[int, Forwarded] = {}
        outlet = ChannelOutlet(self._channel, thread.engine, unfinished)
        told: dict[str, Callable[..., Any]] = {"ready": ready, "warn": self._warn}
        try:
            for kind, *about in self._channel.messages():
                if kind == "ask":
                    _ask(thread, Forwarded(about[0], about[1], outlet, *about[2:]), unfinished)
                elif kind != "forget":
                    told[kind](*about)
                elif (found := unfinished.pop(about[0], None)) is not None:  # it had not ended
                    thread.forget(found)
                del about  # a body may be large, and the next message far away
        except Exception:
            self.kill()  # what it asks is not heard any more
            raise
        finally:
            # Nobody waits for what is still to be answered.
            for asked in list(unfinished.values()):
                thread.forget(asked)


def _ask(thread: EngineThread, asked: Forwarded, unfinished: dict[int, Forwarded]) -> None:
    unfinished[asked.number] = asked
    try:
        thread.add(asked)
    except QwenCliError as error:
        asked.take(error)
        asked.outlet.wake([asked])


def serve_http(connection: Connection, opened: socket.socket, settings: ServerSettings) -> None:
    """What the process does."""
    from qwencli.server.app import create_app
    from qwencli.server.listen import run_server, server_for

    channel = Channel(connection)
    messages = channel.messages()
    kind, *about = next(messages, ("end",))
    if kind != "serve":
        return
    client = EngineClient(channel, *about)
    server = server_for(create_app(client, settings))

    def end(why: Exception | None) -> None:
        if why is not None:
            client.fail(why)
        server.should_exit = True

    def listen(loop: asyncio.AbstractEventLoop) -> None:
        def tell(do: Callable[..., None], *about: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(do, *about)

        try:
            for kind, *about in messages:
                if kind == "told":
                    tell(client.take, *about)
                else:
                    tell(end, about[0] if about else None)
        finally:
            tell(end, EngineStoppedError("the engine is gone"))

    def begin() -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=listen, args=(loop,), name="pieces", daemon=True).start()
        channel.send(("ready",))

    run_server(server, opened, begin, lambda line: channel.send(("warn", line)))
    channel.finish()
