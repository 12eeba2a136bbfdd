"""Turns a name, or no name, into the model to run, and that into a folder with its files.

A name is, in this order: an entry of custom_models.json (the user wrote it on purpose, so it may
even replace a built-in), "scenes", a built-in's alias or hub id in any case, a local folder, or
any other hub id. Without a name see `default_model`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwencli.capabilities import PREQUANTIZED
from qwencli.config import LoadFormat, ModelSource, ModelSpec, Quantization
from qwencli.errors import DownloadError, ModelFileError, ModelNotFoundError
from qwencli.models.builtin import (
    BUILTINS,
    BUNDLED_NAME,
    ENTRIES,
    builtin_spec,
    bundled_folder,
    find_builtin,
)
from qwencli.models.config_values import shortened
from qwencli.models.custom import HUB_ID, CustomModels, as_folder, load_custom_models
from qwencli.models.families import FAMILIES
from qwencli.models.folder import check_folder, read_config
from qwencli.models.user_config import CONFIG_FILE, configured_model, user_config_folder

ENVIRONMENT_KEY = "QWENCLI_MODEL"
_HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?"
    r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)",
    re.IGNORECASE,
)
_ANY_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{2,}")


@dataclass(frozen=True)
class SearchPaths:
    """Where models are looked for; the defaults are this process's real surroundings."""

    working_folder: Path = field(default_factory=lambda: _working_folder())
    config_folder: Path = field(default_factory=lambda: user_config_folder())
    bundled: Path = field(default_factory=bundled_folder)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def custom_models(self, models_file: Path | None) -> CustomModels:
        """custom_models.json of the working folder, the config folder and `models_file`."""
        return load_custom_models((self.working_folder, self.config_folder), models_file)


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except OSError:  # deleted meanwhile; what does not lie in it is there all the same
        return Path()


def resolve_model(
    name: str | None,
    *,
    models_file: Path | None = None,
    offline: bool = False,
    free_bytes: int | Callable[[], int] | None = None,
    search_paths: SearchPaths | None = None,
) -> ModelSpec:
    """The model to run; downloads nothing. `path` is set when its files are on this machine.

    Args:
        name: as the user gave it; None or "" = choose (see `default_model`).
        offline: refuse a hub id of which nothing is known and nothing is on this machine.
        free_bytes: see `default_model`.

    Raises:
        ModelNotFoundError: no such name; the hint gives the closest ones.
        ModelFileError: a local folder without a usable config.json.
        CustomModelsError, UsageError: custom_models.json or config.toml is malformed.
        DownloadError: `offline` and an unknown hub id.
    """
    search_paths = search_paths or SearchPaths()
    custom = search_paths.custom_models(models_file)
    if not name:
        return default_model(custom, search_paths, free_bytes=free_bytes)
    return _named(name, custom, search_paths, offline=offline)


def default_model(
    custom: CustomModels,
    search_paths: SearchPaths,
    *,
    free_bytes: int | Callable[[], int] | None = None,
    quantization: Quantization = Quantization.NONE,
) -> ModelSpec:
    """QWENCLI_MODEL, else `model` in config.toml, else custom_models.json's default, else the best
    downloaded built-in vision model that fits, else the bundled one.

    Args:
        free_bytes: memory of the device that a model may take (VRAM, or RAM on a CPU). None =
            not known: then the smallest downloaded one is taken, as it is the likeliest to fit.
            What gives it is called where there is a choice.
    """
    for origin, wished in (
        (ENVIRONMENT_KEY, search_paths.environ.get(ENVIRONMENT_KEY)),
        (
            str(search_paths.config_folder / CONFIG_FILE),
            configured_model(search_paths.config_folder),
        ),
    ):
        if wished:
            return _wished(origin, wished, custom, search_paths)
    if custom.default is not None:
        return with_local_files(custom.default)
    here = [spec for spec in map(with_local_files, _candidates()) if spec.path is not None]
    if callable(free_bytes):
        free_bytes = free_bytes() if here else None
    if free_bytes is None:
        fitting = sorted(here, key=lambda spec: _needed(spec, quantization))
    else:
        fitting = [spec for spec in here if _needed(spec, quantization) <= free_bytes]
    return fitting[0] if fitting else bundled_spec(search_paths)


