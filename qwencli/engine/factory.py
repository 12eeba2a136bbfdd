"""Chooses the engine; imports its package only when it is the one asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.capabilities import Need
from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization
from qwencli.engine.protocol import Engine
from qwencli.errors import ModelFileError, UsageError

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
    from qwencli.models.resolve import locate

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


def check_config(config: EngineConfig, engine: EngineName) -> None:
    """Refuse what can be told without importing torch, which takes seconds: files that are not
    whole, a device that is none, modes that do not run together or there, requests longer than
    the model takes.

    What a device lacks that torch alone knows `Engine.load` says.

    Raises:
        ModelFileError, DeviceError, UnsupportedModeError, UsageError.
    """
    from qwencli.engine.resolve import check_modes, check_seq_len, lacks_without_torch
    from qwencli.models.folder import check_folder
    from qwencli.models.shape_reader import read_shape

    lacks = lacks_without_torch(config.device)
    hub_config, path = config.model.hub_config, config.model.path
    traits: Mapping[str, bool] = {}
    if path is not None and config.load_format is LoadFormat.AUTO:
        hub_config = check_folder(path, allow_pickle=config.allow_pickle)
    if hub_config is not None:
        text = read_shape(hub_config, f"config.json of {config.model.name}").text
        check_seq_len(config, text.max_position_embeddings)
        traits = text.traits if engine is EngineName.NATIVE else {}
    check_modes(config, engine, lacks, traits)


def create_engine(config: EngineConfig) -> Engine:
    """Build the engine of `config`, not yet loaded.

    Raises:
        UsageError: the working folder is gone, or options exclude each other.
        DeviceError, UnsupportedModeError, ModelFileError: it could not be loaded, and that can be
            told without torch.
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
    check_config(config, engine)
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
        ModelFileError: no engine runs this model.
    """
    from qwencli.engine.resolve import lacks_without_torch, no_kernels
    from qwencli.models.shape_reader import read_shape

    if config.model.hub_config is not None:
        read_shape(config.model.hub_config, f"config.json of {config.model.name}")
    engine = default_engine(config)
    if engine is not EngineName.NATIVE:
        raise no_kernels(f"{config.model.name} runs in the transformers engine")
    lacks = lacks_without_torch(config.device)
    if Need.TRITON in lacks:
        raise no_kernels(lacks[Need.TRITON])
    from qwencli.engine.native.engine import NativeEngine

    return NativeEngine(replace(config, engine=engine)).warm_kernels()
