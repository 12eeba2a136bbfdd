from __future__ import annotations

import pytest

from qwencli.bench.inject.confusion import (
    NONE,
    confusion,
    holds,
    markdown,
    rows_of,
    summary,
    verdict,
)


def texts(row):
    return {key: "" if value is None else str(value) for key, value in row.items()}


def run(number, **changes):
    return {"run": str(number), "status": "ok", "ttft_s": "0.05", "decode_s": "0.2", **changes}


def finding(number, cause, lost_ms=50.0, scope="gap", t_s=1.0, span_ms=60.0):
    row = {"run": number, "scope": scope, "cause": cause, "lost_ms": lost_ms}
    return texts({**row, "t_s": t_s, "span_ms": span_ms})


def host(number, waited_ms=0.0, steal_ms=0.0):
    row = {"run": number, "event": "decode", "span_ms": 200.0}
    return texts({**row, "runqueue_ms": waited_ms, "steal_ms": steal_ms})


def count(truth, causes, runs, rows=()):
    return confusion(map(texts, truth), causes, runs, rows)


def test_what_was_done_is_counted_against_what_was_said():
    truth = [
        *rows_of(1, "gc", [(0.94, 1.0), (1.5, 1.6)]),
        *rows_of(2, NONE, []),
        *rows_of(3, NONE, []),
        *rows_of(4, "reload", [(2.0, 3.0)]),
    ]
    causes = [
        finding(1, "gc"),
        finding(1, "unknown", lost_ms=1.0, t_s=1.2),
        finding(3, "preemption"),
        finding(4, "reload", scope="prefill", lost_ms=20.0),
    ]
    rows = [host(1), host(2), host(3, waited_ms=15.0), host(4)]
    found = count(truth, causes, [run(n) for n in (1, 2, 3, 4)], rows)
    assert found.runs == {
        ("gc", "gc"): 1, (NONE, NONE): 1, (NONE, "preemption"): 1, ("reload", "reload"): 1,
    }  # fmt: skip
    # The second collection overlaps no gap; a reload is no moment of a decode.
    assert found.events == {("gc", "gc"): 1, ("gc", NONE): 1}
    assert found.quiet == {(NONE, NONE): 1}
    assert (found.accuracy, found.event_accuracy) == (1.0, 0.5)
    assert (found.blamed(found.runs), found.blamed(found.quiet)) == (0.5, 0.0)
    assert holds(found)
    assert "undisturbed runs blamed: 50.0% of 2" in summary(found)
    assert "| none |" in markdown(found)


def test_a_missed_cause_is_a_miss_and_a_false_one_blame():
    found = count([*rows_of(1, "gc", [(0.9, 1.0)])], [], [run(1)])
    assert found.accuracy == 0.0
    assert not holds(found)
    blamed = count([*rows_of(1, NONE, [])], [finding(1, "gil")], [run(1)], [host(1)])
    assert blamed.accuracy is None
    assert not holds(blamed)


def test_unknown_blames_nobody():
    found = count([*rows_of(1, NONE, [])], [finding(1, "unknown")], [run(1)], [host(1)])
    assert found.blamed(found.runs) == 0.0


def test_the_hypervisor_makes_a_run_doubtful():
    rows = [host(1, steal_ms=10.0)]
    assert count([*rows_of(1, NONE, [])], [], [run(1)], rows).quiet == {}


def test_runs_that_did_not_finish_are_left_out():
    assert count([*rows_of(1, "gc", [])], [], []).runs == {}


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        ([], NONE),
        ([finding(1, "gc", lost_ms=5.0)], NONE),
        ([finding(1, "gc", lost_ms=7.0)], "gc"),
        ([finding(1, "gc", lost_ms=30.0), finding(1, "gil", lost_ms=20.0)], "gc"),
        # 10 ms of a 50 ms prefill weigh more than 30 ms of a 200 ms decode.
        ([finding(1, "gc", 30.0), finding(1, "reload", 10.0, scope="prefill")], "reload"),
    ],
)
def test_a_run_suffers_from_what_made_a_phase_longest(findings, said):
    assert verdict(findings, run(1)) == said