def names_a_model(search_paths: SearchPaths | None = None) -> bool:
    """Whether the user named a model for when none is named: in QWENCLI_MODEL, config.toml or
    custom_models.json."""
    search_paths = search_paths or SearchPaths()
    return bool(
        search_paths.environ.get(ENVIRONMENT_KEY)
        or configured_model(search_paths.config_folder)
        or search_paths.custom_models(None).default
    )


def recommended_model(
    free_bytes: int, quantization: Quantization = Quantization.NONE
) -> ModelSpec | None:
    """The best built-in vision model that fits, downloaded or not: the one to offer.

    Its download is as large as `memory.weight_bytes` of its shape. None when none fits.
    """
    fitting = (spec for spec in _candidates() if _needed(spec, quantization) <= free_bytes)
    return next(fitting, None)


# Of a GPU's memory: what a model that nobody named may take.
CARD_SHARE = 0.9


def usable_on_card(total_bytes: int) -> int:
    """Bytes that a model which nobody named may take of a GPU with so much memory, whatever the
    driver or a desktop holds of it: the same for `diagnose`, and for `bench` today and tomorrow."""
    return int(CARD_SHARE * total_bytes)


def bundled_spec(search_paths: SearchPaths) -> ModelSpec:
    """The bundled model.

    Raises:
        ModelFileError: the package was installed without it.
    """
    return ModelSpec(
        name=BUNDLED_NAME,
        source=ModelSource.BUNDLED,
        path=search_paths.bundled,
        hub_config=read_config(search_paths.bundled),
    )


def with_local_files(spec: ModelSpec) -> ModelSpec:
    """The spec with `path` and `hub_config` filled from this machine, as far as they are here."""
    path = spec.path or _cached(spec)
    return spec if path is None else replace(spec, path=path, hub_config=read_config(path))


def _cached(spec: ModelSpec, *, allow_pickle: bool = False) -> Path | None:
    if spec.repo_id is None:
        return None
    from qwencli.models.hub import find_cached

    return find_cached(spec.repo_id, allow_pickle=allow_pickle)


def locate(spec: ModelSpec, *, offline: bool = False, allow_pickle: bool = False) -> Path:
    """The local folder with the model's files; `folder.check_folder` says whether they are good.

    Raises:
        ModelFileError: the folder the spec names is not there or has no config.json.
        DownloadError: not on this machine, and the reason it cannot be fetched.
    """
    if spec.path is not None:
        read_config(spec.path)
        return spec.path
    cached = _cached(spec, allow_pickle=allow_pickle)
    if cached is not None:
        return cached
    from qwencli.models.hub import download

    assert spec.repo_id is not None, "a spec without a folder names a repository"
    return download(spec.repo_id, offline=offline, allow_pickle=allow_pickle)


def dummy_config(spec: ModelSpec) -> Mapping[str, Any]:
    """The config.json of a model that is to have random weights.

    Raises:
        ModelFileError: its shape is not known here.
    """
    if spec.hub_config is None:
        raise ModelFileError(
            f"--load-format dummy: the shape of {spec.name} is not known here",
            "name a built-in model (see: qwencli models) or a folder with its config.json",
        )
    return spec.hub_config


def check_model(spec: ModelSpec, load_format: LoadFormat) -> Mapping[str, bool]:
    """Raise where no engine could load the model, as far as files on this machine tell; returns its
    `traits` and whether it is `PREQUANTIZED`, nothing of a model that is yet to be downloaded.

    Raises:
        ModelFileError: as when an engine opens it.
    """
    from qwencli.models.quant_formats import quantization_section
    from qwencli.models.shape_reader import read_shape

    if load_format is LoadFormat.DUMMY:
        return read_shape(dummy_config(spec), spec.name).text.traits
    folder = spec.path or _cached(spec)
    if folder is None:
        return {}
    config = check_folder(folder)
    prequantized = quantization_section(config) is not None
    return {**read_shape(config).text.traits, PREQUANTIZED: prequantized}


