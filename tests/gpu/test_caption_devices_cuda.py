"""Two worker processes on CUDA devices caption one set: two of them, or one that they share."""

from __future__ import annotations

import json

import pytest
import torch

from qwencli.cli import run
from tests.dataset.conftest import captions, draw


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_two_workers_caption_each_picture_once(tmp_path, capsys, quantization):
    for number in range(60):
        draw(tmp_path / f"{number}.png")
    second = torch.cuda.device_count() - 1
    arguments = ["caption", str(tmp_path), "--model", "scenes", "--quantization", quantization]
    arguments += ["--devices", f"cuda:0,cuda:{min(second, 1)}", "--json", "--greedy"]
    assert run([*arguments, "--guards", "none", "--max-new-tokens", "8"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    made = [event["path"] for event in events if event["event"] == "caption"]
    assert len(made) == len(set(made)) == 60
    assert len(captions(tmp_path)) == 60
    assert {event["device"] for event in events if event["event"] == "caption"} >= {"cuda:0"}
