"""CUDA graphs without a GPU: a graph runs its work when it is captured and again when replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qwencli.engine.native import graph_pool
from qwencli.engine.native.graph_pool import GraphPool


class _Stream:
    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, other: object) -> None: ...


class _Graph:
    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


def run_graphs_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def inside(*args: object, **settings: object) -> Iterator[None]:
        yield

    captured = GraphPool.capture

    def capture(pool: GraphPool, key: Any, work: Callable[[], None]) -> None:
        captured(pool, key, work)
        pool._graphs[key].work = work  # type: ignore[attr-defined]

    monkeypatch.setattr(GraphPool, "capture", capture)
    monkeypatch.setattr(graph_pool, "_capture_stream", _Stream)
    for name, stand_in in {
        "CUDAGraph": _Graph, "current_stream": _Stream, "graph": inside,
        "graph_pool_handle": object, "stream": inside,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
