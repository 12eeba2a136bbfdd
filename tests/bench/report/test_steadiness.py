from __future__ import annotations

import pytest

from qwencli.bench.report.steadiness import by_process, steadiness


def run(number, speed, cell="c", status=None):
    status = status or ("ok" if number else "warmup")
    return {"cell_id": cell, "run": str(number), "status": status, "decode_tok_per_s": str(speed)}


def token(number, itl, cell="c"):
    return {"cell_id": cell, "run": str(number), "itl_ms": str(itl)}


def test_a_steady_cell_with_a_slow_start():
    runs = [run(0, 20.0), *(run(i, 100 + i % 3) for i in range(1, 13))]
    (found,) = steadiness(runs, [])
    assert (found.cell_id, found.processes, found.shares) == ("c", 1, None)
    assert found.speed.estimate == 101.0
    assert found.speed_mad == 1.0
    assert [(first.run, first.differs) for first in found.first_runs] == [(0, True), (1, False)]
    assert found.stationarity.kind == "stationary"


def test_a_step_within_the_process_is_seen():
    runs = [run(0, 100.0), *(run(i, 100 + i % 3 - 10 * (i > 7)) for i in range(1, 15))]
    (found,) = steadiness(runs, [])
    assert found.stationarity.kind == "step"
    assert [step.index for step in found.stationarity.steps] == [7]  # before run 8


def test_a_resumed_cell_has_two_processes_that_share_the_variance():
    runs = [run(0, 1.0), run(1, 100.0), run(2, 100.0), run(3, "", status="killed"),
            run(0, 1.0), run(3, 50.0), run(4, 50.0)]  # fmt: skip
    tokens = [token(0, 999.0)]
    tokens += [token(i, itl) for i in (1, 2) for itl in ("", 9.9, 10.1)]
    tokens += [token(i, itl) for i in (3, 4) for itl in ("", 19.9, 20.1)]
    (found,) = steadiness(runs, tokens)
    assert (found.processes, len(by_process(runs))) == (2, 2)
    assert found.shares.between_processes > 0.99
    assert found.shares.between_runs == 0.0
    known = (found.shares.within_run, found.shares.between_runs, found.shares.between_processes)
    assert sum(known) == pytest.approx(1.0)
    assert found.stationarity.kind == "too few runs"


def test_cells_keep_their_order_and_those_without_a_run_are_left_out():
    runs = [run(0, 1.0, "b"), run(0, 1.0, "a"), run("", "", "x", "oom"), run(1, 5.0, "a"),
            run(1, 6.0, "b")]  # fmt: skip
    found = steadiness(runs, [])
    assert [one.cell_id for one in found] == ["b", "a"]
    assert [one.speed for one in found] == [None, None]
    assert [one.first_runs for one in found] == [(), ()]


def test_a_run_of_one_token_has_a_latency_of_none_and_costs_nothing():
    runs = [run(0, 1.0), run(1, 5.0), run(2, 5.0), run(3, 5.0)]
    (found,) = steadiness(runs, [token(1, 1.0), token(1, 3.0), token(2, "")])
    assert found.shares.within_run == 1.0


def test_the_order_of_runs_is_judged_within_the_longest_process():
    short = [run(0, 1.0), run(1, 50.0)]
    long = [run(0, 90.0), *(run(i, 100.0) for i in range(2, 10))]
    for runs in ([*short, *long], [*long, *short]):
        (found,) = steadiness(runs, [])
        assert found.processes == 2
        assert [first.ratio for first in found.first_runs] == [0.9, 1.0]
        assert found.stationarity.kind == "stationary"
