"""Checkpoints that other tools quantized: each gives what its matrices give when stored plainly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwencli.capabilities import PREQUANTIZED
from qwencli.config import LoadFormat, ModelSource, ModelSpec
from qwencli.engine.loading import weights
from qwencli.engine.loading.reader import check_stored_scales
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.errors import ModelFileError
from qwencli.models.folder import check_folder
from qwencli.models.memory import packed_weight_bytes
from qwencli.models.quant_formats import format_of, packed_format
from qwencli.models.resolve import check_model
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import specs
from qwencli.models.weight_files import stored_tensors
from tests.engine.quant.packed_formats import (
    BNB,
    FORMATS,
    GPTQ,
    bnb_nf4,
    ct_int8,
    fp8_blocks,
    fp8_rows,
    gptq,
)

CPU = torch.device("cpu")
TEXT = {
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
PREFIX = {"text": "model.", "vision": "visual.", "root": ""}


def tensors_of(
    config: Mapping[str, Any], writer: Any, arguments: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint as packed by `writer`, and the same with its matrices stored plainly."""
    generator = torch.Generator().manual_seed(1)
    packed, plain = {}, {}
    for spec in specs(read_shape(config)):
        for part in spec.parts:
            name = PREFIX[part.section] + part.name
            if name.endswith("proj.weight") and len(part.shape) == 2:
                layer = name.removesuffix("weight")
                tensors, plain[name] = writer(*part.shape, seed=len(packed), **arguments)
                packed |= {layer + suffix: tensor for suffix, tensor in tensors.items()}
            else:
                value = torch.randn(part.shape, generator=generator) * 0.2
                packed[name] = plain[name] = value + (1 if "norm" in name else 0)
    return packed, plain


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


@torch.inference_mode()
def logits_of(loaded: weights.LoadedWeights) -> torch.Tensor:
    """Of a prompt's end and of five greedy steps."""
    model = QwenModel(read_shape(TEXT), loaded, 64)
    inputs = model.prepare([ModelPrompt([5, 9, 33, 70, 2, 41], [])])
    cache = model.static_cache()
    rows = [model.prefill(inputs, cache)[0]]
    positions = inputs.next_positions.clone()
    for _ in range(5):
        plan = AttentionPlan(cache.length + 1, None)
        token, slot = rows[-1].argmax(-1, keepdim=True), torch.tensor([cache.length])
        rows.append(model.decode_step(token, positions, slot, cache, plan)[0])
        cache.length += 1
        positions += 1
    return torch.stack(rows)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_what_its_matrices_give(tmp_path: Path, name: str) -> None:
    config, writer, arguments, label = FORMATS[name]
    packed, plain = tensors_of(TEXT, writer, arguments)
    shape = read_shape(TEXT)
    found = packed_format({"quantization_config": config})
    loaded = weights.load(
        write(tmp_path / "packed", packed), shape, torch.float32, CPU, packed=found
    )
    assert loaded.scheme == label
    assert not any(weights.is_decoder_matrix(name) for name in loaded.tensors)
    wanted = logits_of(weights.load(write(tmp_path / "plain", plain), shape, torch.float32, CPU))
    got = logits_of(loaded)
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()

    kept = sum(m.nbytes for m in loaded.matrices.values())
    kept += sum(t.nbytes for t in loaded.tensors.values())
    stored = stored_tensors([tmp_path / "packed" / "model.safetensors"])
    assert found is not None
    planned = packed_weight_bytes(shape, found, stored, value_bytes=4)
    # float32 scales of a few formats here take more than the two bytes of a usual one.
    assert planned == pytest.approx(kept, rel=0.06)


