"""Chooses the engine; imports its package only when it is the one asked for."""

from __future__ import annotations

from qwencli.config import EngineConfig, EngineName
from qwencli.engine.base import Engine
from qwencli.errors import UnsupportedModeError


def create_engine(config: EngineConfig) -> Engine:
    """Build the engine of `config`, not yet loaded.

    Raises:
        UnsupportedModeError: this version does not have the engine asked for.
    """
    if config.engine is EngineName.NATIVE:
        from qwencli.engine.native.engine import NativeEngine

        return NativeEngine(config)
    if config.engine is EngineName.TRANSFORMERS:
        from qwencli.engine.reference.engine import TransformersEngine

        return TransformersEngine(config)
    raise UnsupportedModeError(
        f"--engine {config.engine} is not part of this version",
        nearest=EngineName.TRANSFORMERS.value,
    )
