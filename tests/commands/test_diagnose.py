from __future__ import annotations

import json
import tomllib

import pytest
import typer
from typer.testing import CliRunner

from qwencli.commands.diagnose import app as diagnose_app
from qwencli.diagnostics import live
from qwencli.errors import BenchError, DeviceError, OutputError, UsageError
from qwencli.models import user_config
from qwencli.output import Output
from tests.bench.synthetic_campaign import campaign as synthetic
from tests.diagnostics.replay import MACHINES, machine

app = typer.Typer()
app.add_typer(diagnose_app, name="diagnose")


class Replayed:
    """Stands for LiveMachine: whatever model is asked for, the recorded machine answers."""

    def __init__(self, box):
        self.box = box

    def __call__(self, spec, engine):
        return self

    def __enter__(self):
        return self.box

    def __exit__(self, *exc):
        return None


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command on a recorded machine, 80 columns wide."""

    def go(name, *arguments, **change):
        monkeypatch.setattr(live, "LiveMachine", Replayed(machine(name, **change)))
        monkeypatch.setattr(user_config, "user_config_folder", lambda: tmp_path / "config")
        return CliRunner().invoke(app, ["diagnose", *arguments], env={"COLUMNS": "80"})

    return go


@pytest.mark.parametrize(
    ("name", "code", "verdict"),
    [("healthy-5090", 0, "pass"), ("no-gpu", 0, "warn"), ("old-driver", 1, "fail")],
)
def test_exit_code_and_json(run, name, code, verdict):
    result = run(name, "--json")
    assert result.exit_code == code
    answer = json.loads(result.stdout)
    assert set(answer) == {"summary", "checks", "recommended", "machine"}
    assert answer["summary"]["verdict"] == verdict
    for check in answer["checks"]:
        assert {"id", "status", "what", "why", "evidence", "fix", "confidence"} <= set(check)
        assert check["status"] in ("pass", "warn", "fail", "skip")
        assert bool(check["fix"]) == (check["status"] in ("warn", "fail"))
    counts = [answer["summary"][status] for status in ("pass", "warn", "fail", "skip")]
    assert sum(counts) == len(answer["checks"])


def test_the_recommendation_has_its_figures(run):
    found = json.loads(run("healthy-5090", "--json").stdout)["recommended"]
    assert found["model"] == "qwen3-vl-4b"
    assert (found["quantization"], found["attention"], found["cache"]) == (
        "none", "auto", "static-graph",
    )  # fmt: skip
    assert found["vram_bytes"] > 8e9
    assert found["expected_tok_per_s"] < found["limit_tok_per_s"]
    assert found["max_seq_len"] == 16384
    assert found["why"]


@pytest.mark.parametrize("name", MACHINES)
def test_the_text_fits_80_columns_and_needs_no_colour(run, name):
    result = run(name, "--deep")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith(("PASS:", "WARN:", "FAIL:"))


def test_what_failed_is_said_again_at_the_end(run):
    last = run("old-driver").stdout.splitlines()[-3:]
    assert last[0].startswith("FAIL cuda-device: a GPU is there")
    assert last[1].startswith("FAIL driver: the NVIDIA driver is too old for CUDA 13.0")


def test_levels_and_selection(run):
    def ids(*arguments):
        checks = json.loads(run("healthy-5090", "--json", *arguments).stdout)["checks"]
        return {check["id"] for check in checks}

    assert "bandwidth" not in ids("--quick")
    assert "engine-run" not in ids()
    assert "engine-run" in ids("--deep")
    assert ids("--only", "disk, python") == {"disk", "python"}
    assert not ids("--skip", "gpu,ram") & {"driver", "ram"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "gpus"], "no check 'gpus'"),
        (["--quick", "--deep"], "--quick and --deep"),
        (["--model", "no-such-model"], "no model is called"),
    ],
)
def test_wrong_options_are_named(run, arguments, said):
    result = run("h200", *arguments)
    assert said in result.exception.message
    assert result.exception.hint


def test_a_report_to_paste(run, tmp_path):
    path = tmp_path / "new" / "report.md"
    gpu = {"variables": {"TORCH_LOGS": "/home/annika/secret/logs", "CUDA_X": "hf_abcdefghijkl"}}
    result = run("old-driver", "--report", str(path), **gpu)
    assert result.exit_code == 1
    page = path.read_text(encoding="utf-8")
    assert page.startswith("# qwencli ")
    assert "**driver**: the NVIDIA driver is too old" in page
    assert "nvidia.com/drivers" in page
    assert "annika" not in page
    assert "hf_abc" not in page
    record = json.loads(page.partition("```json\n")[2].partition("\n```")[0])
    assert record["driver"]["version"] == "550.54.14"
    assert list(path.parent.iterdir()) == [path]


def test_a_report_that_cannot_be_written(run, tmp_path):
    (tmp_path / "no").touch()
    result = run("h200", "--report", str(tmp_path / "no" / "r.md"))
    assert isinstance(result.exception, OutputError)
    assert "--report" in result.exception.message


def settings_of(tmp_path):
    return tomllib.loads((tmp_path / "config" / "config.toml").read_text(encoding="utf-8"))


def test_apply_shows_the_difference_and_writes(run, tmp_path):
    result = run("healthy-5090", "--apply", "--yes", "--model", "qwen3-vl-4b")
    assert result.exit_code == 0
    assert '+quantization = "none"' in result.stderr
    written = settings_of(tmp_path)
    assert written["model"] == "qwen3-vl-4b"
    assert written["models"]["qwen3-vl-4b"]["cache"] == "static-graph"
    again = run("healthy-5090", "--apply", "--model", "qwen3-vl-4b")
    assert "says so already" in again.stderr


def test_apply_does_not_choose_a_default_model_unasked(run, tmp_path):
    run("healthy-5090", "--apply", "--yes")
    assert "model" not in settings_of(tmp_path)


def test_apply_asks_and_a_no_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Output, "can_ask", lambda sink: True)
    monkeypatch.setattr(Output, "confirm", lambda sink, question: False)
    result = run("healthy-5090", "--apply")
    assert "nothing was written" in result.stderr
    assert not (tmp_path / "config").exists()


def test_apply_with_nobody_to_ask(run, tmp_path):
    result = run("healthy-5090", "--apply")
    assert isinstance(result.exception, UsageError)
    assert result.exception.hint == "add --yes"
    assert not (tmp_path / "config").exists()


def test_apply_where_nothing_fits(run):
    result = run("healthy-5090", "--apply", "--yes", model="qwen2.5-vl-72b")
    assert isinstance(result.exception, DeviceError)
    assert "does not fit" in result.exception.message


@pytest.fixture
def folder(tmp_path):
    from qwencli.bench.storage import columns
    from qwencli.bench.storage.row_file import write_rows

    made = synthetic(6, 8, 30, skipped=1, seed=2)
    write_rows(tmp_path / "cells.csv", columns.CELLS, made.rows)
    write_rows(tmp_path / "runs.csv", columns.RUNS, made.runs)
    write_rows(tmp_path / "tokens.csv", columns.TOKENS, made.tokens)
    write_rows(tmp_path / "gpu.csv", columns.GPU, made.gpu)
    return tmp_path


def test_explain(run, folder):
    text = run("h200", "explain", str(folder)).stdout
    assert text.startswith("whole campaign\n")
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert "1 cell skipped: flash-attn is not installed (1 of 6 cells)" in flat
    assert "the driver held the clock back: sw_power_cap (in 8 of 8 runs)" in flat
    lines = run("h200", "explain", str(folder), "--json").stdout.splitlines()
    assert all(set(json.loads(line)) == {"cell", "what", "figure"} for line in lines)


def test_explain_without_a_campaign(run, tmp_path):
    result = run("h200", "explain", str(tmp_path))
    assert isinstance(result.exception, BenchError)
    assert "cells.csv" in result.exception.message
