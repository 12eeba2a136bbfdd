"""A small injection in real processes: faults are made, recorded, and compared with findings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwencli.bench.causes import Cause
from qwencli.bench.inject.confusion import NONE
from qwencli.bench.inject.faults import ALL, KINDS, choose
from qwencli.bench.inject.injection_run import CONTROLS, Injection, run_injection, schedule
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import read_rows
from qwencli.errors import BenchError, UsageError
from qwencli.output import Output

linux = pytest.mark.skipif(sys.platform != "linux", reason="some faults need Linux")
WORKER = [sys.executable, str(Path(__file__).with_name("busy_engine.py"))]
# The other two need torch, whose import alone takes longer than all of these.
CAUSES = ("gc", "gil", "preemption", "suspended", "idle_gap", "reload")


@linux
def test_every_fault_is_made_recorded_and_counted(tmp_path, make_plan, cpu):
    plan = make_plan("busy", tokens=60)
    injection = Injection(CAUSES, trials=1, seed=3)
    found = run_injection(
        plan, cpu, injection, tmp_path / "c", ["bench"], Output(quiet=True), WORKER
    )
    planned = schedule([Cause(name) for name in CAUSES], 1, 3)
    truth = read_rows(tmp_path / "c" / "truth.csv")
    assert [planned[int(run) - 1] for run in dict.fromkeys(row["run"] for row in truth)] == planned
    spans = {cause: [row for row in truth if row["cause"] == cause] for cause in CAUSES}
    assert {cause: len(rows) for cause, rows in spans.items()} == {
        "gc": 3, "gil": 3, "suspended": 3, "idle_gap": 3, "preemption": 1, "reload": 1,
    }  # fmt: skip
    for cause in ("gc", "suspended", "idle_gap"):
        assert all(float(row["span_ms"]) >= 55.0 for row in spans[cause])
    assert all(float(row["span_ms"]) >= 20.0 for row in spans["gil"])
    runs = {row["run"]: row for row in read_rows(tmp_path / "c" / "runs.csv")}
    reloaded = spans["reload"][0]["run"]
    assert [run for run, row in runs.items() if row["load_s"]] == ["0", reloaded]
    # Each disturbance is a gap; the machine of the tests may be too busy to ask for its cause.
    assert found.events.total() == 13
    assert sum(n for (_, said), n in found.events.items() if said == NONE) <= 2
    assert found.events["suspended", "suspended"] >= 2
    assert found.events["gc", "gc"] >= 2
    assert found.runs.total() == len(planned)
    probes = read_rows(tmp_path / "c" / "probes.csv")
    assert {row["sampler"] for row in probes} == {""}  # there is none here to be switched
    assert all(float(row["itl_probe_on_ms"]) > 1.0 for row in probes)
    rows = read_rows(tmp_path / "c" / "confusion.csv")
    assert sum(int(row["count"]) for row in rows if row["unit"] == "run") == len(planned)
    assert "| gc |" in (tmp_path / "c" / "confusion.md").read_text(encoding="utf-8")
    assert tuple(read_rows(tmp_path / "c" / "causes.csv")[0]) == columns.CAUSES


def test_no_cell_that_can_run_is_said(make_plan, cpu, tmp_path):
    plan = make_plan("busy", cache=("static-graph",), engine=("transformers",))
    with pytest.raises(BenchError, match="no cell can run here"):
        run_injection(
            plan, cpu, Injection((ALL,), 1, 0), tmp_path / "c", [], Output(quiet=True), WORKER
        )


def test_the_schedule_is_of_the_seed_and_mostly_undisturbed():
    causes = [Cause.GC, Cause.GIL]
    planned = schedule(causes, 10, 7)
    assert planned == schedule(causes, 10, 7) != schedule(causes, 10, 8)
    assert planned.count("gc") == planned.count("gil") == 10
    assert planned.count(NONE) == CONTROLS * 20


def test_what_can_be_injected_depends_on_the_device():
    here, blocked = choose((ALL,), "cpu")
    assert set(here) | set(blocked) == set(KINDS)
    assert blocked[Cause.HOST_SYNC] == "needs a CUDA device"
    assert not set(choose((ALL,), "cuda:0")[1]) & {Cause.HOST_SYNC, Cause.ALLOCATOR}
    assert choose(("gil", "gc"), "cpu") == ([Cause.GC, Cause.GIL], {})


@pytest.mark.parametrize("name", ["clock", "GC", ""])
def test_a_cause_that_cannot_be_injected_is_named(name):
    with pytest.raises(UsageError, match="cannot be injected"):
        choose((name,), "cpu")


def test_a_cause_that_needs_another_device_says_so():
    with pytest.raises(UsageError, match="needs a CUDA device"):
        choose(("allocator",), "cpu")
