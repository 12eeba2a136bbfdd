"""Quantization without an engine named, on a CUDA device: what runs, and what it is called."""

from __future__ import annotations

import importlib.util

import pytest

from qwencli.config import EngineConfig, Kernels, Quantization, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.images import open_image
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model
from tests.test_bundled_model import EXAMPLES

REQUEST = GenerationRequest(
    (user_message("Describe this image.", (open_image(EXAMPLES / "scene.png"),)),),
    SamplingOptions(do_sample=False, max_new_tokens=32),
)
LABELS = {
    Quantization.INT8: ("int8", "int8-w8a8"),
    Quantization.FP8: ("fp8-e4m3", "fp8-e4m3-w8a16"),
    Quantization.INT4: ("int4-g128", "int4-g128-w4a8"),
}
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("kernels", [Kernels.TORCH, pytest.param(Kernels.AUTO, marks=TRITON)])
@pytest.mark.parametrize("mode", LABELS)
def test_the_native_engine_runs_and_tells_what_it_rounds(
    mode: Quantization, kernels: Kernels
) -> None:
    config = EngineConfig(
        resolve_model("scenes"), quantization=mode, kernels=kernels, device="cuda"
    )
    with create_engine(config) as engine:
        answer = engine.generate(REQUEST)
    assert answer.effective.engine == "native"
    assert answer.effective.quantization == LABELS[mode][kernels is Kernels.AUTO]
    assert "red circle" in answer.text
