from __future__ import annotations

import shutil

import pytest
from typer.testing import CliRunner

from qwencli.bench.inject.confusion import NONE, TRUTH_COLUMNS, rows_of
from qwencli.bench.run.campaign import write_json
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import write_rows
from qwencli.cli import app
from tests.bench.attribution.made_cell import MadeCell
from tests.bench.synthetic_campaign import ENVIRONMENT


@pytest.fixture
def injected(tmp_path):
    """A finished campaign in which run 5 was stopped."""
    cell = MadeCell()
    start, end = cell.slow(5, 40, 80.0, main_cpu_ms=3.0, voluntary_switches=1)
    cell.event(5, "stop", end, 0.0)
    folder = tmp_path / "c"
    folder.mkdir()
    names = {
        "runs": columns.RUNS,
        "tokens": columns.TOKENS,
        "host": columns.HOST,
        "gpu": columns.GPU,
    }
    for (name, columns_of), rows in zip(names.items(), cell.rows(), strict=True):
        write_rows(folder / f"{name}.csv", columns_of, rows)
    truth = [row for run in cell.itl if run != 5 for row in rows_of(run, NONE, [])]
    truth += rows_of(5, "suspended", [(start, end)])
    write_rows(folder / "truth.csv", TRUTH_COLUMNS, truth)
    axes = {
        "model": "m", "engine": "native", "quantization": "none", "attention": "sdpa",
        "cache": "static", "load_mode": "keep",
    }  # fmt: skip
    plan = {
        "runs": 8, "max_new_tokens": 100, "prompt": "p", "images": [], "device": "cuda:0",
        "dtype": "auto", "load_format": "dummy",
        "cells": [{"cell_id": "cell-1", **axes, "skip_reason": None}],
    }  # fmt: skip
    write_json(folder / "plan.json", plan)
    write_json(folder / "environment.json", ENVIRONMENT)
    return folder


def test_report_rebuilds_the_confusion_matrix(injected):
    done = CliRunner().invoke(app, ["bench", "report", str(injected)])
    assert done.exit_code == 0, done.output
    assert "disturbed runs whose cause is named: 100.0% of 1" in done.output
    assert (injected / "confusion.csv").read_text(encoding="utf-8").startswith("unit,injected")
    assert "suspended" in (injected / "causes.csv").read_text(encoding="utf-8")


def test_report_of_an_ordinary_campaign_has_none(injected):
    (injected / "truth.csv").unlink()
    done = CliRunner().invoke(app, ["bench", "report", str(injected)])
    assert done.exit_code == 0, done.output
    assert not (injected / "confusion.csv").exists()
    shutil.rmtree(injected)


def test_a_wrong_cause_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("qwencli.bench.inject.injection_run.prepare", pytest.fail)
    done = CliRunner().invoke(app, ["bench", "inject", "gremlins"])
    assert done.exit_code != 0
    assert "'gremlins' cannot be injected" in str(done.exception) + done.output
