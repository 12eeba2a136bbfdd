"""The resident engine on a GPU: kept by default, warm, and its memory free when it is stopped."""

from __future__ import annotations

import json
import time

import pytest

from qwencli.cli import run
from qwencli.engine.machine.host import gpu_free_bytes
from qwencli.server import resident
from tests.dataset.conftest import captions, draw


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_state_path", lambda *_, **__: tmp_path / "state")
    monkeypatch.delenv("QWENCLI_KEEP_LOADED", raising=False)
    yield
    resident.stop()


def test_the_second_caption_is_warm_and_stop_frees_the_memory(tmp_path, capsys):
    draw(tmp_path / "one.png")
    arguments = ["caption", str(tmp_path / "one.png"), "--model", "scenes", "--greedy", "--json"]
    before = gpu_free_bytes()
    records = []
    for _ in range(2):
        assert run(arguments) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert run([*arguments, "--keep-loaded", "0"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert [each["caption"] for each in records] == [here["caption"]] * 2
    assert records[1]["timings"]["load_s"] < 0.1
    there = resident.status()
    assert there is not None and there.device == "cuda:0" and there.until_s > 200
    assert there.memory_bytes is not None and there.memory_bytes > 0
    held = gpu_free_bytes()
    assert run(["stop"]) == 0
    ended = time.monotonic()
    assert before is not None and held is not None
    while (gpu_free_bytes() or 0) < held + (there.memory_bytes or 0):
        assert time.monotonic() - ended < 1.0
        time.sleep(0.01)


def test_a_folder_runs_in_batches_there_and_another_mode_takes_its_place(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(40):
        draw(folder / f"{number}.png")
    arguments = ["caption", str(folder), "--model", "scenes", "--greedy", "--guards", "none"]
    assert run([*arguments, "--max-new-tokens", "8"]) == 0
    first = resident.status()
    assert len(captions(folder)) == 40
    again = [*arguments, "--max-new-tokens", "8", "--existing", "overwrite"]
    assert run([*again, "--quantization", "8bit"]) == 0
    second = resident.status()
    assert first is not None and second is not None and first.pid == second.pid
    assert (first.quantization, second.quantization) == ("none", "int8-w8a8")
