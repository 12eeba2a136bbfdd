from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.attribution.summary import (
    Tally,
    probe_line,
    read_tallies,
    tallies,
    why,
    with_causes,
    write_tallies,
)
from qwencli.bench.causes import Cause, Finding


def finding(cause, lost_ms, scope="gap", cell_id="a"):
    return Finding(cell_id, "1", scope, 5, 1, 2.0, lost_ms + 3, lost_ms, cause, 0.9, "because")


ROWS = [{"cell_id": "a"}, {"cell_id": "b"}]
RUNS = [
    {"cell_id": "a", "status": "warmup", "decode_s": "9.0"},
    {"cell_id": "a", "status": "ok", "decode_s": "1.0"},
    {"cell_id": "a", "status": "ok", "decode_s": "1.0"},
    {"cell_id": "b", "status": "skipped", "decode_s": ""},
]


def test_findings_are_counted_into_the_cells():
    found = [
        finding(Cause.GC, 30.0), finding(Cause.GIL, 50.0), finding(Cause.GC, 40.0),
        finding(Cause.RELOAD, 99.0, scope="prefill"),
    ]  # fmt: skip
    a, b = with_causes(ROWS, found, RUNS, [])
    assert a["gap_count"] == 3
    assert a["gap_lost_percent"] == pytest.approx(6.0)
    assert a["gap_causes"] == "gc:2:70.000|gil:1:50.000"
    assert a["slow_run_causes"] == "reload:1:99.000"
    assert b["gap_count"] is b["gap_causes"] is b["probe_overhead_percent"] is None
    gaps, slow = why(a)
    assert "3 gaps took 6.0% of decode, most of it because Python collected garbage" in gaps
    assert "gc 58% (2), gil 42% (1)" in gaps
    assert "1 slow phase of runs" in slow
    assert why(b) == []


def test_a_quiet_cell_has_zero_gaps_not_none():
    (quiet, _) = with_causes(ROWS, [], RUNS, [])
    assert (quiet["gap_count"], quiet["gap_lost_percent"], quiet["gap_causes"]) == (0, 0.0, None)
    assert why(quiet) == []


def probe(cell, run, sampler, watched, bare):
    return {
        "cell_id": cell, "run": str(run), "pair": "0", "sampler": sampler,
        "itl_probe_on_ms": str(watched), "itl_probe_off_ms": str(bare),
    }  # fmt: skip


def test_what_measuring_costs_is_said_of_the_worst_cell():
    probes = [
        probe(cell, run, "", watched, 2.0)
        for cell, watched in (("a", 2.01), ("b", 2.03))
        for run in range(8)
    ]
    rows = with_causes(ROWS, [], RUNS, probes)
    assert rows[0]["probe_overhead_percent"] == pytest.approx(0.5)
    assert rows[0]["sampler_overhead_percent"] is None
    assert probe_line(rows) == "measuring adds 1.5% to a token (1.5 to 1.5%), in the worst cell"
    assert probe_line(ROWS) is None


def test_the_sampler_is_judged_by_runs_with_and_without_it():
    probes = [
        probe("a", run, "on" if run % 2 else "off", 2.05, 2.04 if run % 2 else 2.0)
        for run in range(6)
        for _ in range(4)
    ]
    (row, _) = with_causes(ROWS, [], RUNS, probes)
    assert row["sampler_overhead_percent"] == pytest.approx(2.0)
    assert "the sensor sampler adds 2.0% to a token" in probe_line([row])


@given(st.lists(st.builds(finding, st.sampled_from(list(Cause)), st.floats(0, 1e6)), max_size=20))
def test_tallies_survive_the_file(found):
    counted = tallies(found)
    read = read_tallies(write_tallies(counted))
    assert [(t.cause, t.count) for t in read] == [(t.cause, t.count) for t in counted]
    assert [t.lost_ms for t in read] == pytest.approx([t.lost_ms for t in counted], abs=1e-3)


def test_nothing_found_is_an_empty_field():
    assert write_tallies([]) is None
    assert read_tallies(None) == read_tallies("") == []
    assert read_tallies("gc:2:3.5") == [Tally(Cause.GC, 2, 3.5)]


def test_a_cause_is_most_of_it_only_where_it_is():
    def said(*tallies):
        return why({"gap_causes": "|".join(tallies), "gap_lost_percent": 1.0})[0]

    assert "3 gaps took 1.0% of decode, all of it because" in said("gc:3:10.0")
    assert "most of it because" in said("gc:3:10.0", "gil:1:4.0")
    assert "the largest part because" in said("gc:3:10.0", "gil:1:9.0", "clock:1:8.0")
