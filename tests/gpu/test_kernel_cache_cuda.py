"""Nothing is compiled inside a request whose kernels were made ready."""

from __future__ import annotations

from dataclasses import replace

import pytest
import triton

from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization, SamplingOptions
from qwencli.engine import client
from qwencli.engine.kernels.launches import gpu_of
from qwencli.engine.native.engine import NativeEngine
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model
from tests.checkpoints import picture


def ask(penalty: float, side: int) -> GenerationRequest:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=8, repetition_penalty=penalty)
    images = (picture(side, side),)
    return GenerationRequest((user_message("Describe this.", images),), sampling, ignore_eos=True)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The names of kernels that this process compiled, from an empty cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[str] = []

    def listener(src, cache_hit, **about):
        if not cache_hit:
            found.append(src.name)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    return found


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        ("qwen3-vl-2b", Quantization.NONE),
        ("qwen3-vl-2b", Quantization.INT4),
        ("qwen3-vl-2b", Quantization.FP8),
        ("qwen3.5-0.8b", Quantization.NONE),
        ("qwen3.5-0.8b", Quantization.INT4),
    ],
)
def test_no_request_compiles(compiled, model, mode):
    config = EngineConfig(
        resolve_model(model),
        engine=EngineName.NATIVE,
        device="cuda",
        quantization=mode,
        load_format=LoadFormat.DUMMY,
        max_seq_len=4096,
    )
    made = NativeEngine(config).warm_kernels()
    assert made.compiled > 10
    assert made.warnings == ()
    assert compiled == [], "others compile"
    with NativeEngine(config) as engine:
        assert engine.load_warnings == ()
        for penalty in (1.0, 1.2):
            for side in (64, 500, 1000):
                engine.generate(ask(penalty, side))
        list(client.generate_many(engine, (ask(1.0, 64 + 32 * (n % 5)) for n in range(24))))
    assert compiled == []
    again = NativeEngine(replace(config)).warm_kernels()
    assert (again.kernels, again.compiled) == (made.kernels, 0)


def test_the_gpu_here_is_described():
    import torch

    gpu = gpu_of(torch.device("cuda"))
    assert gpu is not None
    assert gpu.capability == torch.cuda.get_device_capability()
