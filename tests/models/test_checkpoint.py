"""Which checkpoints both engines take, and what a refusal of the others says."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.errors import ModelFileError
from qwencli.models.folder import check_folder
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import expected_tensors
from qwencli.models.weight_files import all_named
from tests.models.tiny import CONFIGS, write_model

Sizes = dict[str, tuple[int, ...]]
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "U32": 4, "I8": 1}


def sizes_of(family: str = "qwen3_vl") -> Sizes:
    return dict(expected_tensors(read_shape(CONFIGS[family])))


def write(
    folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: dict[str, Any]
) -> Path:
    """A model folder of zeros: name -> type and shape."""
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = position + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    write_model(folder, config=config)
    content = len(raw).to_bytes(8, "little") + raw + bytes(position)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def refused(folder: Path) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        check_folder(folder)
    assert "\n" not in caught.value.message and caught.value.hint
    assert len(caught.value.message) < 1100
    return caught.value


def renamed(old: str, new: str, family: str = "qwen3_vl") -> Sizes:
    found = {re.sub(old, new, name): size for name, size in sizes_of(family).items()}
    assert found.keys() != sizes_of(family).keys()
    return found


VISION, TEXT_ONLY = "qwen3_vl", "qwen3"


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        (VISION, r"^model\.", ""),
        (VISION, r"^model\.", "model.model."),
        (VISION, r"^model\.language_model\.", "model."),
        (VISION, r"^model\.(language_model\.)?", ""),
        (VISION, r"^model\.language_model\.", "language_model.model."),
        ("qwen2_5_vl", r"^(model\.language_model|lm_head)\.", r"language_model.\1."),
        (TEXT_ONLY, r"^model\.", ""),
        (TEXT_ONLY, r"^", "model."),
        (TEXT_ONLY, r"^model\.", "language_model.model."),
    ],
)
def test_layouts_that_pass(tmp_path: Path, family: str, old: str, new: str) -> None:
    check_folder(write_model(tmp_path, family, tensors=renamed(old, new, family)))


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    name = "model.language_model.norm.weight"
    tensors = sizes_of() | {"norm.weight": (16,)}
    error = refused(write_model(tmp_path, tensors=tensors))
    assert "1 tensor that config.json does not describe: norm.weight" in error.message
    assert name not in error.message


@pytest.mark.parametrize(
    ("old", "new", "what", "advice"),
    [
        (r"^", "module.", "DDP", "model.module.save_pretrained"),
        (r"^model\.", "model.module.", "DDP", "model.module.save_pretrained"),
        (r"^", "_forward_module.", "DeepSpeed", "save_pretrained"),
        (r"^model\.(.*)\.q_proj\.", r"\1.q_proj.modules_to_save.default.", "PEFT", "merge"),
        (r"^", "_orig_mod.", "torch.compile", "_orig_mod.save_pretrained"),
        (r"^", "base_model.model.", "PEFT", "merge"),
        (r"(q_proj)\.weight", r"\1.base_layer.weight", "PEFT", "merge"),
        (r"^model\.visual\.", "vision_tower.", "MLX", "original version"),
        (r"^model\.language_model\.layers\.", "blk.", "GGUF", "safetensors"),
        (r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", "FSDP", "save_pretrained"),
    ],
)
def test_other_layouts_are_named_with_what_to_do(
    tmp_path: Path, old: str, new: str, what: str, advice: str
) -> None:
    error = refused(write_model(tmp_path, tensors=renamed(old, new)))
    assert what in error.message and advice in error.hint
    assert "download" not in error.hint


def test_an_adapter_beside_its_model_is_not_left_out(tmp_path: Path) -> None:
    tensors = sizes_of() | {"model.language_model.layers.0.self_attn.q_proj.lora_A.weight": (4, 16)}
    assert "PEFT" in refused(write_model(tmp_path, tensors=tensors)).message


def test_mlx_groups_are_named(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, size in sizes_of("qwen3").items():
        if len(size) == 2:
            layer = name.removesuffix("weight")
            tensors[name] = ("U32", (size[0], size[1] // 8))
            tensors[layer + "scales"] = tensors[layer + "biases"] = ("BF16", (size[0], 1))
        else:
            tensors[name] = ("BF16", size)
    quantization = {"group_size": 64, "bits": 4}
    for said in ({}, {"quantization": quantization}, {"quantization_config": quantization}):
        error = refused(write(tmp_path, tensors, CONFIGS["qwen3"] | said))
        assert "MLX" in error.message and "download" not in error.hint


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_a_missing_head_says_what_may_be_meant(tmp_path: Path, family: str) -> None:
    tensors = {name: size for name, size in sizes_of(family).items() if name != "lm_head.weight"}
    error = refused(write_model(tmp_path, family, tensors=tensors))
    assert "1 tensor missing from the weights: lm_head.weight" in error.message
    assert "tie_word_embeddings" in error.hint and "download" not in error.hint


@pytest.mark.parametrize("quantized", [None, "fp8", "bitsandbytes", "gptq"])
def test_a_layer_that_is_missing_or_left_over_is_found(
    tmp_path: Path, quantized: str | None
) -> None:
    said = {} if quantized is None else {"quantization_config": {"quant_method": quantized}}
    config = CONFIGS["qwen3"] | said
    tensors = sizes_of("qwen3")
    few = {name: size for name, size in tensors.items() if ".layers.1." not in name}
    assert "missing" in refused(write_model(tmp_path, config=config, tensors=few)).message
    more = tensors | {name.replace(".1.", ".2."): size for name, size in tensors.items()}
    error = refused(write_model(tmp_path, config=config, tensors=more))
    assert "11 tensors that config.json does not describe" in error.message
    assert "layers.2." in error.message


def fp8(**scales: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """qwen3 with projections of fp8; scales: ending -> shape, -1 = rows."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, size in sizes_of("qwen3").items():
        tensors[name] = ("BF16", size)
        if "_proj." in name:
            tensors[name] = ("F8_E4M3", size)
            for ending, shape in scales.items():
                rows = tuple(size[0] if count == -1 else count for count in shape)
                tensors[name.removesuffix("weight") + ending] = ("F32", rows)
    return tensors


MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}


@pytest.mark.parametrize("said", [{}, MODELOPT], ids=["unsaid", "modelopt"])
@pytest.mark.parametrize("shape", [(), (1,), (-1,), (-1, 1)])
def test_fp8_with_scales_passes(
    tmp_path: Path, said: dict[str, Any], shape: tuple[int, ...]
) -> None:
    tensors = fp8(weight_scale=shape, input_scale=())
    check_folder(write(tmp_path, tensors, CONFIGS["qwen3"] | said))
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    error = refused(write(tmp_path, tensors, CONFIGS["qwen3"] | said))
    assert "missing from the weights: model.layers.1.mlp.up_proj.weight_scale" in error.message


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (fp8(), "F8_E4M3 (without scales)"),
        (fp8(weight_scale=(), weight_scale_2=()), "NVFP4"),
        (fp8(weight_scale=(), pre_quant_scale=()), "ModelOpt's AWQ"),
        (
            {n: ("BF16", s) for n, (_, s) in fp8(weight_scale=()).items()},
            "fp8 or int8 with scales",
        ),
    ],
    ids=["no scales", "two scales", "scaled inputs", "cast without scales"],
)
def test_scales_that_would_not_be_used_are_named(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], named: str
) -> None:
    error = refused(write(tmp_path, tensors, CONFIGS["qwen3"]))
    assert named in error.message and "_proj" in error.message
    assert "transformers" not in error.hint


@pytest.mark.parametrize(
    ("endings", "named"),
    [
        (("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
        (("weight_packed", "weight_scale"), "compressed-tensors"),
    ],
)
def test_packed_layers_that_config_json_says_nothing_about_are_named(
    tmp_path: Path, endings: tuple[str, ...], named: str
) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, size in sizes_of("qwen3").items():
        packed = [name.removesuffix("weight") + ending for ending in endings]
        tensors |= dict.fromkeys(packed if "_proj." in name else [name], ("BF16", size))
    error = refused(write(tmp_path, tensors, CONFIGS["qwen3"]))
    assert "14 tensors missing" in error.message and named in error.message
    assert "download" not in error.hint


@settings(max_examples=80)
@given(st.data())
def test_no_checkpoint_with_one_tensor_out_of_place_passes(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(list(CONFIGS)))
    tensors = {name: ("BF16", size) for name, size in sizes_of(family).items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    other = data.draw(st.text("abcdefgh._0123456789", min_size=1, max_size=30).map("x".__add__))
    dtype, size = tensors[name]
    how = data.draw(st.sampled_from(["gone", "renamed", "beside", "twice", "type", "shape"]))
    if how in ("gone", "renamed", "type", "shape"):
        del tensors[name]
    if how in ("renamed", "beside"):
        tensors[other] = (dtype, size)
    elif how == "twice":
        tensors[name.replace("model.", "model.model.", 1) + "_scale"] = ("F32", (1,))
    elif how == "type":
        tensors[name] = (data.draw(st.sampled_from(["F8_E4M3", "U8", "I8", "U32"])), size)
    elif how == "shape":
        tensors[name] = (dtype, data.draw(st.sampled_from([(*size[::-1], 1), size[1:], (7,)])))
    with tempfile.TemporaryDirectory() as folder:
        error = refused(write(Path(folder), tensors, CONFIGS[family]))
    assert name in error.message or other in error.message or "_scale" in error.message


def test_only_a_head_that_is_not_the_embedding_unties_it(tmp_path: Path) -> None:
    tensors = sizes_of() | {"lm_head.weight": (40, 16)}
    folder = write_model(tmp_path, tensors=tensors)
    assert check_folder(folder)["tie_word_embeddings"] is True
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] = 1
    (folder / "model.safetensors").write_bytes(content)
    assert check_folder(folder)["tie_word_embeddings"] is False


def test_a_second_head_is_refused(tmp_path: Path) -> None:
    tensors = sizes_of("qwen3") | {"model.lm_head.weight": (40, 16)}
    error = refused(write_model(tmp_path, "qwen3", tensors=tensors))
    assert "config.json does not describe: model.lm_head.weight" in error.message


def test_of_a_tied_pair_the_head_alone_is_enough(tmp_path: Path) -> None:
    tensors = renamed(r"^model\.language_model\.embed_tokens\.", "lm_head.")
    assert check_folder(write_model(tmp_path, tensors=tensors))["tie_word_embeddings"] is True


def test_many_names_stay_one_short_line() -> None:
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "up", "down", "gate")
    layers = [f"model.layers.{n}.{part}.weight" for n in range(64) for part in parts]
    tower = [f"model.visual.blocks.{n}.{part}.bias" for n in range(27) for part in parts]
    line = all_named(["x" * 10_000, *layers, *tower, *(f"lone{n}" * 20 for n in range(50))])
    assert "model.layers.{0-63}.* (576)" in line and "and 50 more" in line
    assert len(line) < 400
