"""`qwencli comfyui` as a user sees it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qwencli import __version__, cli
from qwencli.comfyui.install import PACK_NAME
from qwencli.commands.comfyui import app


@pytest.fixture
def comfyui(tmp_path):
    for name in ("comfy", "custom_nodes", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (tmp_path / name).touch()
    return tmp_path


def install(folder, python=None):
    if python is not None:
        program = folder / ".venv" / "bin" / "python"
        program.write_text(f"#!/bin/sh\n{python}\n")
        program.chmod(0o755)
    result = CliRunner().invoke(app, ["install", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip() == str(folder.resolve() / "custom_nodes" / PACK_NAME)
    return result.stderr


def test_install_says_whether_the_python_of_comfyui_has_qwencli(comfyui):
    program = comfyui / ".venv" / "bin" / "python"
    assert "cannot be told" in install(comfyui)
    stderr = install(comfyui, f"echo '[\"{__version__}\", true]'")
    assert f"{program} has qwencli {__version__}" in stderr
    assert "upgraded" in stderr and "warning" not in stderr
    stderr = install(comfyui, "exit 1")
    assert f'{program} has no qwencli with nodes: "{program}" -m pip install' in stderr
    assert "has qwencli 0.0.1: " in install(comfyui, "echo '[\"0.0.1\", true]'")


def test_a_folder_that_is_no_comfyui_is_one_line(tmp_path, capsys):
    assert cli.run(["comfyui", "install", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: is no ComfyUI folder")


@pytest.fixture
def workflow(tmp_path):
    path = tmp_path / "mine.json"
    node = {"class_type": "Qwen", "inputs": {"prompt": "日\ud800", "bypass": True}}
    path.write_text(json.dumps({"5": node, "6": {"class_type": "PreviewAny"}}))
    return path


def test_convert_writes_beside_the_original_and_tells_what_has_no_equal(workflow, capsys):
    before = workflow.read_bytes()
    assert cli.run(["comfyui", "convert", str(workflow)]) == 0
    told = capsys.readouterr()
    target = workflow.with_name("mine.qwencli.json")
    assert told.out.splitlines() == [str(target)]
    assert told.err.splitlines() == [
        "node 5 (Qwen) is Qwen Chat now",
        "warning: node 5 (Qwen): bypass True has no equal: to send the text past the node, "
        "connect it past the node",
        "1 node converted; the others are untouched",
    ]
    new = json.loads(target.read_text("utf-8"))
    assert new["5"]["class_type"] == "QwencliChat"
    assert new["5"]["inputs"]["prompt"] == "日\ud800"
    assert "日" in target.read_text("utf-8")
    assert workflow.read_bytes() == before
    # What was converted before may have been changed since.
    assert cli.run(["comfyui", "convert", str(workflow)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {target}: is there already (--out {target} replaces it)"


def test_the_original_is_replaced_only_where_it_is_named(workflow, capsys):
    assert cli.run(["comfyui", "convert", str(workflow), "--out", "-"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["5"]["class_type"] == "QwencliChat"
    assert [path.name for path in workflow.parent.iterdir()] == ["mine.json"]
    assert cli.run(["comfyui", "convert", str(workflow), "--out", str(workflow)]) == 0
    assert json.loads(workflow.read_text())["5"]["class_type"] == "QwencliChat"
    capsys.readouterr()
    assert cli.run(["comfyui", "convert", str(workflow)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {workflow}: no node of a pack that is known")


@pytest.mark.parametrize("data", [b"\x89PNG", b"{}", b"[1]", None])
def test_what_cannot_be_converted_is_one_line_and_no_file(tmp_path, capsys, data):
    path = tmp_path / "w.json"
    if data is not None:
        path.write_bytes(data)
    assert cli.run(["comfyui", "convert", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")
    assert [each.name for each in tmp_path.iterdir()] == (["w.json"] if data is not None else [])


def test_a_place_that_cannot_be_written_is_one_line(workflow, capsys):
    out = workflow.parent / "gone" / "w.json"
    assert cli.run(["comfyui", "convert", str(workflow), "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {out} cannot be written: ")


def test_help_loads_neither_torch_nor_the_nodes():
    script = (
        "import sys; from qwencli import cli; cli.run(['comfyui', '--help']); "
        "print({name for name in sys.modules if name in ('torch', 'numpy') "
        "or name.startswith('qwencli.comfyui')})"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "set()"
