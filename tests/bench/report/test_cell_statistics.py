from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.report.cell_statistics import cell_rows
from qwencli.bench.statistics.robust import run_ratio
from qwencli.bench.statistics.slow_tokens import percentile, run_latency

AXES = {
    "cell_id": "c",
    "model": "m",
    "engine": "transformers",
    "quantization": "none",
    "attention": "sdpa",
    "cache": "dynamic",
    "load_mode": "keep",
    "skip_reason": None,
}
RUN = {
    "cell_id": "c",
    "reason": "",
    "num_new_tokens": "4",
    "decode_tok_per_s": "10.0",
    "ttft_s": "0.5",
    "peak_allocated_bytes": "",
    "ran_attention": "sdpa",
    "ran_cache": "dynamic",
    "text_sha256": "aa",
}


def runs(*changes):
    """A warm-up and one run for each change."""
    warm_up = {**RUN, "run": "0", "status": "warmup"}
    return [
        warm_up,
        *({**RUN, "run": str(i), "status": "ok", **change} for i, change in enumerate(changes, 1)),
    ]


def cell(rows, tokens=(), **axes):
    plan = {"runs": len(rows) - 1, "cells": [{**AXES, **axes}]}
    (row,) = cell_rows(plan, rows, tokens)
    return row


def test_speeds_leave_the_warm_up_out():
    rows = runs(
        {"decode_tok_per_s": "10"}, {"decode_tok_per_s": "10.4"}, {"decode_tok_per_s": "9.9"}
    )
    rows[0]["decode_tok_per_s"] = "1"
    row = cell(rows)
    assert row["decode_tok_per_s_median"] == 10
    assert (row["decode_tok_per_s_min"], row["decode_tok_per_s_max"]) == (9.9, 10.4)
    assert row["run_ratio_max_min"] == pytest.approx(10.4 / 9.9)
    assert row["verdict"] == "ok"


def test_the_thread_that_waited_most_counts_where_it_is_known():
    rows = runs({"main_thread_cpu_percent": "99.5"}, {"main_thread_cpu_percent": "62"}, {})
    assert cell(rows)["main_thread_cpu_percent_min"] == 62
    assert cell(runs({}))["main_thread_cpu_percent_min"] is None


def test_latencies_are_pooled_over_measured_runs():
    tokens = [
        {"cell_id": "c", "run": run, "itl_ms": itl}
        for run, itl in [("0", "999"), ("1", ""), ("1", "1"), ("1", "2"), ("2", "3"), ("9", "999")]
    ]
    row = cell(runs({}, {}), tokens)
    assert (row["itl_p50_ms"], row["itl_max_ms"]) == (2.0, 3.0)


def test_what_was_not_measured_is_none():
    row = cell(runs({"decode_tok_per_s": "", "ttft_s": ""}))
    for column in ("decode_tok_per_s_median", "run_ratio_max_min", "itl_p99_ms", "ttft_s_median",
                   "peak_allocated_bytes", "mbu_percent", "exact_match_percent"):  # fmt: skip
        assert row[column] is None


@pytest.mark.parametrize(
    ("changes", "axes", "verdict"),
    [
        ([{}, {"text_sha256": "bb"}], {}, "FAIL: text changed between greedy runs"),
        ([{}, {"num_new_tokens": "3"}], {}, "FAIL: unequal work (3 to 4 tokens)"),
        ([{}], {"attention": "eager"}, "FAIL: attention sdpa ran, not eager"),
        ([{}], {"cache": "static"}, "FAIL: cache dynamic ran, not static"),
        ([{}], {"attention": "auto"}, "ok"),
        ([{}, {"decode_tok_per_s": "11.2"}], {}, "unstable: runs differ 1.12x"),
        ([{}, {"decode_tok_per_s": "10.9"}], {}, "ok"),
    ],
)
def test_verdicts(changes, axes, verdict):
    assert cell(runs(*changes), **axes)["verdict"] == verdict


def test_the_first_run_of_the_process_must_give_the_same_text():
    rows = runs({}, {})
    rows[0]["text_sha256"] = "bb"
    assert cell(rows)["verdict"] == "FAIL: text changed between greedy runs"


