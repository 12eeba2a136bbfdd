"""Chooses the engine; imports its package only when it is the one asked for."""

from __future__ import annotations

from dataclasses import replace

from qwencli.config import EngineConfig, EngineName, Quantization
from qwencli.engine.base import Engine
from qwencli.errors import UnsupportedModeError

NATIVE_FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen2")


def default_engine(config: EngineConfig) -> EngineName:
    """The engine for a configuration that names none.

    Native runs unquantized safetensors of the families above. Everything else, and a model of
    which nothing is known before its download, goes to transformers.
    """
    hub_config = config.model.hub_config or {}
    native = (
        hub_config.get("model_type") in NATIVE_FAMILIES
        and "quantization_config" not in hub_config
        and config.quantization is Quantization.NONE
        and not config.allow_pickle
    )
    return EngineName.NATIVE if native else EngineName.TRANSFORMERS


def create_engine(config: EngineConfig) -> Engine:
    """Build the engine of `config`, not yet loaded.

    Raises:
        UnsupportedModeError: this version does not have the engine asked for.
    """
    engine = config.engine or default_engine(config)
    config = replace(config, engine=engine)
    if engine is EngineName.NATIVE:
        from qwencli.engine.native.engine import NativeEngine

        return NativeEngine(config)
    if engine is EngineName.TRANSFORMERS:
        from qwencli.engine.reference.engine import TransformersEngine

        return TransformersEngine(config)
    raise UnsupportedModeError(
        f"--engine {config.engine} is not part of this version",
        nearest=EngineName.NATIVE.value,
    )
