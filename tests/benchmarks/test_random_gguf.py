"""Files for llama.cpp: what it looks for is in them, by the reader of the package `gguf`."""

from __future__ import annotations

import json
import sys

import gguf
import pytest

from benchmarks.side_by_side import random_gguf
from qwencli.errors import (
    BenchError,
    MissingDependencyError,
    ModelFileError,
    UnsupportedModeError,
)
from qwencli.models.shape_reader import read_shape
from tests.checkpoints import hub_config
from tests.engine.frontend.tiny_folder import tiny_tokenizer, tiny_tokenizer_json

WIDE = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer_json(), encoding="utf-8")
    return tmp_path


def config_of(family="qwen3_vl", overrides=WIDE):
    config = hub_config(family, overrides)
    if family == "qwen3_vl":
        config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    return config


def write(folder, kind, family="qwen3_vl", overrides=WIDE):
    (folder / "config.json").write_text(json.dumps(config_of(family, overrides)), encoding="utf-8")
    out = folder / f"{kind}.gguf"
    random_gguf.script(["--config", str(folder), "--type", kind, "--out", str(out)])
    return out


@pytest.mark.parametrize(
    ("kind", "matrices", "head"),
    [("bf16", "BF16", "BF16"), ("q8_0", "Q8_0", "Q8_0"), ("q4_0", "Q4_0", "Q6_K")],
)
def test_a_file_has_the_models_sizes_and_types(folder, kind, matrices, head):
    read = gguf.GGUFReader(write(folder, kind))
    text = read_shape(config_of()).text
    assert read.get_field("general.architecture").contents() == "qwen3vl"
    assert read.get_field("qwen3vl.attention.key_length").contents() == text.head_dim
    assert read.get_field("qwen3vl.rope.dimension_sections").contents() == [*text.rope.sections, 0]
    found = {each.name: each for each in read.tensors}
    assert len(found) == 2 + 11 * text.num_layers + (not text.tied_head)
    assert list(found["blk.0.ffn_down.weight"].shape) == [64, 256]
    assert found["blk.0.ffn_down.weight"].tensor_type.name == matrices
    output = found["token_embd.weight" if text.tied_head else "output.weight"]
    assert output.tensor_type.name == head
    values = gguf.dequantize(output.data, output.tensor_type)
    assert values.shape == (text.vocab_size, 256)
    assert 0.015 < values.std() < 0.025 and abs(values).max() < 0.2
    assert (found["output_norm.weight"].data == 1).all()
    tokens = read.get_field("tokenizer.ggml.tokens").contents()
    eos = read.get_field("tokenizer.ggml.eos_token_id").contents()
    assert tokens[eos] == "<|im_end|>" and eos == tiny_tokenizer().token_to_id("<|im_end|>")
    assert [path.name for path in folder.glob("*.gguf*")] == [f"{kind}.gguf"]


def test_what_cannot_be_written_is_one_line_and_no_file(folder):
    with pytest.raises(UnsupportedModeError, match="qwen2_5_vl is not one of"):
        write(folder, "bf16", "qwen2_5_vl", None)
    with pytest.raises(UnsupportedModeError, match="rows of 72 do not divide"):
        write(folder, "q8_0", "qwen3", {**WIDE, "intermediate_size": 72})
    (folder / "taken.gguf").write_bytes(b"mine")
    with pytest.raises(BenchError, match="is there already"):
        random_gguf.script(
            ["--config", str(folder), "--type", "bf16", "--out", str(folder / "taken.gguf")]
        )
    assert (folder / "taken.gguf").read_bytes() == b"mine"
    assert not list(folder.glob("q8_0*"))


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match="gguf does not load"):
        write(folder, "bf16")


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ('{"model": {}}', "no tokenizer.json of byte pairs")]
)
def test_a_vocabulary_that_is_none(tmp_path, text, said):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=said):
        random_gguf.read_vocabulary(path, 1000)
    path.write_text(tiny_tokenizer_json(), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"config\.json no more than 10"):
        random_gguf.read_vocabulary(path, 10)
    read = random_gguf.read_vocabulary(path, 1000)
    assert read["tokens"][-1] == "[PAD999]" and len(read["tokens"]) == 1000
    assert read["tokens"].index("<think>") == tiny_tokenizer().token_to_id("<think>")
    assert read["merges"] and all(len(pair.split(" ")) == 2 for pair in read["merges"])