def _named(
    name: str, custom: CustomModels, search_paths: SearchPaths, *, offline: bool = False
) -> ModelSpec:
    entries = {known.lower(): spec for known, spec in custom.specs.items()}
    entry = custom.specs.get(name) or entries.get(name.lower())
    if entry is not None:
        return with_local_files(entry)
    if name.lower() == BUNDLED_NAME:
        return bundled_spec(search_paths)
    builtin = find_builtin(name)
    if builtin is not None:
        return with_local_files(builtin_spec(builtin))
    local = _local(name, search_paths)
    if local is not None:
        return local
    if HUB_ID.fullmatch(name):
        return _hub(name, offline=offline)
    raise _as_address(name) or ModelNotFoundError(
        f"no model is called {shortened(name)}", _suggestion(name, custom)
    )


def _as_address(name: str) -> ModelNotFoundError | None:
    """What to give in place of an address of a model, or of its name with a revision."""
    hub = _HUB_ADDRESS.match(name)
    pinned, at, _ = name.partition("@" if "@" in name else ":")
    if hub is not None:
        return ModelNotFoundError(
            f"{shortened(name)} is an address, not a name", f"give the hub id alone: {hub['id']}"
        )
    if _ANY_ADDRESS.match(name):
        return ModelNotFoundError(
            f"{shortened(name)} is an address, not a name",
            "give a hub id (Owner/Name), or the path of the model's folder on this machine",
        )
    if at and HUB_ID.fullmatch(pinned):
        return ModelNotFoundError(
            f"{shortened(name)}: revisions and tags of a model are not taken",
            f"give {pinned} alone, or a folder with the revision that you downloaded",
        )
    return None


def _wished(origin: str, name: str, custom: CustomModels, search_paths: SearchPaths) -> ModelSpec:
    try:
        return _named(name, custom, search_paths)
    except ModelNotFoundError as error:
        # Without its origin, an error about a name that nobody typed is a riddle.
        raise ModelNotFoundError(f"{origin}: {error.message}", error.hint) from error


def _local(name: str, search_paths: SearchPaths) -> ModelSpec | None:
    folder = as_folder(name)
    path = search_paths.working_folder / (folder or name)
    # `os.path`: pathlib's raise for names that no system takes and for folders nobody may enter.
    if not os.path.lexists(path):
        if folder is None:
            return None
        raise ModelNotFoundError(f"no folder {str(path)!r}", "check the path")
    if folder is None and HUB_ID.fullmatch(name) and _is_empty_folder(path):
        return None
    try:
        config = read_config(path)
    except ModelFileError as error:
        if folder is None and HUB_ID.fullmatch(name):
            error.hint += "; for the model of that name on the hub, run in another folder"
        raise
    return ModelSpec(name, ModelSource.LOCAL, path=path, hub_config=config)


def _is_empty_folder(path: Path) -> bool:
    try:
        return next(path.iterdir(), None) is None
    except OSError:  # a file, or not to be read
        return False


def _hub(repo_id: str, *, offline: bool) -> ModelSpec:
    spec = with_local_files(ModelSpec(repo_id, ModelSource.HUB, repo_id=repo_id))
    if offline and spec.path is None:
        raise DownloadError(
            f"{repo_id} is not on this machine and --offline is set",
            "run once without --offline, or give a local folder",
        )
    return spec


def _suggestion(name: str, custom: CustomModels) -> str:
    known = [*custom.specs, BUNDLED_NAME, *BUILTINS]
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    start = f"did you mean {', '.join(close)}? " if close else ""
    return start + "`qwencli models` lists all; a folder or a hub id (Owner/Name) works too"


def _candidates() -> list[ModelSpec]:
    # Thinking variants are never a default: they may spend the whole answer thinking.
    return [
        builtin_spec(entry)
        for entry in ENTRIES
        if FAMILIES[entry.model_type].vision and not entry.alias.endswith("-thinking")
    ]


def _needed(spec: ModelSpec, quantization: Quantization) -> int:
    from qwencli.models.memory import estimate
    from qwencli.models.shape_reader import read_shape

    assert spec.hub_config is not None, "built-ins come with their configuration"
    return estimate(read_shape(spec.hub_config, spec.name), quantization).total
