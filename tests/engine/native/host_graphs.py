"""CUDA graphs without a GPU: a graph runs its work when it is captured and again when replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwencli.engine import graphs
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.native import prefill_graphs
from qwencli.engine.ops import attention


class _Stream:
    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, other: object) -> None: ...


class _Graph:
    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, *rest: object
) -> tuple[torch.Tensor]:
    """torch's flash attention of segments, [N, H, D] each, by its definition."""
    if q.is_meta:
        return (torch.empty_like(q),)
    key_starts, longest, longest_key = rest[:3]
    assert starts is key_starts
    assert longest == longest_key
    lengths = starts.diff().tolist()
    assert starts[0] == 0
    assert starts[-1] == len(q)
    assert all(0 <= length <= longest for length in lengths)
    pieces = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in some))[0].transpose(0, 1)
        for some in zip(*(x.split_with_sizes(lengths) for x in (q, k, v)), strict=True)
        if len(some[0])
    ]
    return (torch.cat(pieces),)


def run_graphs_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def inside(*args: object, **settings: object) -> Iterator[None]:
        yield

    captured = GraphRunner.capture

    def capture(pool: GraphRunner, key: Any, work: Callable[[], None]) -> None:
        captured(pool, key, work)
        pool._graphs[key].work = work  # type: ignore[attr-defined]

    monkeypatch.setattr(GraphRunner, "capture", capture)
    monkeypatch.setattr(attention, "forward", flash_forward)
    monkeypatch.setattr(prefill_graphs, "can_flash_decode", lambda *about: True)
    monkeypatch.setattr(graphs, "_capture_stream", _Stream)
    for name, stand_in in {
        "CUDAGraph": _Graph, "current_stream": _Stream, "graph": inside,
        "graph_pool_handle": object, "stream": inside,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
