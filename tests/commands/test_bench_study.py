"""`qwencli bench study` as it is typed, with the bundled model on the CPU."""

from __future__ import annotations

import copy
import csv
import functools

import pytest
from typer.testing import CliRunner

from qwencli.bench.plan import environment
from qwencli.bench.plan.predict import MachineSpeed
from qwencli.bench.studies import study_run
from qwencli.cli import app
from tests.bench.conftest import CPU

SMALL = ["--model", "scenes", "--device", "cpu"]
ASK = functools.cache(environment._ask)


@pytest.fixture(autouse=True)
def asked_once(monkeypatch):
    """The machine is asked about itself by processes that import torch, but once for all tests."""
    monkeypatch.setattr(environment, "_ask", lambda *question: copy.deepcopy(ASK(*question)))


@pytest.fixture
def known(monkeypatch):
    """What is known of the machine, where a command would ask it and nothing is measured after."""
    monkeypatch.setattr(environment, "read_device_facts", lambda device: CPU)
    monkeypatch.setattr(study_run, "read_machine_speed", lambda _: MachineSpeed(1e10, 1e5, 2.0))


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", "study", *arguments])


def test_the_list_has_every_claim():
    result = invoke("LIST")
    assert result.exit_code == 0
    assert all(f"C{number:02}" in result.stdout for number in range(1, 26))


@pytest.mark.slow
def test_claims_are_settled_on_a_cpu(tmp_path):
    """What CI repeats: real engine, real rows, a verdict and a file for each part."""
    folder = tmp_path / "s"
    result = invoke("--claims", "C03,C18,C20", *SMALL, "--quick", "--out", str(folder), "--share")
    assert result.exit_code == 0, result.output
    with (folder / "verdicts.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["claim"], row["part"]): row for row in csv.DictReader(file)}
    # Reading the whole prompt again for every token costs a multiple; three runs of each on a busy
    # machine may leave that within their noise.
    test = rows["C03", "1"]
    assert rows["C03", "0"]["verdict"] == test["verdict"] != "refuted"
    assert (test["verdict"] == "supported") == (float(test["effect_low"]) > 1.5)
    assert (test["n"], test["n_against"]) == ("3", "3")
    assert all((folder / row).exists() for row in (test["evidence"], test["evidence_against"]))
    assert rows["C18", "1"]["verdict"] == "supported"
    assert rows["C18", "2"]["verdict"] == rows["C20", "0"]["verdict"] == "cannot run here"
    assert (tmp_path / "s.zip").is_file()


@pytest.mark.usefixtures("known")
def test_the_plan_is_shown_without_running(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("C03", "C25", *SMALL, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "all together about" in result.stdout
    assert "C25 cannot run here" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["C99"], "'C99' is not a claim"),
        ([], "no claim is named"),
        (["C03", "--part", "3/2"], "not a part of a whole"),
        (["C03", "--part", "half"], "not a part of a whole"),
        (["C03", "--resume"], "--resume needs --out"),
        (["C03", "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert says in str(result.exception) or says in result.output


@pytest.mark.usefixtures("known")
def test_verdicts_are_made_again_from_the_rows(tmp_path):
    folder = tmp_path / "s"
    assert invoke("C12", *SMALL, "--out", str(folder)).exit_code == 0
    (folder / "verdicts.csv").unlink()
    result = CliRunner().invoke(app, ["bench", "report", str(folder)])
    assert result.exit_code == 0, result.output
    assert "cannot run here" in result.stdout
    assert (folder / "verdicts.csv").is_file()
