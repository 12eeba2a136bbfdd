"""What is warmed up while weights load is a small model of the same widths."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from qwencli.engine.loading import reader
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prefill_graphs import GraphSizes
from qwencli.engine.native.warmup import WarmUp
from qwencli.models.builtin import hub_config
from qwencli.models.shape_reader import read_shape

CPU = torch.device("cpu")
MODELS = ("qwen3-vl-2b", "qwen2.5-vl-3b", "qwen3.5-0.8b", "qwen3-vl-30b-a3b")
NARROW = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}


def shape_of(model: str):
    """The model's, but narrow."""
    config = copy.deepcopy(hub_config(model))
    text = config.get("text_config", config)
    text |= {key: value for key, value in NARROW.items() if key in text}
    if "head_dim" not in text:
        text |= {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    if "num_experts" in text:
        text["num_experts"] = 8
    vision = config["vision_config"]
    vision |= {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2}
    vision["out_hidden_size"] = text["hidden_size"]
    return read_shape(config)


def warm(shape, made, **options):
    def make(shape, loaded, slots):
        made.append(shape)
        return QwenModel(shape, loaded, slots)

    options = {"sizes": None, "room_bytes": 1 << 30} | options
    warming = WarmUp(shape, torch.float32, CPU, make, **options)
    warming.wait()
    return warming


@pytest.mark.parametrize("model", MODELS)
def test_models_of_each_family_answer(model):
    shape, made = shape_of(model), []
    warming = warm(shape, made)
    assert warming.note == ""
    (small,) = made
    assert small.text.num_layers == 1 and small.vision.depth == 1
    assert small.text.hidden_size == shape.text.hidden_size
    assert small.vision.hidden_size == shape.vision.hidden_size


def test_it_does_nothing_where_memory_is_short():
    shape, made = shape_of("qwen3-vl-2b"), []
    warm(shape, made, room_bytes=1000)
    assert not made


def test_what_goes_wrong_is_noted_and_ends_nothing():
    def make(shape, loaded, slots):
        raise RuntimeError("no such device")

    shape = shape_of("qwen3-vl-2b")
    options = {"sizes": None, "room_bytes": 1 << 30}
    warming = WarmUp(shape, torch.float32, CPU, make, **options)
    warming.wait()
    assert warming.note == "RuntimeError: no such device"


class CountingPasses:
    """In place of graphs: what they would be asked for."""

    def __init__(self, model, cache, slots, sizes):
        self._model, self.ran = model, []
        self.instances.append(self)

    instances: ClassVar[list[CountingPasses]] = []

    def prefill(self, inputs, cache, start=0):
        self.ran.append(("prompt", inputs.length))
        return self._model.prefill(inputs, cache, start)

    def encode_images(self, patches, grids):
        self.ran.append(("picture", len(patches)))
        return self._model.encode_images(patches, grids)


@pytest.fixture
def passes(monkeypatch):
    monkeypatch.setattr(CountingPasses, "instances", [])
    monkeypatch.setattr("qwencli.engine.native.warmup.PrefillGraphs", CountingPasses)
    return CountingPasses.instances


def ran_until(passes, last, timeout_s=60):
    """What ran, once `last` of it did."""
    until = time.monotonic() + timeout_s
    while not passes or last not in passes[0].ran:
        assert time.monotonic() < until, passes and passes[0].ran
        time.sleep(0.01)
    return passes[0].ran


def test_every_length_class_runs_while_the_load_goes_on(passes):
    shape = shape_of("qwen3-vl-2b")

    def make(shape, loaded, slots):
        return QwenModel(shape, loaded, slots)

    sizes = GraphSizes(tokens=192, patches=1024)
    warming = WarmUp(shape, torch.float32, CPU, make, sizes=sizes, room_bytes=1 << 33)
    ran = ran_until(passes, ("picture", 2048))
    warming.wait()
    assert warming.note == ""
    assert [length for kind, length in ran[2:] if kind == "prompt"] == [64, 128, 192]
    assert [count for kind, count in ran[2:] if kind == "picture"] == [*range(128, 2049, 128)]


def test_a_load_that_is_over_waits_for_one_size_at_most(passes):
    begun, over = threading.Event(), threading.Event()

    def make(shape, loaded, slots):
        model = QwenModel(shape, loaded, slots)
        prefill = model.prefill

        def waits(inputs, *rest):
            if inputs.length == 64:
                begun.set()
                assert over.wait(60)
            return prefill(inputs, *rest)

        model.prefill = waits
        return model

    sizes = GraphSizes(tokens=2304, patches=1024)
    shape = shape_of("qwen3-vl-2b")
    warming = WarmUp(shape, torch.float32, CPU, make, sizes=sizes, room_bytes=1 << 33)
    assert begun.wait(60)
    threading.Timer(0.2, over.set).start()
    warming.wait()
    assert warming.note == ""
    assert passes[0].ran[-1] == ("prompt", 64)


def test_sizes_are_left_out_where_memory_is_short(passes):
    warm(shape_of("qwen3-vl-2b"), [], sizes=GraphSizes(tokens=192, patches=1024))
    assert [kind for kind, _ in passes[0].ran] == ["picture", "prompt"]


# Threads of a load that begin before something fails; both are in torch as the process ends.
LOAD_THAT_FAILS = """
import os, sys, threading, torch
from qwencli.config import EngineConfig
from qwencli.engine.native import engine as native
from qwencli.engine.native.warmup import WarmUp
from qwencli.models.resolve import resolve_model
from tests.engine.native.test_warmup import shape_of

SHAPE = shape_of("qwen3-vl-2b")
computing = threading.Event()

def compute(*about):
    computing.set()
    a = torch.ones(1500, 1500, dtype=torch.float64)
    for _ in range(3):
        a @ a

def begin(thread):
    if thread == "pinning":
        native.pin_ahead = compute
        native.NativeEngine(EngineConfig(model=resolve_model("scenes")))._begin_load("cuda:0")
    else:
        WarmUp(SHAPE, torch.float32, torch.device("cpu"), compute, sizes=None, room_bytes=1 << 30)

torch.set_num_threads(1)
for thread in ("pinning", "warm-up"):  # a process each, forked from one that has imported torch
    process = os.fork()
    if process == 0:
        begin(thread)
        computing.wait()
        sys.exit(7)
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(thread, ended, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_processes_end_as_they_should_while_a_load_goes_on():
    done = subprocess.run(
        [sys.executable, "-c", LOAD_THAT_FAILS],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("pinning 7\nwarm-up 7\n", "")


def test_a_gpu_that_cannot_be_had_is_left_to_the_load(monkeypatch):
    def refuse(place):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "device", refuse)
    reader.pin_ahead(torch.device("cuda:0"))
