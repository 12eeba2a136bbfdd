"""What competes with a run ends with it, whatever happens."""

from __future__ import annotations

import os
import subprocess

import pytest

from qwencli.bench.inject import contention


@pytest.fixture
def started(monkeypatch):
    """All processes that the test starts."""
    processes = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(contention.subprocess, "Popen", Noted)
    return processes


def test_neighbours_copy_memory_while_the_block_runs(started, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with contention.neighbours(contention.COPYING):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(("cores", "count"), [(None, 1), (1, 1), (2, 1), (64, 8)])
def test_one_for_each_other_processor_up_to_a_limit(monkeypatch, cores, count):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(contention, "programs", lambda program, number: (program, number))
    assert contention.neighbours("...") == ("...", count)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system ties no thread")
def test_a_failing_run_leaves_no_process_and_all_cores(started):
    cores = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError), contention.shared_core():
        raise RuntimeError
    assert os.sched_getaffinity(0) == cores
    assert len(started) == 1 and started[0].poll() is not None
