"""CUDA graphs by key, in one pool of memory, and passes that become graphs once their shape came
several times."""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qwencli.engine.device_memory import captured_graphs
from qwencli.engine.machine.python_runtime import gc_paused
from qwencli.tracing import span

Tensor = torch.Tensor
# Tensors of a pass -> what it makes of them; it asks the host nothing and keeps what it is given.
Pass = Callable[[Sequence[Tensor]], Sequence[Tensor]]
# Runs a pass of a key over tensors, see `RepeatedShapes.run`.
RunPass = Callable[[Hashable, Sequence[Tensor], Callable[[], Pass]], Sequence[Tensor]]

# Making a graph takes as long as a few passes, and most shapes of a mixed folder never come again.
# Pictures of one size are nine shapes, see `pieces`.
TIMES_MET, SHAPES_KEPT, SHAPES_COUNTED = 4, 24, 1024
# What must be free on the device: inputs and results of a graph stay.
ROOM_BYTES = 4 * 2**30


def pieces(keys: Sequence[Hashable], most: int) -> list[list[int]]:
    """Cut a pass into some whose shapes come again: places of equal keys in powers of two up to
    `most`, largest first, and all whose key is no other's together in a last one."""
    alike: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        alike.setdefault(key, []).append(place)
    made: list[list[int]] = []
    odd: list[int] = []
    for places in alike.values():
        if len(places) == 1:
            odd += places
            continue
        while places:
            size = min(most, 1 << (len(places).bit_length() - 1))
            made.append(places[:size])
            places = places[size:]
    return [*made, odd] if odd else made


class GraphRunner:
    """Captures CUDA graphs by key and replays them.

    All share one pool of memory: no two run at the same time, and what a replay leaves is used
    before the next one.
    """

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
        with span("capture", key=str(key)):
            self._capture(key, work)

    def _capture(self, key: Hashable, work: Callable[[], None]) -> None:
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
        # Nor may garbage be looked for: a graph of an engine that is gone would be freed in it.
        with (
            gc_paused(),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode),
        ):
            work()
        captured_graphs.add(graph)
        self._graphs[key] = graph

    def replay(self, key: Hashable) -> None:
        self._graphs[key].replay()

    def drop(self, key: Hashable) -> None:
        """Free a graph; one whose capture failed is not there."""
        self._graphs.pop(key, None)


class Graphs(Protocol):
    """What `GraphRunner` does."""

    def capture(self, key: Hashable, work: Callable[[], None]) -> None: ...

    def replay(self, key: Hashable) -> None: ...

    def drop(self, key: Hashable) -> None: ...


@dataclass
class _Shape:
    """A pass that is a graph. `work` holds what else the graph reads."""

    inputs: list[Tensor]
    work: Pass
    outputs: Sequence[Tensor] = ()

    def run(self) -> None:
        self.outputs = self.work(self.inputs)


class RepeatedShapes:
    """Runs passes operator by operator, and as a graph those whose shape came `TIMES_MET` times.

    A pass over some prompts is hundreds of launches, each of which costs the host the interpreter's
    lock; pictures of one size that are asked about in the same words make the same pass each time.
    With `at_once` a shape is a graph from the first time on: for requests that are measured, so
    that all of them run alike.
    """

    def __init__(self, graphs: Graphs, free_bytes: Callable[[], int]) -> None:
        self._graphs, self._free_bytes = graphs, free_bytes
        self._kept: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._met: Counter[Hashable] = Counter()
        self._able = True
        self.at_once = False

    def run(
        self, key: Hashable, inputs: Sequence[Tensor], make: Callable[[], Pass]
    ) -> Sequence[Tensor]:
        """What the pass makes of `inputs`, which it leaves as they are; good until the next pass.

        Args:
            key: of equal passes but for the values of the inputs.
            make: the pass; asked for it where it is not a graph yet.
        """
        shape = self._kept.get(key)
        if shape is None:
            work = make()
            shape = self._captured(key, inputs, work) if self._due(key) else None
            if shape is None:
                return work(inputs)
        self._kept.move_to_end(key)
        for kept, value in zip(shape.inputs, inputs, strict=True):
            kept.copy_(value)
        self._graphs.replay(key)
        return shape.outputs

    def clear(self) -> None:
        """Give the memory back, for good: there is not enough for both."""
        for key in self._kept:
            self._graphs.drop(key)
        self._kept.clear()
        self._able = False

    def _due(self, key: Hashable) -> bool:
        if not self._able:
            return False
        if len(self._met) >= SHAPES_COUNTED:
            self._met.clear()
        self._met[key] += 1
        return (self.at_once or self._met[key] > TIMES_MET) and self._free_bytes() >= ROOM_BYTES

    def _captured(self, key: Hashable, inputs: Sequence[Tensor], work: Pass) -> _Shape | None:
        if len(self._kept) >= SHAPES_KEPT:
            oldest, _ = self._kept.popitem(last=False)
            self._graphs.drop(oldest)
            del self._met[oldest]
        try:
            shape = _Shape([value.clone() for value in inputs], work)
            self._graphs.capture(key, shape.run)
        except RuntimeError:
            # No memory, or an operator that no graph takes: run as it is, it says what is wrong.
            self.clear()
            return None
        self._kept[key] = shape
        return shape


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
