"""Finds the folder with a model's files, downloading it when that is wanted and possible."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from qwencli.config import LoadFormat, ModelSpec
from qwencli.errors import ModelFileError
from qwencli.models.download import download
from qwencli.models.folder import check_folder, read_config
from qwencli.models.hub_cache import find_cached
from qwencli.models.shape_reader import read_shape

BUNDLED_NAME = "scenes"


def bundled_folder() -> Path:
    """Where the package keeps its own model."""
    return Path(str(files("qwencli") / "bundled" / BUNDLED_NAME))


def locate(spec: ModelSpec, *, offline: bool = False, allow_pickle: bool = False) -> Path:
    """The local folder with the model's files; `folder.check_folder` says whether they are good.

    Raises:
        ModelFileError: the folder the spec names is not there or has no config.json.
        DownloadError: not on this machine, and the reason it cannot be fetched.
    """
    if spec.path is not None:
        read_config(spec.path)
        return spec.path
    assert spec.repo_id is not None, "a spec without a folder names a repository"
    cached = find_cached(spec.repo_id, allow_pickle=allow_pickle)
    return cached or download(spec.repo_id, offline=offline, allow_pickle=allow_pickle)


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


def check_model(spec: ModelSpec, load_format: LoadFormat) -> None:
    """Raise where no engine could load the model, as far as files on this machine tell.

    Raises:
        ModelFileError: as when an engine opens it; nothing of a model that is yet to be downloaded.
    """
    if load_format is LoadFormat.DUMMY:
        read_shape(dummy_config(spec), spec.name)
        return
    folder = spec.path or (find_cached(spec.repo_id) if spec.repo_id else None)
    if folder is not None:
        check_folder(folder)
