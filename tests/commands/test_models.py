"""`qwencli models` as a user sees it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from qwencli.commands.models import models
from qwencli.engine.machine import host
from qwencli.errors import CustomModelsError
from qwencli.models import resolve
from qwencli.models.builtin import BUILTINS

app = typer.Typer()
app.command()(models)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty folder, with an empty cache, 80 columns wide."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resolve, "user_config_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(host, "gpu_free_bytes", lambda: 8_000_000_000)
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_table_has_whole_names_and_figures(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run().stdout.splitlines()
    assert max(map(len, lines)) <= columns and "…" not in "".join(lines)
    size = [["Size"], ["8.9", "GB"]] if columns == 60 else [[], []]
    assert lines[0].split() == ["Model", *size[0], "4bit", "Fits"]
    four = next(line for line in lines if line.startswith("qwen3-vl-4b ")).split()
    assert four == ["qwen3-vl-4b", *size[1], "5.4", "fp8"]
    assert set(BUILTINS) <= {line.split()[0] for line in lines if line.strip()}


def write(path, entries):
    path.write_text(json.dumps({"hf_vl_models": entries}), encoding="utf-8")
    return path


def test_table_fits_80_columns_and_breaks_no_builtin_name(run):
    result = run()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first_words = {line.split()[0] for line in lines if line.strip()}
    assert set(BUILTINS) <= first_words
    four = next(line for line in lines if line.startswith("qwen3-vl-4b "))
    assert four.split() == [
        "qwen3-vl-4b",
        "built-in",
        "8.9",
        "GB",
        "5.4",
        "7.1",
        "7.1",
        "10.4",
        "fp8",
        "to",
        "download",
    ]
    assert result.stderr == ""


def test_table_breaks_no_custom_name_of_22_letters(run, tmp_path):
    name = "Qwen3-4B-Instruct-2507"
    write(tmp_path / "custom_models.json", {name: {"repo_id": f"Qwen/{name}"}})
    assert re.search(f"^{name} +custom", run().stdout, re.MULTILINE)


def test_json_is_one_object_a_line(run):
    rows = [json.loads(line) for line in run("--json").stdout.splitlines()]
    by_name = {row["name"]: row for row in rows}
    assert set(BUILTINS) <= set(by_name)
    assert by_name["qwen2.5-vl-7b"]["repo_id"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert by_name["qwen2.5-vl-7b"]["downloaded"] is False
    assert set(by_name["qwen3-4b"]["vram_gb"]) == {"4bit", "8bit", "fp8", "full"}


def test_custom_entries_are_marked(run, tmp_path):
    entry = {"repo_id": "Owner/Name", "default": True, "vram_requirement": {"4bit": 5}}
    result = run("--models-file", str(write(tmp_path / "m.json", {"[b]mine": entry})))
    line = next(line for line in result.stdout.splitlines() if line.startswith("[b]mine"))
    assert line.split() == [
        "[b]mine",
        "(default)",
        "custom",
        "?",
        "5.0*",
        "?",
        "?",
        "?",
        "4bit",
        "to",
        "download",
    ]


def test_problem_is_shown_in_its_row(run, tmp_path):
    write(tmp_path / "custom_models.json", {"mine": {"repo_id": "./gone"}})
    assert "no such folder" in " ".join(run().stdout.split())


def test_unknown_keys_warn_on_stderr(run, tmp_path):
    write(tmp_path / "custom_models.json", {"mine": {"repo_id": "O/N", "colour": 1}})
    result = run("--json")
    assert "warning:" in result.stderr and "'colour' is not known" in result.stderr
    assert all(json.loads(line) for line in result.stdout.splitlines())


def test_malformed_file_is_our_error(run, tmp_path):
    (tmp_path / "custom_models.json").write_text("[]", encoding="utf-8")
    assert isinstance(run().exception, CustomModelsError)


def test_missing_models_file_is_our_error(run):
    assert isinstance(run("--models-file", "none.json").exception, CustomModelsError)


def test_what_fits_this_machine_is_marked(run):
    by_name = {row["name"]: row for row in map(json.loads, run("--json").stdout.splitlines())}
    assert by_name["qwen3-vl-2b"]["fits"] == ["4bit", "8bit", "fp8", "full"]
    assert by_name["qwen3-vl-4b"]["fits"] == ["4bit", "8bit", "fp8"]
    assert by_name["qwen3-vl-32b"]["fits"] == []
    shown = {line.split()[0]: line for line in run().stdout.splitlines() if line.strip()}
    assert " full to download" in shown["qwen3-vl-2b"]
    assert " no to download" in shown["qwen3-vl-32b"]
    assert "8.0 GB of VRAM" in " ".join(run().stdout.split())


def test_a_name_with_a_line_feed_forges_no_row(run, tmp_path):
    file = write(tmp_path / "m.json", {"a\nerror: forged\x1b[2J": {"repo_id": "Owner/Name"}})
    result = run("--models-file", str(file))
    assert not [line for line in result.stdout.splitlines() if line.startswith("error:")]
    assert "\x1b" not in result.stdout


def test_the_legend_explains_a_star_only_where_there_is_one(run, tmp_path):
    assert "custom_models.json" not in run().stdout
    entry = {"mine": {"repo_id": "O/N", "vram_requirement": {"full": 4.0}}}
    write(tmp_path / "custom_models.json", entry)
    assert "* as stated in custom_models.json" in " ".join(run().stdout.split())


def test_without_a_gpu_sizes_are_of_float32_in_all_the_memory(run, tmp_path, monkeypatch):
    memory = host.host_memory()
    monkeypatch.setattr(host, "gpu_free_bytes", lambda: None)
    monkeypatch.setattr(host, "host_memory", lambda: replace(memory, available_bytes=22 * 10**9))
    stated = {"repo_id": "Qwen/Qwen3-VL-4B-Instruct", "vram_requirement": {"full": 4.0}}
    write(tmp_path / "custom_models.json", {"mine": stated})
    by_name = {row["name"]: row for row in map(json.loads, run("--json").stdout.splitlines())}
    assert by_name["qwen3-vl-4b"]["vram_gb"]["full"] == pytest.approx(20.2, abs=0.1)
    assert by_name["mine"]["vram_gb"] == by_name["qwen3-vl-4b"]["vram_gb"], "VRAM is not memory"
    assert by_name["qwen3-vl-8b"]["fits"] == ["4bit", "8bit", "fp8"]
    legend = " ".join(run().stdout.split())
    assert "not quantized, float32 on a CPU" in legend and "22.0 GB of memory that is" in legend
