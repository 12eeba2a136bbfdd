"""Checkpoints that bitsandbytes itself wrote, through transformers: equal matrices and answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwencli.config import (
    EngineConfig,
    EngineName,
    ModelSource,
    ModelSpec,
    Quantization,
    SamplingOptions,
)
from qwencli.engine.factory import create_engine, default_engine
from qwencli.engine.loading import weights
from qwencli.errors import UnsupportedModeError
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.folder import read_config
from qwencli.models.quant_formats import packed_format
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import specs
from tests.checkpoints import VISION_FAMILIES, write_checkpoint
from tests.models.test_shape_reader import qwen2_5_vl

CPU = torch.device("cpu")
OVERRIDES = {"hidden_size": 128, "intermediate_size": 256}
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip
LABELS = {"nf4": "bnb-nf4", "nf4 nested": "bnb-nf4", "fp4": "bnb-fp4", "int8": "bnb-int8"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`quantized(family, name of SETTINGS)` -> folder, written by transformers."""
    import transformers

    from qwencli.engine.hf.load_model import FAMILIES

    def get(family: str, name: str) -> Path:
        folder = tmp_path_factory.mktemp("bnb") / "model"
        write_checkpoint(folder, family, overrides=OVERRIDES if family == "qwen3" else None)
        settings = {"bnb_4bit_compute_dtype": torch.float32, **SETTINGS[name]}
        model = getattr(transformers, FAMILIES[family].model_class).from_pretrained(
            folder,
            quantization_config=transformers.BitsAndBytesConfig(**settings),
            device_map="cpu",
            dtype=torch.float32,
        )
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)
        return folder

    return get


def plain_matrices(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """Every weight of the checkpoint as bitsandbytes dequantizes it."""
    import transformers
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    from qwencli.engine.hf.load_model import FAMILIES

    model = getattr(transformers, FAMILIES[family].model_class).from_pretrained(
        folder, device_map="cpu"
    )
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            found[name] = dequantize_4bit(module.weight.data, module.weight.quant_state)
        if kind == "Linear8bitLt":
            found[name] = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return found


@pytest.mark.filterwarnings("ignore")
# bitsandbytes' 4-bit CPU code takes no matrix as narrow as those of the small vision tower.
@pytest.mark.parametrize(
    ("family", "name"), [*(("qwen3", name) for name in SETTINGS), ("qwen2_5_vl", "int8")]
)
def test_matrices_are_those_that_bitsandbytes_reads(
    quantized: Callable[[str, str], Path], family: str, name: str
) -> None:
    folder = quantized(family, name)
    config = read_config(folder)
    loaded = weights.load(
        folder, read_shape(config), torch.float32, CPU, packed=packed_format(config)
    )
    if family == "qwen3":
        assert loaded.scheme == LABELS[name]
    theirs = plain_matrices(folder, family)
    text = "model." if family == "qwen3" else "model.language_model."
    for layer in range(2):
        for ours, parts in (
            ("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("o", ("self_attn.o_proj",)),
            ("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
            ("down", ("mlp.down_proj",)),
        ):
            wanted = torch.cat([theirs[f"{text}layers.{layer}.{part}"] for part in parts])
            key = f"text.{layer}.{ours}"
            matrix = loaded.matrices.get(key)
            got = loaded.tensors[key] if matrix is None else matrix.dequantize(torch.float32)
            assert torch.allclose(got, wanted.float(), rtol=1e-6, atol=1e-8), key
    if family in VISION_FAMILIES:
        wanted = theirs["model.visual.blocks.0.attn.proj"].float()
        assert torch.allclose(loaded.tensors["vision.0.proj"], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_the_native_engine_answers_as_transformers_does(
    quantized: Callable[[str, str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = quantized("qwen3", "nf4")
    request = GenerationRequest(
        (user_message("What is this?"),),
        SamplingOptions(do_sample=False, max_new_tokens=24),
    )
    # With the matrices dequantized: bitsandbytes' own CPU kernel rounds scales to bfloat16.
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    matrices = {f"{name}.weight": m for name, m in plain_matrices(folder, "qwen3").items()}
    rest = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not name.startswith(tuple(matrices))
    }
    save_file(rest | matrices, plain / "model.safetensors", {"format": "pt"})
    config = read_config(folder)
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")
    answers, planned = [], []
    for at, engine_name in ((folder, EngineName.NATIVE), (plain, EngineName.TRANSFORMERS)):
        spec = ModelSpec("tiny", ModelSource.LOCAL, path=at, hub_config=read_config(at))
        assert default_engine(EngineConfig(spec, device="cpu")) is EngineName.NATIVE
        with create_engine(EngineConfig(spec, engine=engine_name, device="cpu")) as engine:
            answers.append(engine.generate(request))
            planned.append(engine.memory_plan.get("weights"))
    assert [answer.effective.quantization for answer in answers] == ["bnb-nf4", "none"]
    assert answers[0].token_ids == answers[1].token_ids
    config = read_config(folder)
    loaded = weights.load(
        folder, read_shape(config), torch.float32, CPU, packed=packed_format(config)
    )
    held = sum(m.nbytes for m in loaded.matrices.values())
    held += sum(t.nbytes for t in loaded.tensors.values())
    assert planned[0] == pytest.approx(held, rel=0.01)
    spec = ModelSpec("tiny", ModelSource.LOCAL, path=folder, hub_config=config)
    again = EngineConfig(
        spec, engine=EngineName.NATIVE, device="cpu", quantization=Quantization.INT8
    )
    with pytest.raises(UnsupportedModeError, match="quantized already"):
        create_engine(again).load()


@pytest.mark.parametrize("nested", [False, True])
def test_blocks_across_rows_are_read(tmp_path: Path, nested: bool) -> None:
    """As in vision towers, whose rows no block of 64 divides."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import save_file

    config = qwen2_5_vl()
    config["vision_config"]["intermediate_size"] = 100
    shape = read_shape(config)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    prefix = {"text": "model.", "vision": "visual.", "root": ""}
    for spec in specs(shape):
        for part in spec.parts:
            tensors[prefix[part.section] + part.name] = torch.randn(part.shape, generator=generator)
    name = "visual.blocks.0.mlp.down_proj.weight"
    weight = tensors[name]
    assert weight.shape[1] % 64
    q, state = quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    tensors[name] = q
    save_file(tensors, tmp_path / "model.safetensors")
    packed = packed_format({"quantization_config": {"quant_method": "bitsandbytes"}})
    loaded = weights.load(tmp_path, shape, torch.float32, CPU, packed=packed)
    wanted = dequantize_4bit(q, state)
    assert torch.allclose(loaded.tensors["vision.0.mlp_out"], wanted, rtol=1e-6, atol=1e-8)
