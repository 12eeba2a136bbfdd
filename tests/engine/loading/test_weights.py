from __future__ import annotations

import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwencli.config import Attention, Quantization
from qwencli.engine.layers.vision_tower import VisionTower
from qwencli.engine.loading import reader, weights
from qwencli.engine.protocol import BytesRead
from qwencli.errors import ModelFileError
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import PREFIXES, specs
from tests.models.test_shape_reader import qwen2_5_vl, qwen3_vl

CPU = torch.device("cpu")
TOWER_MATRICES = {
    spec.name
    for spec in specs(read_shape(qwen3_vl()))
    if spec.name.endswith((".patch", ".qkv", ".proj", ".mlp_in", ".mlp_out", ".in", ".out"))
    and spec.name.startswith("vision.")
}
NEW = {"text": "model.language_model.", "vision": "model.visual.", "root": ""}
OLD = {"text": "model.", "vision": "visual.", "root": ""}


def hub_tensors(
    shape: ModelShape, prefix: dict[str, str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A checkpoint of random values under the names of the hub."""
    generator = torch.Generator().manual_seed(0)
    return {
        prefix[part.section] + part.name: torch.randn(part.shape, generator=generator).to(dtype)
        for spec in specs(shape)
        for part in spec.parts
    }


def expected(
    shape: ModelShape, prefix: dict[str, str], hub: dict[str, torch.Tensor]
) -> weights.Tensors:
    return {
        spec.name: torch.cat([hub[prefix[p.section] + p.name].flatten(1) for p in spec.parts])
        if len(spec.shape) > 1
        else torch.cat([hub[prefix[p.section] + p.name] for p in spec.parts])
        for spec in specs(shape)
    }


def save_sharded(folder: Path, hub: dict[str, torch.Tensor], shards: int) -> None:
    names = list(hub)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard:05}.safetensors"
        part = {name: hub[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


@pytest.fixture
def shape() -> ModelShape:
    return read_shape(qwen3_vl())


@pytest.fixture
def hub(shape: ModelShape) -> dict[str, torch.Tensor]:
    return hub_tensors(shape, NEW, torch.float32)


@pytest.mark.parametrize("config", [qwen3_vl(), qwen2_5_vl()], ids=["tied", "untied"])
@pytest.mark.parametrize("prefix", [NEW, OLD], ids=["new names", "old names"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_lands_in_its_rows(
    tmp_path: Path, config: dict[str, Any], prefix: dict[str, str], shards: int
) -> None:
    shape = read_shape(config)
    hub = hub_tensors(shape, prefix, torch.bfloat16)
    if shards == 1:
        save_file(hub, tmp_path / "model.safetensors")
    else:
        save_sharded(tmp_path, hub, shards)
    loaded = weights.load(tmp_path, shape, torch.bfloat16, CPU)
    assert loaded.unused == ()
    want = expected(shape, prefix, hub)
    assert loaded.tensors.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(loaded.tensors[name], tensor), name


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization("4bit")])
def test_what_is_read_is_told(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor], quantization: Quantization
) -> None:
    save_file(hub, tmp_path / "model.safetensors")
    stored = sum(tensor.nbytes for tensor in hub.values())
    told, cache = BytesRead(), tmp_path / "kept.safetensors"
    for again in range(2):
        loaded = weights.load(
            tmp_path, shape, torch.float32, CPU, quantization, cache_file=cache, progress=told
        )
        if loaded.keeping is not None:
            loaded.keeping.begin()
            loaded.keeping.write()
        assert told.done == told.total
        if quantization is Quantization.NONE or not again:
            assert told.total == stored
        else:
            assert 0 < told.total < stored


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("saved again", "was changed while it was read"),
        ("written to", "was changed while it was read"),
        ("cut", "ended while reading"),
        ("gone", "cannot be read"),
    ],
)
def test_files_that_change_while_they_are_read_are_refused(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor], how: str, said: str
) -> None:
    """Half of one model and half of another one would be neither."""
    save_sharded(tmp_path, hub, 2)
    file = tmp_path / "model-00001.safetensors"
    # What is quantized is read in `finish`.
    mode = Quantization("4bit")
    with weights.begin(tmp_path, shape, torch.float32, CPU, mode) as pending:
        if how == "saved again":
            for name in hub:
                hub[name] = hub[name] + 1
            save_sharded(tmp_path, hub, 2)
        elif how == "written to":
            with file.open("r+b") as stream:
                stream.seek(-64, os.SEEK_END)
                stream.write(bytes(64))
            os.utime(file)
        elif how == "cut":
            os.truncate(file, 10_000)
        elif how == "gone":
            file.unlink()
        with pytest.raises(ModelFileError, match=said):
            pending.finish()


def test_a_load_that_is_given_up_ends_though_all_of_the_ring_is_in_use(
    tmp_path: Path, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the tokenizer cannot be read: what has been read waits for the caller."""
    save_file(hub_tensors(shape, NEW, torch.bfloat16), tmp_path / "model.safetensors")
    ending = ThreadPoolExecutor.shutdown

    def late(pool: ThreadPoolExecutor, **how: bool) -> None:
        time.sleep(0.2)  # the reading thread is quicker
        ending(pool, **how)

    pending = weights.begin(tmp_path, shape, torch.float32, CPU)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", late)
    closing = threading.Thread(target=pending.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_types_are_converted_as_torch_converts_them(
    tmp_path: Path,
    shape: ModelShape,
    stored: torch.dtype,
    wanted: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small, and no multiple of a row, so that tensors need several pieces.
    monkeypatch.setattr(reader, "STAGING_BYTES", 1000 * 64)
    hub = hub_tensors(shape, NEW, stored)
    save_file(hub, tmp_path / "model.safetensors")
    loaded = weights.load(tmp_path, shape, wanted, CPU)
    for name, tensor in expected(shape, NEW, hub).items():
        assert torch.equal(loaded.tensors[name], tensor.to(wanted)), name
        kept = wanted == torch.float32 and name in TOWER_MATRICES
        assert loaded.tensors[name].dtype == (stored if kept else wanted), name


@torch.inference_mode()
def test_matrices_of_a_shorter_type_change_nothing_in_the_tower(
    tmp_path: Path, shape: ModelShape
) -> None:
    hub = hub_tensors(shape, NEW, torch.bfloat16)
    save_file(hub, tmp_path / "model.safetensors")
    short = weights.load(tmp_path, shape, torch.float32, CPU).tensors
    whole = {name: tensor.float() for name, tensor in short.items()}
    assert shape.vision is not None
    grid = (1, 2 * shape.vision.merge_size, 2 * shape.vision.merge_size)
    patches = torch.randn(grid[1] * grid[2], shape.vision.patch_elements)
    features = [
        VisionTower(shape.vision, tensors, Attention.SDPA).encode(patches, [grid])
        for tensors in (short, whole)
    ]
    assert torch.equal(features[0].embeds, features[1].embeds)
    assert features[0].embeds.dtype == torch.float32
    for pair in zip(features[0].deepstack, features[1].deepstack, strict=True):
        assert torch.equal(*pair)


def test_text_model_and_unused_tensors(tmp_path: Path) -> None:
    config = qwen3_vl()["text_config"] | {"model_type": "qwen3", "rope_scaling": None}
    shape = read_shape(config)
    hub = hub_tensors(shape, OLD, torch.float32)
    hub["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(hub, tmp_path / "model.safetensors")
    loaded = weights.load(tmp_path, shape, torch.float32, CPU)
    assert loaded.unused == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_no_weights_here(tmp_path: Path, shape: ModelShape) -> None:
    with pytest.raises(ModelFileError, match="no weights"):
        weights.load(tmp_path, shape, torch.float32, CPU)


def test_all_extra_tensors_are_named(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor]
) -> None:
    extra = {"model.visual.blocks.9.norm1.weight": torch.ones(64), "adapter": torch.ones(1)}
    save_file(hub | extra, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError) as caught:
        weights.load(tmp_path, shape, torch.float32, CPU)
    assert "2 tensors that config.json does not describe" in caught.value.message
    assert all(name in caught.value.message for name in extra)


def test_all_missing_tensors_are_named(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor]
) -> None:
    gone = ["model.language_model.layers.2.mlp.up_proj.weight", "model.visual.merger.norm.bias"]
    for name in gone:
        del hub[name]
    save_file(hub, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError) as caught:
        weights.load(tmp_path, shape, torch.float32, CPU)
    assert "2 tensors missing" in caught.value.message
    assert all(name in caught.value.message for name in gone)


def test_a_wrong_shape_is_named_with_both_shapes(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor]
) -> None:
    hub["model.language_model.norm.weight"] = torch.ones(255)
    save_file(hub, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelFileError, match=r"norm.weight is \[255\], config.json asks for \[256\]"
    ):
        weights.load(tmp_path, shape, torch.float32, CPU)


def test_a_type_that_is_no_float_is_named(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor]
) -> None:
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    hub[name] = hub[name].to(torch.int8)
    save_file(hub, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=f"{name} is I8"):
        weights.load(tmp_path, shape, torch.float32, CPU)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor], value: float
) -> None:
    name = "model.language_model.layers.1.self_attn.k_proj.weight"
    hub[name][3, 5] = value
    save_file(hub, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError) as caught:
        weights.load(tmp_path, shape, torch.float32, CPU)
    assert caught.value.message == f"weights with NaN or infinity: {name}"


