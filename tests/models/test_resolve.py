"""Which model a name means, and which one runs when there is no name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwencli.config import ModelSource, Quantization
from qwencli.errors import (
    CustomModelsError,
    DownloadError,
    ModelFileError,
    ModelNotFoundError,
    UsageError,
)
from qwencli.models.builtin import hub_config
from qwencli.models.memory import estimate
from qwencli.models.resolve import SearchPaths, default_model, recommended_model, resolve_model
from qwencli.models.shape_reader import read_shape
from tests.models.tiny import CONFIGS, write_model


def custom_file(folder, **entries):
    path = folder / "custom_models.json"
    path.write_text(json.dumps({"hf_vl_models": entries}), encoding="utf-8")
    return path


def needed(alias, quantization=Quantization.NONE):
    return estimate(read_shape(hub_config(alias)), quantization).total


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-vl-4b",
        "Qwen3-VL-4B",
        "Qwen3-VL-4B-Instruct",
        "Qwen/Qwen3-VL-4B-Instruct",
        "qwen/qwen3-vl-4b-instruct",
    ],
)
def test_builtin_by_alias_and_hub_id(search_paths, name):
    spec = resolve_model(name, search_paths=search_paths, offline=True)
    assert (spec.name, spec.source) == ("qwen3-vl-4b", ModelSource.BUILTIN)
    assert spec.repo_id == "Qwen/Qwen3-VL-4B-Instruct"
    assert spec.hub_config == hub_config("qwen3-vl-4b")
    assert spec.path is None


def test_builtin_that_is_downloaded_has_its_folder(search_paths, cache_model):
    folder = cache_model("qwen3-vl-4b")
    assert resolve_model("qwen3-vl-4b", search_paths=search_paths).path == folder


@pytest.mark.parametrize("name", ["scenes", "Scenes"])
def test_bundled(search_paths, name):
    spec = resolve_model(name, search_paths=search_paths)
    assert (spec.name, spec.source, spec.path) == (
        "scenes",
        ModelSource.BUNDLED,
        search_paths.bundled,
    )
    assert spec.hub_config == CONFIGS["qwen3_vl"]


def test_bundled_that_is_not_installed(search_paths, tmp_path):
    with pytest.raises(ModelFileError, match="no such folder"):
        resolve_model("scenes", search_paths=replace(search_paths, bundled=tmp_path / "absent"))


def test_real_surroundings():
    assert SearchPaths().bundled.parts[-3:] == ("qwencli", "bundled", "scenes")
    assert SearchPaths().working_folder == Path.cwd()
    assert "qwencli" in SearchPaths().config_folder.parts


@pytest.mark.parametrize("name", ["./mine", "mine", "nested/mine"])
def test_local_folder(search_paths, name):
    folder = write_model(search_paths.working_folder / name)
    spec = resolve_model(name, search_paths=search_paths)
    assert (spec.source, spec.path, spec.repo_id) == (ModelSource.LOCAL, folder, None)
    assert spec.hub_config == CONFIGS["qwen3_vl"]


def test_absolute_folder(search_paths, model_folder):
    assert resolve_model(str(model_folder), search_paths=search_paths).path == model_folder


def test_local_folder_that_is_not_there(search_paths):
    with pytest.raises(ModelNotFoundError, match=r"no folder .*absent"):
        resolve_model("./absent", search_paths=search_paths)
    with pytest.raises(ModelNotFoundError):
        resolve_model("./a\0b", search_paths=search_paths)


def test_local_folder_without_config(search_paths):
    (search_paths.working_folder / "empty").mkdir()
    for name in ("empty", "./empty"):
        with pytest.raises(ModelFileError, match=r"no config\.json"):
            resolve_model(name, search_paths=search_paths)


def test_folder_that_only_looks_like_a_hub_id(search_paths):
    (search_paths.working_folder / "Owner" / "Name").mkdir(parents=True)
    assert resolve_model("Owner/Name", search_paths=search_paths).source is ModelSource.HUB


def test_other_hub_id(search_paths, cache_model):
    spec = resolve_model("Owner/Name", search_paths=search_paths)
    assert (spec.source, spec.repo_id, spec.path) == (ModelSource.HUB, "Owner/Name", None)
    with pytest.raises(DownloadError, match="--offline"):
        resolve_model("Owner/Name", search_paths=search_paths, offline=True)
    folder = cache_model("Owner/Name")
    spec = resolve_model("Owner/Name", search_paths=search_paths, offline=True)
    assert (spec.path, spec.hub_config) == (folder, CONFIGS["qwen3_vl"])


def test_custom_entry_in_any_case_and_over_a_builtin(search_paths):
    custom_file(
        search_paths.working_folder, **{"Mine": {"repo_id": "O/M"}, "qwen3-4b": {"repo_id": "O/Q"}}
    )
    assert resolve_model("mine", search_paths=search_paths).repo_id == "O/M"
    assert resolve_model("qwen3-4b", search_paths=search_paths).repo_id == "O/Q"


def test_custom_entry_of_a_folder(search_paths):
    folder = write_model(search_paths.working_folder / "weights")
    custom_file(search_paths.working_folder, mine={"repo_id": "./weights"})
    spec = resolve_model("mine", search_paths=search_paths)
    assert (spec.path, spec.source) == (folder, ModelSource.CUSTOM)
    assert spec.hub_config == CONFIGS["qwen3_vl"]


def test_custom_entry_whose_folder_is_gone(search_paths):
    custom_file(search_paths.working_folder, mine={"repo_id": "./weights"})
    with pytest.raises(ModelFileError, match="no such folder"):
        resolve_model("mine", search_paths=search_paths)


def test_explicit_file_wins(search_paths, tmp_path):
    custom_file(search_paths.working_folder, mine={"repo_id": "O/work"})
    custom_file(search_paths.config_folder, mine={"repo_id": "O/user"})
    explicit = custom_file(tmp_path, mine={"repo_id": "O/explicit"})
    assert resolve_model("mine", search_paths=search_paths).repo_id == "O/user"
    assert (
        resolve_model("mine", search_paths=search_paths, models_file=explicit).repo_id
        == "O/explicit"
    )


def test_malformed_file_stops_even_a_builtin(search_paths):
    (search_paths.working_folder / "custom_models.json").write_text("{", encoding="utf-8")
    with pytest.raises(CustomModelsError):
        resolve_model("qwen3-vl-4b", search_paths=search_paths)


@pytest.mark.parametrize("name", ["qwen3-vl-4", "qwen3vl-4b", "QWEN3-VL-4b "])
def test_unknown_name_suggests_close_ones(search_paths, name):
    with pytest.raises(ModelNotFoundError, match="no model is called") as caught:
        resolve_model(name, search_paths=search_paths)
    assert "did you mean qwen3-vl-4b" in caught.value.hint


def test_unknown_name_without_a_close_one(search_paths):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("zzz\n", search_paths=search_paths)
    assert caught.value.hint.startswith("`qwencli models` lists all")
    assert "\n" not in caught.value.message


def test_order_without_a_name(search_paths, cache_model):
    assert resolve_model(None, search_paths=search_paths).name == "scenes"
    assert resolve_model("", search_paths=search_paths).name == "scenes"
    cache_model("qwen3-vl-2b")
    assert resolve_model(None, search_paths=search_paths).name == "qwen3-vl-2b"
    custom_file(search_paths.working_folder, mine={"repo_id": "O/M", "default": True})
    assert resolve_model(None, search_paths=search_paths).name == "mine"
    config = search_paths.config_folder / "config.toml"
    config.write_text('model = "qwen3-vl-8b"\n', encoding="utf-8")
    assert resolve_model(None, search_paths=search_paths).name == "qwen3-vl-8b"
    wished = replace(search_paths, environ={"QWENCLI_MODEL": "qwen2-vl-2b"})
    assert resolve_model(None, search_paths=wished).name == "qwen2-vl-2b"
    assert resolve_model("qwen3-4b", search_paths=wished).name == "qwen3-4b"


def test_wish_that_does_not_exist_says_where_it_is(search_paths):
    wished = replace(search_paths, environ={"QWENCLI_MODEL": "qwen3-vl-4"})
    with pytest.raises(ModelNotFoundError, match="QWENCLI_MODEL: no model is called 'qwen3-vl-4'"):
        resolve_model(None, search_paths=wished)
    (search_paths.config_folder / "config.toml").write_text("model = 'x'", encoding="utf-8")
    with pytest.raises(ModelNotFoundError, match=r"config\.toml: no model is called 'x'"):
        resolve_model(None, search_paths=search_paths)


@pytest.mark.parametrize("text", ["model = ", "model = 3", "\xff", "x = " + "[" * 50_000])
def test_malformed_config(search_paths, text):
    (search_paths.config_folder / "config.toml").write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=r"config\.toml"):
        resolve_model(None, search_paths=search_paths)


def test_best_downloaded_model_that_fits(search_paths, cache_model):
    for alias in (
        "qwen3-vl-8b",
        "qwen3-vl-4b",
        "qwen2.5-vl-3b",
        "qwen3-32b",
        "qwen3-vl-32b-thinking",
    ):
        cache_model(alias)

    def chosen(free_bytes, **options):
        custom = search_paths.custom_models(None)
        return default_model(custom, search_paths, free_bytes=free_bytes, **options).name

    assert chosen(10**12) == "qwen3-vl-8b"
    assert chosen(needed("qwen3-vl-8b") - 1) == "qwen3-vl-4b"
    assert chosen(needed("qwen3-vl-4b") - 1) == "qwen2.5-vl-3b"
    assert chosen(needed("qwen3-vl-8b") - 1, quantization=Quantization.INT4) == "qwen3-vl-8b"
    assert chosen(10**6) == "scenes"
    assert chosen(None) == "qwen2.5-vl-3b", "the smallest, when the device is not known"


def test_recommendation_fits_the_card():
    assert recommended_model(24 * 10**9).name == "qwen3.5-9b"
    assert recommended_model(12 * 10**9).name == "qwen3.5-4b"
    assert recommended_model(10**9) is None


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [
        (8, "qwen3.5-4b"),
        (12, "qwen3.5-9b"),
        (16, "qwen3.5-9b"),
        (24, "qwen3.8-27b"),
        (32, "qwen3.8-27b"),
    ],
)
def test_recommendation_at_four_bits_for_each_size_of_card(gigabytes, name):
    """With a picture of a megapixel; a desktop takes some of the card itself."""
    assert recommended_model((gigabytes - 1) * 10**9, Quantization.INT4).name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct", "alone: Qwen/Qwen3-VL-4B-Instruct"),
        ("https://hf.co/Qwen/X/tree/main?library=a", "give the hub id alone: Qwen/X"),
        ("huggingface.co/Qwen/X", "give the hub id alone: Qwen/X"),
        ("hf://Qwen/X", "give the hub id alone: Qwen/X"),
        ("s3://bucket/model", "is an address, not a name"),
        ("file:///srv/model", "is an address, not a name"),
        ("Qwen/X@main", "give Qwen/X alone"),
        ("Qwen/X:latest", "give Qwen/X alone"),
        ("x" * 5000, "..."),
        ("a/" * 3000, "..."),
    ],
)
def test_a_name_that_is_none_is_told_for_what_it_is(search_paths, name, said):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(name, search_paths=search_paths)
    assert said in f"{caught.value.message} {caught.value.hint}"
    assert len(caught.value.message) < 200


@pytest.mark.skipif(sys.platform == "win32", reason="links there need a right")
@pytest.mark.parametrize("target", ["/nowhere/x", "model.safetensors"])
def test_links_to_nothing_are_named(search_paths, tmp_path, target):
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").symlink_to(target)
    (folder / "README.md").symlink_to("nothing")
    with pytest.raises(ModelFileError, match=r"links to files that are not there: model\.safe"):
        resolve_model(str(folder), search_paths=search_paths)


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="POSIX")
def test_a_device_is_no_missing_folder(search_paths):
    with pytest.raises(ModelFileError, match="/dev/null: is a file, not a model folder"):
        resolve_model("/dev/null", search_paths=search_paths)
