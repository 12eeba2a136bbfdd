"""The origin's tables from a study whose figures are known."""

from __future__ import annotations

import json
import math

import pytest

from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import write_rows
from qwencli.bench.studies import origin_tables
from qwencli.bench.studies.study_evidence import Evidence
from qwencli.bench.studies.study_plan import FORMAT, process_folder
from qwencli.bench.studies.study_worker import COLUMNS

TOKENS = 21
CELL = {"cell_id": "c", "model": "m", "quantization": "none", "attention": "sdpa"}
# tok/s of the whole generate() by condition, for each round.
PROCESSES = {
    "theirs": {
        "engine": "transformers",
        "cache": "dynamic",
        "runs": {
            "plain": [20.0, 21.0, 19.0],
            "reload": [20.0, 10.0, 20.0],
            "python-thread": [10.0, 10.5, 9.5],
            "reload-matmul": [16.0, 8.0, 16.0],
            "watched-sdpa": [1.0, 1.0, 1.0],
        },
    },
    "ours": {
        "engine": "native",
        "cache": "static-graph",
        "runs": {"plain": [400.0] * 3, "reload": [400.0] * 3},
    },
}


def run_row(run, speed, load_s):
    seconds = TOKENS / speed
    return {
        "cell_id": "c", "run": run, "status": "ok" if run else "warmup",
        "num_new_tokens": TOKENS, "preprocess_s": 0.5, "e2e_s": 0.5 + seconds, "load_s": load_s,
        "ttft_s": 1.0 + (run == 2), "itl_p50_ms": 1e3 / speed, "stall_count": 1,
        "decode_tok_per_s": speed, "sm_clock_mhz_before": 990.0, "sm_clock_mhz_mean": 1980.0,
    }  # fmt: skip


@pytest.fixture
def evidence(tmp_path):
    processes = []
    for name, process in PROCESSES.items():
        own = process_folder(tmp_path, name)
        own.mkdir(parents=True)
        cell = {**CELL, "engine": process["engine"], "cache": process["cache"]}
        plan = {"cells": [cell], "max_new_tokens": TOKENS, "images": ["one"]}
        (own / "plan.json").write_text(json.dumps(plan))
        made = [(c, s, n) for c, by_round in process["runs"].items()
                for n, s in enumerate(by_round, start=1)]  # fmt: skip
        schedule = {"runs": [c for c, _, _ in made], "rounds": [n for _, _, n in made]}
        (own / "schedule.json").write_text(json.dumps(schedule))
        rows = [run_row(0, 5.0, 3.0)]
        rows += [
            run_row(run, speed, 2.0 if condition.startswith("reload") else None)
            for run, (condition, speed, _) in enumerate(made, start=1)
        ]
        write_rows(own / "runs.csv", columns.RUNS, rows)
        observed = [{"run": run, "condition": c} for run, (c, _, _) in enumerate(made, start=1)]
        write_rows(own / "conditions.csv", COLUMNS, observed)
        processes.append({"name": name, "environment": {}})
    document = {
        "format": FORMAT, "claims": ["C06"], "places": [], "blocked": {}, "about": {},
        "blocked_tests": [], "processes": processes, "model": "m", "max_new_tokens": TOKENS,
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(document))
    (tmp_path / "environment.json").write_text("{}")
    return Evidence(tmp_path)


def column(table, name, **wanted):
    head, body = table
    rows = [dict(zip(head, row, strict=True)) for row in body]
    return [row[name] for row in rows if all(row[key] == text for key, text in wanted.items())]


def test_speed_by_mode_stands_beside_the_origins(evidence):
    table = origin_tables.mode_table(origin_tables.kept_modes(evidence))
    assert column(table, "origin tok/s", engine="transformers", attention="sdpa") == ["16.8", "5.0"]
    assert column(table, "here tok/s", attention="sdpa") == ["20", "not run here", "400"]
    assert column(table, "slowest-fastest", engine="native") == ["400-400"]


def test_a_mode_that_another_table_has_is_no_gap(evidence):
    measured = origin_tables.kept_modes(evidence)
    flash = ("transformers", "4bit", "flash_attention_2")
    assert flash not in measured
    rows = origin_tables.mode_table(measured)[1]
    fewer = origin_tables.mode_table(measured, {flash, *measured})[1]
    assert [row for row in rows if row not in fewer] == [[*flash, "11.8", "not run here", "-", "0"]]


def test_run_after_run_with_the_clock_before_and_during(evidence):
    table = origin_tables.run_table(origin_tables.series(evidence))
    assert column(table, "tok/s", engine="transformers", model="reload") == ["20", "10", "20"]
    assert column(table, "load s", engine="transformers", model="keep") == ["-"] * 3
    assert set(column(table, "MHz before")) == {"990"}
    assert set(column(table, "MHz during")) == {"1980"}


def test_the_first_token_of_a_process_is_there_too(evidence):
    table = origin_tables.stall_table(evidence)
    assert column(table, "run", model="first ever") == ["0", "0"]
    assert column(table, "first stall s", engine="native", model="keep") == ["1", "2", "1"]


def test_steadiness_of_both_engines_below_the_origins(evidence):
    table = origin_tables.steadiness_table(origin_tables.series(evidence))
    ratio = "fastest over slowest"
    assert column(table, ratio) == ["2.764", "1.105", "2.000", "1.000", "1.000"]
    assert column(table, "worst TTFT over median", engine="native")[0] == "2.000"
    assert column(table, "decode tok/s against keep", engine="native") == ["+0.0%"] * 2


def test_factors_are_ranked_by_their_share_of_the_origins_ratio(evidence):
    found = {factor.name: factor for factor in origin_tables.factors(evidence)}
    # Against the engine as it is; a warm-up after a load against the load without one.
    assert found["python-thread"].slowdown.estimate == pytest.approx(2.0, rel=0.06)
    assert found["python-thread"].share_percent == pytest.approx(
        100 * math.log(found["python-thread"].slowdown.estimate) / math.log(2.76)
    )
    assert found["reload-matmul"].slowdown.estimate == pytest.approx(1.25, rel=0.06)
    assert "watched-sdpa" not in found
    shares = [factor.share_percent for factor in origin_tables.factors(evidence)]
    assert shares == sorted(shares, reverse=True)
