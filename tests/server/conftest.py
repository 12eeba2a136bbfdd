"""One server on the bundled model, at a free port of this machine, for all tests of a module.

Its event loop is a thread of this process, so that tests can look into it; what differs where it is
a process of its own, as in the command, is in test_http_process.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.served import Served
from qwencli.config import EngineConfig
from qwencli.engine.factory import create_engine
from qwencli.models.resolve import SearchPaths, bundled_spec
from qwencli.server.app import create_app
from qwencli.server.engine_thread import EngineThread
from qwencli.server.listen import listening, server_for
from qwencli.server.settings import ServerSettings


@contextmanager
def serving(engine: Any, *, max_waiting: int = 1024, **settings: Any) -> Iterator[Served]:
    made = ServerSettings(**{"model": "scenes"} | settings)
    thread = EngineThread(engine, max_waiting=max_waiting)
    thread.start()
    opened = listening("127.0.0.1", 0)
    server = server_for(create_app(thread, made))
    runs = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[opened])))
    runs.start()
    try:
        yield Served(f"http://127.0.0.1:{opened.getsockname()[1]}", thread)
    finally:
        server.should_exit = True
        runs.join()
        thread.close()
        opened.close()


@pytest.fixture(scope="session")
def scenes_config() -> EngineConfig:
    return EngineConfig(model=bundled_spec(SearchPaths()), device="cpu")


@pytest.fixture(scope="module")
def served(scenes_config: EngineConfig) -> Iterator[Served]:
    with serving(create_engine(scenes_config), aliases=("scenes-alias",)) as running:
        yield running
