from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from qwencli.commands.diagnose import diagnose
from qwencli.diagnostics import machine
from qwencli.errors import UsageError
from tests.diagnostics.machines import MACHINES

app = typer.Typer()
app.command()(diagnose)


@pytest.fixture
def run(monkeypatch):
    """Run the command on a recorded machine, 80 columns wide."""

    def go(name, *arguments):
        monkeypatch.setattr(machine, "LiveMachine", lambda: MACHINES[name])
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})

    return go


@pytest.mark.parametrize(
    ("name", "code", "verdict"),
    [("healthy-5090", 0, "pass"), ("no-gpu-cpu-torch", 0, "warn"), ("old-driver", 1, "fail")],
)
def test_exit_code_and_json(run, name, code, verdict):
    result = run(name, "--json")
    assert result.exit_code == code
    answer = json.loads(result.stdout)
    assert set(answer) == {"summary", "checks", "recommended"}
    assert answer["summary"]["verdict"] == verdict
    for check in answer["checks"]:
        assert {"id", "status", "evidence", "fix", "confidence"} <= set(check)
        assert check["status"] in ("pass", "warn", "fail", "skip")
    counts = [answer["summary"][status] for status in ("pass", "warn", "fail", "skip")]
    assert sum(counts) == len(answer["checks"])


@pytest.mark.parametrize("name", MACHINES)
def test_the_text_fits_80_columns_and_needs_no_colour(run, name):
    result = run(name)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith(("PASS:", "WARN:", "FAIL:"))


def test_a_cpu_box_reads_well(run):
    text = " ".join(run("no-gpu-cpu-torch").stdout.split())
    assert "WARN cuda-device no CUDA device found: models run on the CPU, slowly" in text
    assert "WARN torch-build torch 2.13.0+cpu is a CPU-only build" in text
    assert "fix: with an NVIDIA GPU: install its driver, then install a CUDA build of torch" in text


def test_selection_and_level(run):
    ids = [
        check["id"]
        for check in json.loads(run("h200", "--json", "--only", "host, python").stdout)["checks"]
    ]
    assert ids == ["python", "cpu", "ram", "disk", "variables"]
    quick = {check["id"] for check in json.loads(run("h200", "--json", "--quick").stdout)["checks"]}
    assert "device-works" not in quick
    left = {
        check["id"]
        for check in json.loads(run("h200", "--json", "--skip", "gpu,ram").stdout)["checks"]
    }
    assert not left & {"driver", "ram"}


def test_an_unknown_check_is_named(run):
    result = run("h200", "--only", "gpus")
    assert isinstance(result.exception, UsageError)
    assert "no check 'gpus'" in result.exception.message