def test_figures_of_a_cell_that_broke_are_marked_incomplete():
    rows = [*runs({}, {}), {**RUN, "run": "3", "status": "killed", "reason": "by SIGKILL"}]
    row = cell(rows)
    assert (row["status"], row["reason"], row["runs"]) == ("killed", "by SIGKILL", 2)
    assert row["verdict"] == "incomplete: 2 of 3 runs"


def test_a_cell_without_rows_is_unfinished():
    (row,) = cell_rows({"runs": 2, "cells": [AXES]}, [], [])
    assert (row["status"], row["runs"], row["verdict"]) == ("unfinished", 0, None)


@given(st.lists(st.floats(0.001, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_agrees_with_numpy(values, percent):
    import numpy as np

    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_stalls_are_slow_by_the_rule_that_gives_tokens_a_cause():
    assert run_latency([1.0, 1.0, 1.0, 1.0, 2.4, 2.5, 50.0])["stall_count"] == 2
    restless = [5.0, 9.0, 4.0, 8.0, 5.0, 9.0, 13.0]
    assert run_latency(restless)["stall_count"] == 0
    assert run_latency([2.0])["stall_count"] == 0
    assert set(run_latency([]).values()) == {None}


def test_ratio_needs_two_runs():
    assert run_ratio([3.0]) is None
    assert run_ratio([3.0, 6.0]) == 2.0


def speeds(*values):
    return runs(*({"decode_tok_per_s": str(value)} for value in values))


def test_a_step_within_a_process_is_a_warning_and_a_steady_cell_has_none():
    wobble = [0.0, 0.05, -0.05, 0.02, -0.03, 0.04, -0.01, 0.03]
    steady = cell(speeds(*(100 + w for w in wobble * 2)))
    assert (steady["verdict"], steady["level"]) == ("ok", "stationary")
    assert steady["level_change_percent"] is None
    stepped = cell(speeds(*(100 + w for w in wobble), *(95 + w for w in wobble)))
    assert stepped["verdict"] == "unstable: speed stepped by -5.0% at run 9"
    assert stepped["level_change_percent"] == pytest.approx(-5, abs=0.1)


def test_a_drift_is_a_warning_and_a_tiny_one_is_not():
    drifting = cell(speeds(*(100 - 0.4 * run for run in range(12))))
    assert drifting["verdict"].startswith("unstable: speed drifted by -4.")
    tiny = cell(speeds(*(100 - 0.01 * run for run in range(12))))
    assert (tiny["verdict"], tiny["level"]) == ("ok", "drift")


def test_the_first_runs_stand_apart():
    rows = speeds(90, 100, 100.1, 99.9, 100, 100.2, 99.8)
    rows[0]["decode_tok_per_s"] = "20"
    row = cell(rows)
    assert row["warm_up_ratio"] == pytest.approx(0.2)
    assert row["first_run_ratio"] == pytest.approx(0.9)
    rows[0]["decode_tok_per_s"] = rows[1]["decode_tok_per_s"] = "100"
    row = cell(rows)
    assert row["warm_up_ratio"] is row["first_run_ratio"] is None


def test_shares_of_variance_sum_to_the_whole():
    rows = [*runs({}, {}), {**RUN, "run": "0", "status": "warmup"}]
    rows += [{**RUN, "run": run, "status": "ok"} for run in ("3", "4")]
    tokens = [
        {"cell_id": "c", "run": run, "itl_ms": str(itl + step)}
        for run, itl in (("1", 10), ("2", 12), ("3", 30), ("4", 31))
        for step in (0.0, 0.1, 0.2)
    ]
    row = cell(rows, tokens)
    shares = [
        row[f"variance_{level}_percent"]
        for level in ("within_run", "between_runs", "between_processes")
    ]
    assert sum(shares) == pytest.approx(100)
    assert shares[2] > 90


def test_an_interrupted_adaptive_cell_is_unfinished():
    stop = {"min_runs": 3, "max_noise_percent": 1e-9, "max_time_s": None, "processes": 1}
    plan = {"runs": 9, "stop": stop, "cells": [AXES]}
    (row,) = cell_rows(plan, speeds(9, 10, 11), [])
    assert (row["status"], row["stop_reason"]) == ("unfinished", None)
    assert row["verdict"].startswith("unstable")
    assert row["noise_percent"] == pytest.approx(10)
