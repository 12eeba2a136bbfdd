"""Finds the folder with a model's files, downloading it when that is wanted and possible."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from qwencli.config import ModelSpec
from qwencli.models.download import download
from qwencli.models.folder import read_config
from qwencli.models.hub_cache import find_cached

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
