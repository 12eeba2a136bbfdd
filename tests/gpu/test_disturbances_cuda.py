from __future__ import annotations

import subprocess
import sys

import torch

from qwencli.engine.instruments import disturbances
from qwencli.engine.instruments.device_events import DeviceEvents, allocator_counts


def test_churn_reaches_the_driver_and_leaves_nothing():
    torch.zeros(1, device="cuda")  # before, there is no allocator to ask
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    before = allocator_counts("cuda:0")
    disturbances.churn_allocator("cuda:0", 0.05, seed=1)
    assert allocator_counts("cuda:0").device_allocs > before.device_allocs + 10
    assert torch.cuda.memory_reserved() == reserved


def test_captures_and_waits_are_what_the_probes_see():
    torch.zeros(1, device="cuda")  # what is not initialized is not watched
    with DeviceEvents("cuda:0") as events:
        disturbances.capture_graphs("cuda:0", 0.01)
        disturbances.synchronize("cuda:0")
    assert "graph_capture" in {span.name for span in events.spans}
    assert events.syncs >= 1


def test_the_program_beside_obeys_and_ends():
    command = [sys.executable, "-m", "qwencli.engine.instruments.disturbances"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout.readline().strip() == "ready"
        program.stdin.write("go\nstop\n")
        program.stdin.close()
        assert program.wait(timeout=30) == 0


def test_the_device_waits_for_as_long_as_asked_and_the_host_does_not():
    wait = disturbances.waiting("cuda:0", 0.0005)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(40):
        wait()
    end.record()
    assert not end.query()
    end.synchronize()
    assert 0.8 * 20.0 < start.elapsed_time(end) < 1.3 * 20.0