def load(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    found = packed_format({"quantization_config": config})
    return weights.load(write(folder, tensors), read_shape(TEXT), torch.float32, CPU, packed=found)


def test_layers_that_were_not_converted_stay_as_they_are(tmp_path: Path) -> None:
    packed, plain = tensors_of(TEXT, bnb_nf4, {})
    layer = "model.layers.1.mlp.down_proj."
    tensors = {name: t for name, t in packed.items() if not name.startswith(layer)}
    loaded = load(tmp_path, tensors | {layer + "weight": plain[layer + "weight"]}, BNB)
    assert loaded.scheme == "bnb-nf4+none"
    assert torch.equal(loaded.tensors["text.1.down"], plain[layer + "weight"])


def test_parts_of_different_kinds_become_one_plain_matrix(tmp_path: Path) -> None:
    """Unlike orders of columns (desc_act) in q, k and v cannot share a kernel."""
    packed, plain = tensors_of(TEXT, gptq, {"shuffle": True})
    layer = "model.layers.0.self_attn.q_proj."
    other, matrix = gptq(256, 128, seed=3)
    tensors = packed | {layer + suffix: tensor for suffix, tensor in other.items()}
    loaded = load(tmp_path, tensors, GPTQ)
    assert loaded.scheme == "gptq-int4-g32+none"
    assert torch.equal(loaded.tensors["text.0.qkv"][:256], matrix)
    wanted = plain["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(loaded.tensors["text.0.qkv"][256:384], wanted)


def test_a_packed_head_stays_packed_and_a_packed_vision_tower_does_not(tmp_path: Path) -> None:
    from tests.models.test_shape_reader import qwen2_5_vl

    config = qwen2_5_vl()
    shape = read_shape(config)
    generator = torch.Generator().manual_seed(1)
    tensors, matrices = {}, {}
    for spec in specs(shape):
        for part in spec.parts:
            name = PREFIX[part.section] + part.name
            tensors[name] = torch.randn(part.shape, generator=generator)
            chosen = name == "lm_head.weight" or name.endswith("blocks.0.attn.proj.weight")
            odd = name.endswith("blocks.0.mlp.down_proj.weight")
            if chosen or odd:
                del tensors[name]
                side = 16 if odd else 32
                layer, matrices[name] = fp8_blocks(*part.shape, seed=2, side=side)
                within = name.removesuffix("weight")
                tensors |= {within + suffix: tensor for suffix, tensor in layer.items()}
    found = packed_format({"quantization_config": {"quant_method": "fp8"}})
    loaded = weights.load(write(tmp_path, tensors), shape, torch.float32, CPU, packed=found)
    assert len(matrices) == 3 and loaded.matrices.keys() == {weights.HEAD}
    head = loaded.matrices[weights.HEAD].dequantize(torch.float32)
    assert torch.equal(head, matrices["lm_head.weight"])
    for name, ours in (("attn.proj", "vision.0.proj"), ("mlp.down_proj", "vision.0.mlp_out")):
        assert torch.equal(loaded.tensors[ours], matrices[f"visual.blocks.0.{name}.weight"])


def test_biases_that_a_tool_wrote_for_every_layer_have_to_be_zero(tmp_path: Path) -> None:
    packed, _ = tensors_of(TEXT, gptq, {})
    name = "model.layers.0.mlp.down_proj.bias"
    load(tmp_path, packed | {name: torch.zeros(128)}, GPTQ)
    with pytest.raises(ModelFileError, match=f"{name}: biases"):
        load(tmp_path, packed | {name: torch.ones(128)}, GPTQ)


def test_all_missing_scales_are_named(tmp_path: Path) -> None:
    packed, _ = tensors_of(TEXT, gptq, {})
    tensors = {n: t for n, t in packed.items() if not n.endswith("mlp.up_proj.scales")}
    del tensors["model.layers.1.self_attn.o_proj.qzeros"]
    with pytest.raises(ModelFileError, match="3 tensors missing") as caught:
        load(tmp_path, tensors, GPTQ)
    assert r"layers.{0-1}.mlp.up_proj.scales" in caught.value.message
    assert "layers.1.self_attn.o_proj.qzeros" in caught.value.message


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "quip"}, "quant_method 'quip'"),
        ({}, "quant_method None"),
        (GPTQ | {"bits": 3}, "gptq with bits 3"),
        (GPTQ | {"checkpoint_format": "marlin"}, "gptq with checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "awq with version 'gemv'"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "compressed-tensors with format 'nvfp4-pack-quantized'",
        ),
    ],
)
def test_what_is_not_read_is_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFileError, match=named) as caught:
        packed_format({"quantization_config": config}, "some/config.json")
    assert caught.value.message.startswith("some/config.json: ")
    assert "it reads" in caught.value.hint


def broken(tensors: dict[str, torch.Tensor], suffix: str, value: Any) -> dict[str, torch.Tensor]:
    name = next(name for name in tensors if name.endswith(suffix))
    return tensors | {name: value(tensors[name])}


@pytest.mark.parametrize(
    ("name", "suffix", "value", "named"),
    [
        ("gptq", "scales", lambda t: t[:3], r"has qzeros \[4, "),
        ("gptq", "g_idx", lambda t: t.clamp(max=1), "not 32 columns each"),
        ("awq g32", "qweight", lambda t: t[:-1], r"has qweight \[127, "),
        ("ct int4", "weight_packed", lambda t: t[:, :-1], "bits a value"),
        ("ct int4", "weight_scale", lambda t: t[:, :1].repeat(1, 9), "do not divide 128 columns"),
        ("ct int4", "weight_scale", lambda t: t[:, :1].repeat(1, 8), "groups of 16"),
        ("fp8 blocks", "weight_scale_inv", lambda t: t[:, :, None], "do not fit"),
        ("bnb nf4", "absmax", lambda t: t[:-1], "do not fit"),
        ("bnb nf4", "quant_state.bitsandbytes__nf4", lambda t: t[:9], "tells no 4-bit type"),
        ("bnb nf4 nested", "nested_absmax", lambda t: t[:0], "do not fit"),
        ("bnb int8", "weight_format", lambda t: t + 1, "not stored row by row"),
        ("awq g32", "scales", lambda t: t * torch.nan, "NaN or infinity: .*q_proj.scales"),
        ("fp8 rows", "q_proj.weight", lambda t: torch.full_like(t, torch.nan), "NaN or infinity"),
    ],
)
def test_what_does_not_fit_together_is_named(
    tmp_path: Path, name: str, suffix: str, value: Any, named: str
) -> None:
    config, writer, arguments, _ = FORMATS[name]
    packed, _ = tensors_of(TEXT, writer, arguments)
    with pytest.raises(ModelFileError, match=named) as caught:
        load(tmp_path, broken(packed, suffix, value), config)
    assert "model.layers.0." in caught.value.message


