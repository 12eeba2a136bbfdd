"""Chooses the engine; imports its package only when it is the one asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization
from qwencli.engine.protocol import Engine
from qwencli.errors import ModelFileError, UnsupportedModeError, UsageError

if TYPE_CHECKING:
    from qwencli.engine.native.engine import WarmedKernels


def default_engine(config: EngineConfig) -> EngineName:
    """The engine for a configuration that names none: native where it can run the model.

    That is for safetensors of its families, unquantized, quantized in a way it reads, or to be
    quantized while loading, which it does in every mode. A model of which nothing is known here is
    downloaded to find out, as it has to be anyway. A checkpoint that is quantized already and is
    to be quantized again is native's too: that engine says why it cannot be.

    Raises:
        ModelFileError, DownloadError: the model's files are not usable, or not to be had.
    """
    from qwencli.models.families import FAMILIES
    from qwencli.models.folder import read_config
    from qwencli.models.hub import locate

    hub_config = config.model.hub_config
    if hub_config is None and config.load_format is LoadFormat.AUTO:
        folder = locate(config.model, offline=config.offline, allow_pickle=config.allow_pickle)
        hub_config = read_config(folder)
    hub_config = hub_config or {}
    native = (
        str(hub_config.get("model_type")) in FAMILIES
        and (config.quantization is not Quantization.NONE or _is_read(hub_config))
        and not config.allow_pickle
    )
    return EngineName.NATIVE if native else EngineName.TRANSFORMERS


def _is_read(hub_config: Mapping[str, Any]) -> bool:
    """Whether the native engine reads the weights that this config.json describes."""
    from qwencli.models.quant_formats import packed_format

    try:
        packed_format(hub_config)
    except ModelFileError:
        return False
    return True


def create_engine(config: EngineConfig) -> Engine:
    """Build the engine of `config`, not yet loaded.

    Raises:
        UsageError: the working folder is gone, or options exclude each other.
    """
    try:
        Path.cwd()
    except OSError as error:
        # MKL ends the whole process where it cannot name the working folder.
        raise UsageError(
            f"the working folder cannot be used ({error.strerror or error})",
            "go to a folder that is there (cd), then run this again",
        ) from error
    if config.engine is EngineName.REMOTE or (config.engine is None and config.endpoints):
        from qwencli.engine.remote import RemoteEngine

        return RemoteEngine(config)
    if config.endpoints:
        raise UsageError(
            f"--endpoint and --engine {config.engine} exclude each other", "use --engine remote"
        )
    engine = config.engine or default_engine(config)
    config = replace(config, engine=engine)
    if engine is EngineName.NATIVE:
        from qwencli.engine.native.engine import NativeEngine

        return NativeEngine(config)
    from qwencli.engine.hf.engine import TransformersEngine

    return TransformersEngine(config)


def warm_kernels(config: EngineConfig) -> WarmedKernels:
    """Compile the kernels of `config` for its GPU and keep them, without the model's weights.

    Raises:
        UnsupportedModeError: what this runs as has none.
    """
    engine = default_engine(config)
    if engine is not EngineName.NATIVE:
        raise UnsupportedModeError(
            f"{config.model.name} runs in the transformers engine, which has no kernels to compile"
        )
    from qwencli.engine.native.engine import NativeEngine

    return NativeEngine(replace(config, engine=engine)).warm_kernels()
