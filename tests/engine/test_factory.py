"""Which engine runs where none is named."""

from __future__ import annotations

from typing import Any

import pytest

from qwencli.config import (
    EngineConfig,
    EngineName,
    LoadFormat,
    ModelSource,
    ModelSpec,
    Quantization,
)
from qwencli.engine.factory import create_engine, default_engine, warm_kernels
from qwencli.engine.native.engine import NativeEngine
from qwencli.errors import ModelFileError, UnsupportedModeError
from qwencli.models.resolve import resolve_model
from tests.models.tiny import CONFIGS

AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}
OTHER = {"quant_method": "of-tomorrow"}
QUANTIZED = [mode for mode in Quantization if mode is not Quantization.NONE]


def config(
    quantization: Quantization = Quantization.NONE,
    said: dict[str, Any] | None = None,
    device: str = "cuda",
    family: str = "qwen3",
    **settings: Any,
) -> EngineConfig:
    hub_config = {**CONFIGS["qwen3"], "model_type": family}
    if said is not None:
        hub_config["quantization_config"] = said
    spec = ModelSpec("tiny", ModelSource.LOCAL, hub_config=hub_config)
    return EngineConfig(spec, quantization=quantization, device=device, **settings)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("mode", Quantization)
def test_native_runs_every_mode_of_its_families(mode: Quantization, device: str) -> None:
    assert default_engine(config(mode, device=device)) is EngineName.NATIVE


@pytest.mark.parametrize("mode", Quantization)
def test_what_native_cannot_read_stays_with_transformers(mode: Quantization) -> None:
    assert default_engine(config(mode, family="mllama")) is EngineName.TRANSFORMERS
    assert default_engine(config(mode, allow_pickle=True)) is EngineName.TRANSFORMERS


@pytest.mark.parametrize(
    ("said", "device", "engine"),
    [
        (AWQ, "cpu", EngineName.NATIVE),
        (AWQ, "cuda", EngineName.NATIVE),
        (OTHER, "cpu", EngineName.TRANSFORMERS),
        (OTHER, "cuda", EngineName.TRANSFORMERS),
    ],
)
def test_prequantized_checkpoints(said: dict[str, Any], device: str, engine: EngineName) -> None:
    assert default_engine(config(said=said, device=device)) is engine


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", QUANTIZED)
def test_quantizing_again_is_left_to_the_engine_that_says_why_not(
    mode: Quantization, device: str
) -> None:
    assert default_engine(config(mode, AWQ, device)) is EngineName.NATIVE


@pytest.mark.parametrize("mode", QUANTIZED)
def test_the_engine_that_runs_without_being_named(mode: Quantization) -> None:
    bundled = EngineConfig(
        resolve_model("scenes"), quantization=mode, device="cpu", load_format=LoadFormat.DUMMY
    )
    with create_engine(bundled) as engine:
        assert isinstance(engine, NativeEngine)
        assert engine.effective.engine == "native"
        assert engine.effective.quantization != "none"


def test_an_engine_that_is_named_is_taken() -> None:
    with pytest.raises(UnsupportedModeError, match="fp8"):
        create_engine(
            EngineConfig(
                resolve_model("scenes"),
                engine=EngineName.TRANSFORMERS,
                quantization=Quantization.FP8,
                device="cpu",
            )
        ).load()


def test_of_a_model_that_no_engine_runs_no_kernels_are_looked_for() -> None:
    """Not even told to be another engine's."""
    spec = ModelSpec("later", ModelSource.LOCAL, hub_config={"model_type": "qwen4_exp"})
    with pytest.raises(ModelFileError, match=r"later: model_type 'qwen4_exp' is Qwen4"):
        warm_kernels(EngineConfig(spec))
