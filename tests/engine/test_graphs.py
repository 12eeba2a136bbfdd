"""Passes whose shape comes again become graphs; here by graphs that run their work."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.device_memory import release
from qwencli.engine.graphs import (
    ROOM_BYTES,
    SHAPES_KEPT,
    TIMES_MET,
    GraphRunner,
    RepeatedShapes,
    pieces,
)
from tests.engine.native.host_graphs import run_graphs_on_the_host


class RunGraphs:
    """Graphs that are run and not replayed."""

    def __init__(self, fails=False):
        self.work, self.made, self.fails = {}, set(), fails

    def capture(self, key, work):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        work()
        self.work[key] = work
        self.made.add(key)

    def replay(self, key):
        self.work[key]()

    def drop(self, key):
        self.work.pop(key, None)


@pytest.fixture
def graphs():
    return RunGraphs()


def twice(shapes, size, value=1.0):
    given = torch.full((size,), value)
    (made,) = shapes.run(size, [given], lambda: lambda inputs: (inputs[0] * 2,))
    assert made.tolist() == [2 * value] * size


def test_a_shape_that_comes_again_becomes_a_graph(graphs):
    shapes = RepeatedShapes(graphs, lambda: ROOM_BYTES)
    for time in range(TIMES_MET):
        twice(shapes, 3, time)
    assert not graphs.work
    for time in range(3):
        twice(shapes, 3, time)
    assert list(graphs.work) == [3]


def test_what_is_measured_is_a_graph_from_the_first_time_on(graphs):
    shapes = RepeatedShapes(graphs, lambda: ROOM_BYTES)
    shapes.at_once = True
    twice(shapes, 3)
    shapes.at_once = False
    twice(shapes, 4)
    assert list(graphs.work) == [3]


def test_few_shapes_are_kept_those_used_last(graphs):
    shapes = RepeatedShapes(graphs, lambda: ROOM_BYTES)
    for size in range(1, SHAPES_KEPT + 2):
        for _ in range(TIMES_MET + 1):
            twice(shapes, size)
        twice(shapes, 1)
    assert len(graphs.work) == SHAPES_KEPT
    assert 1 in graphs.work and 2 not in graphs.work


@pytest.mark.parametrize(("fails", "free"), [(True, ROOM_BYTES), (False, ROOM_BYTES - 1)])
def test_without_room_or_where_no_graph_can_be_made_passes_run_as_they_are(fails, free):
    graphs = RunGraphs(fails)
    shapes = RepeatedShapes(graphs, lambda: free)
    for _ in range(TIMES_MET + 3):
        twice(shapes, 3)
    assert not graphs.work


def test_memory_is_given_back_for_good(graphs):
    shapes = RepeatedShapes(graphs, lambda: ROOM_BYTES)
    for _ in range(TIMES_MET + 1):
        twice(shapes, 3)
    shapes.clear()
    for _ in range(TIMES_MET + 2):
        twice(shapes, 3)
    assert not graphs.work


def test_a_pass_is_cut_into_powers_of_two_of_what_is_alike():
    assert pieces("abaaccaaa", 4) == [[0, 2, 3, 6], [7, 8], [4, 5], [1]]
    assert pieces("abcd", 4) == [[0, 1, 2, 3]]
    assert pieces("aaa", 1) == [[0], [1], [2]]


def test_memory_that_is_given_back_leaves_graphs_what_they_write_to(monkeypatch):
    """cuBLAS writes to a workspace that the capture saw: it stays as long as a graph does."""
    run_graphs_on_the_host(monkeypatch)
    cleared = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(1), raising=False
    )
    runner = GraphRunner(torch.device("cuda"))
    runner.capture("key", lambda: None)
    release("cuda")
    assert not cleared
    runner.drop("key")
    release("cuda")
    assert cleared