def test_values_beyond_float16_are_found_and_the_hint_names_another_type(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor]
) -> None:
    hub["model.language_model.norm.weight"][0] = 1e6
    save_file(hub, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError) as caught:
        weights.load(tmp_path, shape, torch.float16, CPU)
    assert "--dtype bfloat16" in caught.value.hint


def test_a_head_in_the_file_is_used_unless_it_is_the_embedding(
    tmp_path: Path, shape: ModelShape, hub: dict[str, torch.Tensor]
) -> None:
    hub["lm_head.weight"] = hub["model.language_model.embed_tokens.weight"].clone()
    save_file(hub, tmp_path / "model.safetensors")
    assert weights.load(tmp_path, shape, torch.float32, CPU).unused == ("lm_head.weight",)
    hub["lm_head.weight"][0, 0] += 1
    save_file(hub, tmp_path / "model.safetensors")
    loaded = weights.load(tmp_path, shape, torch.float32, CPU)
    assert torch.equal(loaded.tensors["text.head"], hub["lm_head.weight"])
    assert loaded.unused == ()


def test_dummy_weights_are_deterministic_by_name(shape: ModelShape) -> None:
    first = weights.dummy(shape, torch.float32, CPU).tensors
    again = weights.dummy(shape, torch.float32, CPU).tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["text.0.qkv"], first["text.1.qkv"])
    assert first["text.0.qkv"].std().item() == pytest.approx(weights.DUMMY_STD, rel=0.05)
    assert torch.equal(first["text.0.q_norm"], torch.ones(128))
    assert torch.equal(first["vision.0.qkv_bias"], torch.zeros(192))


def test_the_names_of_parts_are_unique(shape: ModelShape) -> None:
    parts = [part for spec in specs(shape) for part in spec.parts]
    assert len(set(parts)) == len(parts)
    assert set(PREFIXES) == {part.section for part in parts} | {"root"}
