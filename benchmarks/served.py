"""A server in a thread of this process, at a free port of this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwencli.server.app import ServerSettings, create_app
from qwencli.server.engine_thread import EngineThread
from qwencli.server.listen import listening, server_for


@dataclass
class Served:
    """A running server.

    Args:
        address: such as http://127.0.0.1:1234.
    """

    address: str
    thread: EngineThread


@contextmanager
def serving(engine: Any, settings: ServerSettings, max_waiting: int = 1024) -> Iterator[Served]:
    """Serve an engine that is not loaded yet; it is closed at the end."""
    thread = EngineThread(engine, max_waiting=max_waiting)
    thread.start()
    opened = listening("127.0.0.1", 0)
    server = server_for(create_app(thread, settings))
    runs = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[opened])), name="event loop"
    )
    runs.start()
    try:
        yield Served(f"http://127.0.0.1:{opened.getsockname()[1]}", thread)
    finally:
        server.should_exit = True
        runs.join()
        thread.close()
        opened.close()
