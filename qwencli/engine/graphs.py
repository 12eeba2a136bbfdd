"""CUDA graphs by key, in one pool of memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import torch


class GraphRunner:
    """They share their memory: they never run at the same time, and what a replay leaves is used
    before the next one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # cuBLAS keeps a workspace per stream for good, so one stream serves all captures.
        self._stream = _capture_stream(device)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        """Capture `work`, which is run before that: nothing may be in use that it writes to."""
        stream, current = self._stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Kernels are loaded and cuBLAS sets itself up here and not in the graph. Once is enough
            # for both, and a model that was just loaded waits for it before its first token.
            work()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Of this thread: others prepare pictures meanwhile, and what they allocate or wait for
        # would end the capture.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode):
            work()
        self._graphs[key] = graph

    def replay(self, key: Hashable) -> None:
        self._graphs[key].replay()

    def drop(self, key: Hashable) -> None:
        """Free a graph; one whose capture failed is not there."""
        self._graphs.pop(key, None)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
