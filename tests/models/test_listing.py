"""The list of models: each once, with what is known about it."""

from __future__ import annotations

import json

from qwencli.models.builtin import BUILTINS
from qwencli.models.listing import list_models
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import parameter_count
from tests.models.tiny import CONFIGS, write_model


def rows_of(search_paths, entries=None):
    if entries is not None:
        text = json.dumps({"hf_vl_models": entries})
        (search_paths.working_folder / "custom_models.json").write_text(text, encoding="utf-8")
    return {row.name: row for row in list_models(search_paths.custom_models(None), search_paths)}


def test_fresh_machine_has_the_bundled_and_the_builtins(search_paths):
    rows = rows_of(search_paths)
    assert list(rows) == ["scenes", *BUILTINS]
    assert rows["scenes"].downloaded and rows["scenes"].kind == "bundled"
    assert rows["scenes"].num_parameters == parameter_count(read_shape(CONFIGS["qwen3_vl"]))
    four = rows["qwen3-vl-4b"]
    assert (four.kind, four.downloaded, four.path) == ("built-in", False, None)
    assert four.size_bytes == 2 * four.num_parameters
    assert four.vram_gb["4bit"] < four.vram_gb["8bit"] < four.vram_gb["full"]
    assert four.vram_stated == ()


def test_without_the_bundled_model(search_paths):
    (search_paths.bundled / "config.json").unlink()
    for file in search_paths.bundled.iterdir():
        file.unlink()
    search_paths.bundled.rmdir()
    assert "scenes" not in rows_of(search_paths)


def test_downloaded_models(search_paths, cache_model):
    folder = cache_model("qwen3-vl-4b")
    other = cache_model("Owner/Fine-Tune")
    rows = rows_of(search_paths)
    assert rows["qwen3-vl-4b"].downloaded
    assert rows["qwen3-vl-4b"].path == str(folder)
    assert rows["qwen3-vl-4b"].size_bytes == (folder / "model.safetensors").stat().st_size
    assert rows["Owner/Fine-Tune"].kind == "downloaded"
    assert rows["Owner/Fine-Tune"].path == str(other)
    assert len(rows) == len(BUILTINS) + 2


def test_local_models(search_paths):
    write_model(search_paths.working_folder / "mine")
    unfinished = write_model(search_paths.working_folder / "unfinished")
    (unfinished / "model.safetensors").unlink()
    rows = rows_of(search_paths)
    assert rows["./mine"].kind == "local"
    assert "./unfinished" not in rows


def test_stated_memory_wins_and_is_marked(search_paths):
    entry = {"repo_id": "Qwen/Qwen3-VL-4B-Instruct", "vram_requirement": {"4bit": 99}}
    row = rows_of(search_paths, {"mine": {**entry, "default": True}})["mine"]
    assert row.vram_gb["4bit"] == 99
    assert row.vram_stated == ("4bit",)
    assert row.vram_gb["full"] == rows_of(search_paths)["qwen3-vl-4b"].vram_gb["full"]
    assert row.default


def test_custom_model_of_unknown_size(search_paths):
    row = rows_of(search_paths, {"mine": {"repo_id": "Owner/Name"}})["mine"]
    assert row.size_bytes is None and row.vram_gb == {} and row.problem is None


def test_quantized_checkpoint_has_no_estimate(search_paths):
    entry = {"repo_id": "Qwen/Qwen3-VL-4B-Instruct", "quantized": True}
    assert rows_of(search_paths, {"mine": entry})["mine"].vram_gb == {}


def test_broken_model_does_not_hide_the_others(search_paths):
    folder = write_model(search_paths.working_folder / "broken")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    entries = {"gone": {"repo_id": "./gone"}, "broken": {"repo_id": "./broken"}}
    rows = rows_of(search_paths, entries)
    assert "no such folder" in rows["gone"].problem
    assert "'llama' is not supported" in rows["broken"].problem
    assert not rows["gone"].downloaded
    assert "qwen3-vl-4b" in rows
