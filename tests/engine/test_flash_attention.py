"""`--attention flash_attention_2` with a package that computes as the real one, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.capabilities import NOTHING
from qwencli.config import Attention, Cache, DType, EngineName, SamplingOptions, Speculate
from qwencli.engine.hf import load_model
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.instruments.probes.answers import Work
from qwencli.engine.native import engine as native
from qwencli.engine.native.engine import NativeEngine
from qwencli.errors import MissingDependencyError, UnsupportedModeError
from qwencli.messages import GenerationRequest, user_message
from tests import flash_attn_package
from tests.checkpoints import engine_config, picture

GREEDY = SamplingOptions(do_sample=False, max_new_tokens=12)
ASKED = GenerationRequest(
    (user_message("Describe these images.", (picture(), picture(96, 64))),),
    GREEDY,
    ignore_eos=True,
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """As if it had what the mode asks of a device."""
    for module in (native, load_model):
        monkeypatch.setattr(module, "device_lacks", lambda device: NOTHING)


@pytest.fixture
def package(tmp_path):
    with flash_attn_package.installed(tmp_path):
        import flash_attn

        yield flash_attn


def config(checkpoint, family="qwen3_vl", **modes):
    base = {"dtype": DType.BFLOAT16, "attention": Attention.FLASH, "cache": Cache.STATIC}
    settings = base | modes
    return engine_config(checkpoint(family), engine=EngineName.NATIVE, **settings)


@pytest.mark.parametrize(
    ("family", "modes"),
    [
        ("qwen3_vl", {"cache": Cache.STATIC}),
        ("qwen3_vl", {"cache": Cache.STATIC, "speculate": Speculate.THREE}),
        ("qwen2_5_vl", {"cache": Cache.DYNAMIC}),
    ],
    ids=str,
)
def test_native_answers_as_with_sdpa(checkpoint, package, family, modes):
    with NativeEngine(config(checkpoint, family, **modes)) as engine:
        result = engine.generate(ASKED)
    assert result.effective.attention == "flash_attention_2"
    steps = {q[1] for q, keys in package.calls if q[1] < 5 and keys[1] > 5}
    assert (4 if "speculate" in modes else 1) in steps
    assert {q[-1] for q, _ in package.calls} == {16}
    with NativeEngine(config(checkpoint, family, attention=Attention.SDPA, **modes)) as engine:
        expected = engine.generate(ASKED)
    # bfloat16 rounds in other places: the first tokens agree, until two are as likely.
    assert result.token_ids[:4] == expected.token_ids[:4]


@pytest.mark.parametrize("engine", [NativeEngine, TransformersEngine])
def test_what_rules_it_out_is_said_when_the_model_is_loaded(checkpoint, tmp_path, engine):
    with pytest.raises(MissingDependencyError, match="flash-attn is not installed") as absent:
        engine(config(checkpoint)).load()
    assert "qwencli[flash]" in absent.value.hint
    with (
        flash_attn_package.installed(tmp_path),
        pytest.raises(UnsupportedModeError, match="bfloat16 and float16 alone") as wide,
    ):
        engine(config(checkpoint, dtype=DType.FLOAT32)).load()
    assert "--dtype bfloat16, or use --attention sdpa" in wide.value.hint


def test_the_probe_holds_prompt_step_and_picture_against_sdpa(package, monkeypatch):
    from qwencli.engine.instruments.probes.measure import attention_runs

    monkeypatch.setattr(attention_runs, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(attention_runs, "TOKENS", 24)
    work = Work(64, 128, 2, 4, 2, 16, 1, vision_heads=2, vision_head_dim=72)
    found = attention_runs.flash_attention("cpu", work)
    assert found.version == "2.8.3"
    assert 0 < found.max_difference < 0.1
    wide = replace(work, vision_head_dim=264)
    with pytest.raises(RuntimeError, match="head dimension at most 256"):
        attention_runs.flash_attention("cpu", wide)
