"""The engine whose kernels are launched one by one, without graphs: `static`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qwencli.config import Cache, SamplingOptions, Speculate
from qwencli.engine.client import generate_many
from qwencli.engine.native.decode_state import LaunchedStepper
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.supported import fused_for
from tests.checkpoints import write_checkpoint
from tests.engine.kernels.test_fused_ops import OWN
from tests.engine.native.test_native_engine import ask, native_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads wide enough for attention of our own."""
    place = tmp_path_factory.mktemp("wide") / "model"
    return write_checkpoint(place, "qwen3", overrides={"head_dim": 32})


@pytest.mark.parametrize("speculate", [Speculate.OFF, Speculate.THREE])
def test_says_the_same_as_plain_operators(folder, monkeypatch, speculate):
    requests = [
        ask(sampling=SamplingOptions(max_new_tokens=6, **sampling))
        for sampling in (
            {"do_sample": False},
            {"do_sample": False, "repetition_penalty": 1.3},
            {"temperature": 1.0, "top_k": 20, "seed": 5},
        )
    ]
    config = replace(native_config(folder, cache=Cache.STATIC), speculate=speculate)
    answers = []
    for fused in (fused_for, lambda *_: OWN):
        monkeypatch.setattr("qwencli.engine.native.engine.fused_for", fused)
        with NativeEngine(config) as engine:
            alone = [engine.generate(request).token_ids for request in requests]
            launched = isinstance(engine._generation._stepper, LaunchedStepper)
            assert launched == (fused is not fused_for)
            together = [each.token_ids for each in generate_many(engine, requests)]
        answers.append((alone, together))
    assert answers[0] == answers[1]
