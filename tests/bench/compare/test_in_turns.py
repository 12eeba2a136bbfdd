"""Campaigns made in turns, and the script that compares them, over a fake engine."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import pytest

from benchmarks import a_against_a
from qwencli.bench.compare import compare_run
from qwencli.bench.compare.comparison import compare
from qwencli.bench.compare.sides import read_side
from qwencli.bench.plan.environment import environment
from qwencli.bench.plan.prepare import BenchRequest
from qwencli.bench.plan.stopping import RepetitionOptions, StopRule, stop_rule
from qwencli.bench.run import bench_run
from qwencli.bench.run.campaign import Campaign
from qwencli.bench.run.campaign_runner import RunnerOptions, run_in_turns
from qwencli.bench.storage.row_file import read_rows
from qwencli.config import DType, LoadFormat
from qwencli.errors import BenchError
from qwencli.output import Output


@pytest.fixture
def order(monkeypatch):
    """Which campaign each process wrote to, in the order of time."""
    runs = []
    add_run = Campaign.add_run

    def noted(self, cell, *rest):
        runs.append((self.folder.name, cell.model))
        add_run(self, cell, *rest)

    monkeypatch.setattr(Campaign, "add_run", noted)
    return lambda: [key for key, _ in groupby(runs)]


def in_turns(folder, plan, cpu, worker, go_on=lambda: True):
    about = environment(cpu, [], plan.settings.seed)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Campaign(folder / name, plan, about, resume=False))
            for name in ("a", "b")
        ]
        run_in_turns(sides, RunnerOptions(worker, None, 60.0), lambda line: None, go_on)


def test_campaigns_take_turns_there_and_back(tmp_path, cpu, fake_worker, make_plan, order):
    plan = make_plan("steady-a", "steady-b", stop=StopRule(4, 4, processes=2))
    in_turns(tmp_path, plan, cpu, fake_worker)
    assert [side for side, _ in order()] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert all(one[1] == other[1] for one, other in zip(order()[::2], order()[1::2], strict=True))
    for name in ("a", "b"):
        runs = [row["run"] for row in read_rows(tmp_path / name / "runs.csv")]
        assert sorted(runs) == sorted(["0", "1", "2", "0", "3", "4"] * 2)


def test_two_matrices_take_turns_and_are_compared(
    tmp_path, cpu, fake_worker, make_plan, monkeypatch
):
    plans = {"A": make_plan("steady-a"), "B": make_plan("steady-b")}

    def prepare(request):
        plan = plans[request.matrix]
        rule = stop_rule(request.repetition)
        return replace(plan, settings=replace(plan.settings, stop=rule)), cpu

    monkeypatch.setattr(compare_run, "prepare", prepare)
    request = BenchRequest(
        "", {}, (), RepetitionOptions(runs=10, processes=5), None, None, (), 0, "cpu",
        DType.AUTO, LoadFormat.AUTO, None, 0,
    )  # fmt: skip
    out = tmp_path / "out"
    a, b = compare_run.run_sides(request, ("A", "B"), out, [], Output(quiet=True), fake_worker)
    (cell,) = compare(read_side(a), read_side(b), force=True).cells
    assert len(cell.a.processes) == len(cell.b.processes) == 5
    assert not cell.ratio.few
    plans["B"] = make_plan("steady-b", "steady-c")
    with pytest.raises(BenchError, match="1 cell of A can run here and 2 of B"):
        compare_run.run_sides(request, ("A", "B"), tmp_path / "no", [], Output(quiet=True))


def test_what_takes_long_is_said_before_sides_take_turns(
    tmp_path, cpu, fake_worker, make_plan, monkeypatch, capsys
):
    plan = make_plan("steady-a")
    (cell,) = plan.cells
    rule = StopRule(10, 10, processes=5)
    plan = replace(plan, settings=replace(plan.settings, stop=rule))
    asked = []

    def predicted(plan, speed, *, limits):
        asked.append(limits)
        return {cell.cell_id: 400.0}

    monkeypatch.setattr(compare_run, "prepare", lambda request: (plan, cpu))
    monkeypatch.setattr(bench_run, "predicted_seconds", predicted)
    monkeypatch.setattr(bench_run, "read_machine_speed", lambda device: None)
    request = BenchRequest(
        "", {}, (), RepetitionOptions(runs=10, processes=5), None, None, (), 0, "cpu",
        DType.AUTO, LoadFormat.AUTO, None, 0,
    )  # fmt: skip
    compare_run.run_sides(request, ("A", "A"), tmp_path / "out", [], Output(), fake_worker)
    said = capsys.readouterr().err
    assert "about 13 min 20 s for 2 cells; less with fewer cells in the matrices" in said
    assert "process 1 of 5, a, about 13 min" in said
    assert not any(asked), "nothing is measured after the runs of sides"


def test_no_round_begins_once_it_may_not_go_on(tmp_path, cpu, fake_worker, make_plan, order):
    answers = iter([True, False])
    in_turns(tmp_path, make_plan("steady-a", "steady-b"), cpu, fake_worker, lambda: next(answers))
    assert [side for side, _ in order()] == ["a", "b"]


def test_the_script_compares_what_it_made(
    tmp_path, cpu, fake_worker, make_plan, order, monkeypatch, capsys
):
    plan = make_plan("steady-a", "steady-b", "steady-c", runs=3)
    monkeypatch.setattr(a_against_a, "prepare", lambda request: (plan, cpu))
    monkeypatch.setattr(a_against_a, "worker_command_for", lambda percent: fake_worker)
    words = ["a_against_a", "--out", str(tmp_path), "--planted", "3", "--planted-cells", "2"]
    monkeypatch.setattr(sys, "argv", words)
    assert a_against_a.main() == 0
    first_two = {cell.model for cell in plan.order()[:2]}
    assert {model for side, model in order() if side == "planted"} == first_two
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["b"]["cells"], last["b"]["none"], last["planted"]["cells"]) == (3, 0, 2)
    document = json.loads((tmp_path / "comparisons.json").read_text(encoding="utf-8"))
    assert len(document["planted"]["only_in_a"]) == 1
    assert (tmp_path / "planted" / "report.md").exists()


def test_the_script_ends_at_its_time_with_valid_campaigns(
    tmp_path, cpu, fake_worker, make_plan, monkeypatch, capsys
):
    plan = make_plan("steady-a", "steady-b", runs=3)
    monkeypatch.setattr(a_against_a, "prepare", lambda request: (plan, cpu))
    monkeypatch.setattr(a_against_a, "worker_command_for", lambda percent: fake_worker)
    clock = iter([0.0, 1.0, 11.0])
    monkeypatch.setattr(a_against_a, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    words = ["a_against_a", "--out", str(tmp_path / "out"), "--max-time", "10"]
    monkeypatch.setattr(sys, "argv", words)
    assert a_against_a.main() == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["b"]["cells"], last["b"]["none"]) == (1, 1)