ALL_ZERO = {"gptq", "awq g32", "ct int4", "fp8 rows", "fp8 blocks", "bnb nf4", "bnb int8"}


@pytest.mark.parametrize("name", sorted(ALL_ZERO))
def test_scales_that_are_all_zero_are_named(tmp_path: Path, name: str) -> None:
    config, writer, arguments, _ = FORMATS[name]
    packed, _ = tensors_of(TEXT, writer, arguments)
    form = packed_format({"quantization_config": config})
    assert form is not None
    first = next(
        key
        for key in packed
        if key.startswith("model.layers.1.mlp.")
        and any(key.endswith(f".{packing.scale}") for packing in form.packings)
    )
    said = f"scales that are all zero: {re.escape(first)}$"
    packed[first] = torch.zeros_like(packed[first])
    with pytest.raises(ModelFileError, match=said):
        load(tmp_path, packed, config)
    with pytest.raises(ModelFileError, match=said):
        check_stored_scales(stored_tensors([tmp_path / "model.safetensors"]), form)
    # A matrix of zeros needs no scales.
    layer = first.rpartition(".weight.absmax")[0] or first.rpartition(".")[0]
    main = next(p.main for p in form.packings if f"{layer}.{p.main}" in packed)
    packed[f"{layer}.{main}"] = torch.zeros_like(packed[f"{layer}.{main}"])
    load(tmp_path, packed, config)
    check_stored_scales(stored_tensors([tmp_path / "model.safetensors"]), form)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_no_numbers_are_named_for_the_other_engine_too(
    tmp_path: Path, value: float
) -> None:
    config, writer, arguments, _ = FORMATS["fp8 rows"]
    packed, _ = tensors_of(TEXT, writer, arguments)
    packed = broken(packed, "up_proj.weight_scale", lambda t: t * value)
    form = packed_format({"quantization_config": config})
    assert form is not None
    write(tmp_path, packed)
    with pytest.raises(ModelFileError, match=r"NaN or infinity: .*up_proj\.weight_scale"):
        check_stored_scales(stored_tensors([tmp_path / "model.safetensors"]), form)


def test_a_folder_with_a_packed_head_is_complete(tmp_path: Path) -> None:
    packed, _ = tensors_of(TEXT, gptq, {})
    del packed["lm_head.weight"]
    head, _ = gptq(96, 128, seed=1)
    write(tmp_path, packed | {f"lm_head.{suffix}": tensor for suffix, tensor in head.items()})
    config = TEXT | {"quantization_config": GPTQ}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    check_folder(tmp_path)
    spec = ModelSpec("packed", ModelSource.LOCAL, path=tmp_path)
    assert check_model(spec, LoadFormat.AUTO)[PREQUANTIZED]


SCALED = {
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_rows, {"shape": ()}),
    "modelopt of older releases": ({"quant_algo": "FP8"}, fp8_rows, {"shape": (1,)}),
    "modelopt rows": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        fp8_rows,
        {},
    ),
    "modelopt blocks": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        fp8_blocks,
        {"modelopt": True},
    ),
    "unsaid": (None, fp8_rows, {"shape": ()}),
    "unsaid blocks": (None, fp8_blocks, {}),
    "unsaid int8": (None, ct_int8, {}),
    "unsaid bnb": (None, bnb_nf4, {}),
    "comfy": (None, fp8_rows, {"shape": (), "name": "scale_weight"}),
}


@pytest.mark.parametrize("name", SCALED)
def test_scales_are_read_whether_config_json_says_so_or_not(tmp_path: Path, name: str) -> None:
    config, writer, arguments = SCALED[name]
    packed, plain = tensors_of(TEXT, writer, arguments)
    shape = read_shape(TEXT)
    stored = stored_tensors([write(tmp_path / "packed", packed) / "model.safetensors"])
    found = format_of({} if config is None else {"quantization_config": config}, stored)
    assert found is not None
    loaded = weights.load(tmp_path / "packed", shape, torch.float32, CPU, packed=found)
    assert loaded.scheme.startswith("scaled-" if config is None else "modelopt-")
    wanted = logits_of(weights.load(write(tmp_path / "plain", plain), shape, torch.float32, CPU))
    got = logits_of(loaded)
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    kept = sum(m.nbytes for m in loaded.matrices.values())
    kept += sum(t.nbytes for t in loaded.tensors.values())
    planned = packed_weight_bytes(shape, found, stored, value_bytes=4)
    assert planned == pytest.approx(kept, rel=0.06)
