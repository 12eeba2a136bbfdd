"""`qwencli comfyui` as a user sees it."""

from __future__ import annotations

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


def test_help_loads_neither_torch_nor_the_nodes():
    script = (
        "import sys; from qwencli import cli; cli.run(['comfyui', '--help']); "
        "print({name for name in sys.modules if name in ('torch', 'numpy') "
        "or name.startswith('qwencli.comfyui')})"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "set()"
