"""The rule of `bench compare` against machines that are known, because they are drawn here."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from qwencli.bench.compare.comparison import decide
from qwencli.bench.compare.intervals import ratio_intervals


def machine(rng, processes, runs, run, process, *, two_kinds=0.0, start=0.0, end=0.0):
    """Speeds by process; standard deviations, kinds and drift as shares of the speed.

    Args:
        run, process: what runs of one process differ by, and what processes differ by.
        two_kinds: half of all processes are faster by this share.
        start, end: where a straight drift begins and ends.
    """
    drift = np.linspace(start, end, processes * runs).reshape(processes, runs)
    offsets = process * rng.standard_normal((processes, 1))
    kinds = two_kinds * rng.integers(0, 2, (processes, 1))
    noise = run * rng.standard_normal((processes, runs))
    return (100 * np.exp(drift + offsets + kinds + noise)).tolist()


def shares(processes, runs, *, gpu, change=0.0, drift=0.0, cells=400, **noise):
    """Share of each verdict: A and, after it in time, B, slower by `change`."""
    rng = np.random.default_rng(0)
    found = Counter()
    for _ in range(cells):
        a = machine(rng, processes, runs, end=-drift / 2, **noise)
        b = machine(rng, processes, runs, start=-drift / 2, end=-drift, **noise)
        b = [[speed * (1 - change) for speed in process] for process in b]
        found[str(decide(ratio_intervals(a, b, gpu=gpu)))] += 1
    return {verdict: found[verdict] / cells for verdict in ("SAME", "FASTER", "SLOWER")}


# Processes a side, runs of each, and how they scatter on a GPU that does nothing else.
QUIET_GPU = [
    (1, 5, {"run": 0.0005, "process": 0.001}),
    (1, 10, {"run": 0.003, "process": 0.001}),
    (1, 10, {"run": 0.001, "process": 0.002}),
    (2, 5, {"run": 0.003, "process": 0.001}),
    (2, 5, {"run": 0.001, "process": 0.002}),
    (3, 4, {"run": 0.001, "process": 0.002}),
    (5, 4, {"run": 0.003, "process": 0.003}),
]


@pytest.mark.parametrize(("processes", "runs", "noise"), QUIET_GPU)
def test_on_a_quiet_gpu_no_change_is_the_same(processes, runs, noise):
    assert shares(processes, runs, gpu=True, **noise)["SAME"] >= 0.95


@pytest.mark.parametrize(("processes", "runs", "noise"), QUIET_GPU)
def test_on_a_quiet_gpu_a_slowdown_of_3_percent_is_found(processes, runs, noise):
    assert shares(processes, runs, gpu=True, change=0.03, **noise)["SLOWER"] >= 0.95


@pytest.mark.parametrize(("processes", "runs"), [(1, 5), (1, 10), (2, 5), (3, 4), (5, 4)])
@pytest.mark.parametrize(
    "noise",
    [
        {"run": 0.003, "process": 0.03},  # looks steady from within each process
        {"run": 0.01, "process": 0.08},
        {"run": 0.003, "process": 0.001, "two_kinds": 0.05},
        {"run": 0.01, "process": 0.01, "drift": 0.05},
    ],
    ids=["processes", "wild processes", "two kinds", "drift"],
)
def test_a_busy_cpu_alone_is_never_called_a_change(processes, runs, noise):
    found = shares(processes, runs, gpu=False, **noise)
    assert found["FASTER"] + found["SLOWER"] <= 0.01


@pytest.mark.parametrize(("processes", "runs"), [(1, 10), (2, 5), (3, 4)])
def test_what_is_known_of_quiet_gpus_is_not_believed_of_others(processes, runs):
    # Runs scatter by 2 %, so that processes may scatter by 3 %.
    found = shares(processes, runs, gpu=True, run=0.02, process=0.03)
    assert found["FASTER"] + found["SLOWER"] <= 0.01


def test_a_change_at_the_edge_of_the_band_is_rarely_called_the_same():
    # The two one-sided tests' own error: at most 5 %.
    assert shares(5, 4, gpu=True, change=0.01, run=0.001, process=0.001)["SAME"] <= 0.05


def test_a_quiet_cpu_needs_several_processes_to_tell():
    noise = {"run": 0.001, "process": 0.001}
    assert shares(1, 20, gpu=False, **noise)["SAME"] == 0.0
    assert shares(5, 4, gpu=False, **noise)["SAME"] >= 0.95
    assert shares(5, 4, gpu=False, change=0.03, **noise)["SLOWER"] >= 0.95


def test_one_far_run_of_a_process_does_not_make_it_restless_and_two_do():
    steady = [100.0, 100.1, 99.9, 100.0, 100.05, 99.95, 100.0, 100.1]
    assert not ratio_intervals([steady], [[*steady[:-1], 95.0]], gpu=True).restless
    assert ratio_intervals([steady], [[*steady[:-2], 95.0, 95.5]], gpu=True).restless


def test_swapping_the_sides_turns_the_intervals_over():
    a, b = [[100.0, 101.0], [99.0, 100.5]], [[97.0, 98.0, 97.5]]
    there, back = ratio_intervals(a, b, gpu=True), ratio_intervals(b, a, gpu=True)
    for one, other in ((there.same, back.same), (there.change, back.change)):
        assert (one.low, one.high) == pytest.approx((1 / other.high, 1 / other.low))


def test_a_change_never_needs_less_than_the_same():
    rng = np.random.default_rng(1)
    for processes in (1, 2, 3, 6):
        a, b = (machine(rng, processes, 4, 0.004, 0.004) for _ in range(2))
        found = ratio_intervals(a, b, gpu=True)
        assert found.change.low <= found.same.low <= found.same.estimate
        assert found.same.estimate <= found.same.high <= found.change.high


def test_three_runs_are_the_fewest_in_however_many_processes():
    assert ratio_intervals([[100.0], [100.1]], [[100.0] * 5], gpu=True) is None
    found = ratio_intervals([[100.0], [100.1], [99.9]], [[100.0], [100.2], [100.1]], gpu=True)
    assert found.few is False
    assert math.isfinite(found.change.high)
