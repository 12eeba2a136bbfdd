"""Mixtures of experts: what config.json says of them, and how weights may have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwencli.config import Quantization
from qwencli.errors import ModelFileError
from qwencli.models.builtin import hub_config
from qwencli.models.folder import check_folder
from qwencli.models.memory import decode_bytes, native_weight_bytes
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import expected_tensors, parameter_count
from tests.models.test_checkpoint import Sizes, refused, write

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [0],
}


def config(**changes: Any) -> dict[str, Any]:
    return CONFIG | changes


def folder(tmp_path: Path, sizes: Sizes, **changes: Any) -> Path:
    tensors = {name: ("BF16", size) for name, size in sizes.items()}
    return write(tmp_path / "model", tensors, config(**changes))


def stacked() -> Sizes:
    return dict(expected_tensors(read_shape(CONFIG)))


def apart() -> Sizes:
    sizes = stacked()
    mlp = "model.layers.1.mlp.experts."
    del sizes[mlp + "gate_up_proj"], sizes[mlp + "down_proj"]
    for expert in range(3):
        for name, size in (("gate", (8, 32)), ("up", (8, 32)), ("down", (32, 8))):
            sizes[f"{mlp}{expert}.{name}_proj.weight"] = size
    return sizes


def transposed() -> Sizes:
    sizes = stacked()
    mlp = "model.layers.1.mlp.experts."
    return sizes | {mlp + "gate_up_proj": (3, 32, 16), mlp + "down_proj": (3, 8, 32)}


@pytest.mark.parametrize("sizes", [stacked(), apart(), transposed()])
def test_every_way_to_store_experts_is_taken(tmp_path: Path, sizes: Sizes) -> None:
    check_folder(folder(tmp_path, sizes))


@pytest.mark.parametrize("sizes", [stacked(), apart(), transposed()])
@pytest.mark.parametrize("count", [2, 5])
def test_another_number_of_experts_is_one_line(tmp_path: Path, sizes: Sizes, count: int) -> None:
    error = refused(folder(tmp_path, sizes, num_experts=count))
    assert f"config.json says {count} experts a layer, the weights have 3" in error.message


def test_an_expert_that_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    sizes = apart()
    del sizes["model.layers.1.mlp.experts.1.up_proj.weight"]
    assert "experts.1.up_proj.weight" in refused(folder(tmp_path, sizes)).message
    sizes = stacked()
    sizes["model.layers.1.mlp.experts.down_proj"] = (3, 32, 9)
    error = refused(folder(tmp_path / "other", sizes))
    assert "down_proj is [3, 32, 9], config.json asks for [3, 32, 8]" in error.message


def test_a_whole_feed_forward_is_no_mixture(tmp_path: Path) -> None:
    assert "mlp.gate.weight" in refused(folder(tmp_path, stacked(), mlp_only_layers=[])).message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 4}, "num_experts_per_tok 4 is more than the 3 experts"),
        ({"num_experts": 0}, "num_experts is 0, expected a whole number"),
        ({"num_experts": None, "num_local_experts": -1}, "num_local_experts is -1"),
        ({"num_local_experts": 4}, "num_experts and num_local_experts are 3 and 4"),
        ({"moe_intermediate_size": "8"}, "moe_intermediate_size is '8'"),
        ({"mlp_only_layers": [0, 0]}, "mlp_only_layers is [0, 0]"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ],
)
def test_values_that_contradict_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        read_shape(config(**changes))
    assert said in caught.value.message


def test_layers_without_experts() -> None:
    text = read_shape(config(num_hidden_layers=6, decoder_sparse_step=2)).text
    assert [i for i in range(6) if text.experts(i) is None] == [0, 2, 4]
    assert text.intermediate_size == 48
    text = read_shape(config(mlp_only_layers=None, norm_topk_prob=True)).text
    assert text.moe is not None and text.moe.dense_layers == () and text.moe.renormalize
    assert text.intermediate_size == 2 * 8


@pytest.mark.parametrize("alias", ["qwen3-vl-30b-a3b", "qwen3.5-35b-a3b"])
def test_a_token_reads_the_experts_that_it_takes(alias: str) -> None:
    shape = read_shape(hub_config(alias))
    every, taken = parameter_count(shape), decode_bytes(shape, "int4-g128", 2, 0)
    assert taken is not None and taken < every / 2 / 5
    weights = native_weight_bytes(shape, Quantization.INT4, 2)
    # Half a byte a value of nearly all; groups, the head, the embedding and the tower take more.
    assert every / 2 < weights < 0.62 * every
