"""One server on the bundled model, at a free port of this machine, for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks import served as own_server
from benchmarks.served import Served
from qwencli.config import EngineConfig
from qwencli.engine.factory import create_engine
from qwencli.models.resolve import SearchPaths, bundled_spec
from qwencli.server.app import ServerSettings


@contextmanager
def serving(engine: Any, *, max_waiting: int = 1024, **settings: Any) -> Iterator[Served]:
    made = ServerSettings(**{"model": "scenes"} | settings)
    with own_server.serving(engine, made, max_waiting) as running:
        yield running


@pytest.fixture(scope="session")
def scenes_config() -> EngineConfig:
    return EngineConfig(model=bundled_spec(SearchPaths()), device="cpu")


@pytest.fixture(scope="module")
def served(scenes_config: EngineConfig) -> Iterator[Served]:
    with serving(create_engine(scenes_config), aliases=("scenes-alias",)) as running:
        yield running
