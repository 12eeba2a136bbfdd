from __future__ import annotations

import json

import pytest
from huggingface_hub import constants

from qwencli.models.builtin import BUILTINS, hub_config
from qwencli.models.resolve import SearchPaths
from tests.models.tiny import write_model


@pytest.fixture
def model_folder(tmp_path):
    """A complete tiny Qwen3-VL folder."""
    return write_model(tmp_path / "model")


@pytest.fixture
def search_paths(tmp_path, monkeypatch):
    """Surroundings without any model but a tiny bundled one; the hub cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("work", "config"):
        (tmp_path / name).mkdir()
    bundled = write_model(tmp_path / "bundled")
    return SearchPaths(tmp_path / "work", tmp_path / "config", bundled, environ={})


@pytest.fixture
def cache_model(tmp_path):
    """Put a complete snapshot into the hub cache: a built-in's true config, or a tiny one."""

    def cache_model(name):
        repo_id = BUILTINS[name].repo_id if name in BUILTINS else name
        repo = tmp_path / "cache" / ("models--" + repo_id.replace("/", "--"))
        folder = write_model(repo / "snapshots" / ("c" * 40))
        if name in BUILTINS:
            config = json.dumps(hub_config(name))
            (folder / "config.json").write_text(config, encoding="utf-8")
        return folder

    return cache_model
