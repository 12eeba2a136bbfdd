from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import qwencli
from qwencli.engine.machine import cpu_threads
from qwencli.engine.machine.cpu_threads import computing_with, threads_for

SCENES = json.loads(
    (Path(qwencli.__file__).parent / "bundled/scenes/config.json").read_text(encoding="utf-8")
)


def larger(**text):
    return {**SCENES, "text_config": {**SCENES["text_config"], **text}}


@pytest.fixture
def cores(monkeypatch, tmp_path):
    def have(count, torch_threads=64, **files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(text)
        monkeypatch.setattr(cpu_threads, "usable_cores", lambda: count)
        monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
        monkeypatch.setattr(cpu_threads, "cpu_groups", lambda: [tmp_path])
        cpu_threads._usable.cache_clear()

    yield have
    cpu_threads._usable.cache_clear()


def test_a_small_model_computes_on_one_core_and_a_large_one_on_all(cores):
    cores(8)
    assert threads_for(SCENES, None) == 1
    assert threads_for(larger(vocab_size=12_288), None) == 3
    assert threads_for(larger(vocab_size=151_936), None) == 8


def test_what_the_user_says_holds(cores):
    cores(8)
    assert threads_for(SCENES, 5) == 5


def test_a_model_of_unknown_shape_gets_what_there_is(cores):
    cores(8)
    assert threads_for({"model_type": "something else"}, None) == 8


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu_max": "150000 100000\n"}, 2),
        ({"cpu_max": "max 100000\n"}, 8),
        ({"cpu_cfs_quota_us": "20000\n", "cpu_cfs_period_us": "100000\n"}, 1),
        ({"cpu_cfs_quota_us": "-1\n", "cpu_cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_limit_of_the_control_group_is_a_limit_of_threads(cores, files, threads):
    cores(8, **files)
    assert threads_for(larger(vocab_size=151_936), None) == threads


def test_threads_that_torch_was_given_are_not_exceeded(cores):
    cores(8, torch_threads=2)
    assert threads_for(larger(vocab_size=151_936), None) == 2


def test_threads_are_torchs_again_afterwards():
    before = torch.get_num_threads()
    with computing_with(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with computing_with(None):
        assert torch.get_num_threads() == before
