"""One server on the bundled model, at a free port of this machine, for all tests of a module."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from qwencli.config import EngineConfig
from qwencli.engine.factory import create_engine
from qwencli.models.resolve import Places, bundled_spec
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
def serving(engine: Any, **settings: Any) -> Iterator[Served]:
    thread = EngineThread(engine, max_waiting=settings.pop("max_waiting", 1024))
    thread.start()
    opened = listening("127.0.0.1", 0)
    server = server_for(create_app(thread, ServerSettings(**{"model": "scenes"} | settings)))
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
    return EngineConfig(model=bundled_spec(Places()), device="cpu")


@pytest.fixture(scope="module")
def served(scenes_config: EngineConfig) -> Iterator[Served]:
    with serving(create_engine(scenes_config), aliases=("scenes-alias",)) as running:
        yield running
