"""`qwencli caption FOLDER --ray`: the same set on a Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dataset.conftest import captions
from tests.dataset.test_killed import done_of

PROGRAM = Path(__file__).with_name("ray_two_nodes.py")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.slow
def test_a_node_that_dies_loses_nothing(pictures, caption):
    names = [f"{number}.png" for number in range(100)]
    folder, alone = pictures(*names), pictures(*names, folder="alone")
    assert caption(alone, "--seed", "1") == 0
    made = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), "8", "--seed", "1", "--json"],
        env={**os.environ, "FAKE_STEP_S": "0.2", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert made.returncode == 0, made.stderr
    assert "killed" in made.stdout
    assert captions(folder) == captions(alone)
    assert made.stdout.count('"event": "caption"') == 100
    assert len(done_of(folder)) == 100


def test_without_ray_one_line_says_what_to_do(pictures, caption, capsys, monkeypatch):
    folder = pictures("a.png")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert caption(folder, "--ray", "local") == 1
    assert "pip install 'qwencli[ray]'" in capsys.readouterr().err
    assert caption(folder, "--ray", "local", "--devices", "cpu") == 2


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_an_address_where_nobody_listens_is_one_line(pictures, tmp_path):
    folder = pictures("a.png")
    program = "import sys; from qwencli.cli import run; sys.exit(run(sys.argv[1:]))"
    arguments = ["caption", str(folder), "--model", "scenes", "--ray", "127.0.0.1:1"]
    made = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 1
    assert "error: --ray 127.0.0.1:1: Connection refused" in made.stderr
