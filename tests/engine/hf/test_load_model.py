"""Both engines read the same checkpoints and refuse the same: none with tensors left over, missing
or without their scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwencli.config import DType, EngineName, Quantization, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.errors import ModelFileError
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import VISION_FAMILIES, engine_config, picture

Tensors = dict[str, torch.Tensor]
ENGINES = [EngineName.NATIVE, EngineName.TRANSFORMERS]
GREEDY = SamplingOptions(do_sample=False, max_new_tokens=8)


@pytest.fixture
def changed(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> Callable[[str, Callable[[Tensors], Tensors]], Path]:
    """`changed(family, change)` -> a copy of the small model with other tensors."""

    def make(family: str, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
        folder = Path(shutil.copytree(checkpoint(family), tmp_path / "m"))
        tensors = change(load_file(folder / "model.safetensors"))
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(said | config)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return folder

    return make


def answer(folder: Path, engine: EngineName, family: str, **settings: Any) -> tuple[int, ...]:
    images = (picture(),) if family in VISION_FAMILIES else ()
    request = GenerationRequest((user_message("What is it?", images),), GREEDY, True)
    config = engine_config(folder, engine=engine, dtype=DType.FLOAT32, **settings)
    with create_engine(config) as loaded:
        return loaded.generate(request).token_ids


def refused(folder: Path, engine: EngineName, **settings: Any) -> ModelFileError:
    with (
        pytest.raises(ModelFileError) as caught,
        create_engine(engine_config(folder, engine=engine, **settings)) as loaded,
    ):
        loaded.load()
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


LAYOUTS: dict[str, Callable[[str], str]] = {
    "base": lambda name: name.removeprefix("model."),
    "wrapped": lambda name: name.replace("model.", "model.model.", 1),
    "language_model": lambda name: name.replace("model.language_model.", "language_model.model."),
    "older": lambda name: name.replace("model.language_model.", "model.").replace(
        "model.visual.", "visual."
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_answer(
    changed: Any, checkpoint: Callable[[str], Path], engine: EngineName, family: str, layout: str
) -> None:
    rename = LAYOUTS[layout]
    folder = changed(family, lambda tensors: {rename(name): t for name, t in tensors.items()})
    assert answer(folder, engine, family) == answer(checkpoint(family), engine, family)


def with_head(tensors: Tensors) -> Tensors:
    embedding = next(t for name, t in tensors.items() if name.endswith("embed_tokens.weight"))
    return tensors | {"lm_head.weight": embedding.flip(0)}


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_head_that_is_there_is_used_whatever_the_flags_say(
    changed: Any, checkpoint: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    untied = changed(family, with_head, tie_word_embeddings=False)
    wanted = answer(untied, EngineName.TRANSFORMERS, family)
    shutil.rmtree(untied)
    tied = changed(family, with_head, tie_word_embeddings=True)
    assert [answer(tied, engine, family) for engine in ENGINES] == [wanted, wanted]
    assert answer(checkpoint(family), EngineName.NATIVE, family) != wanted


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_text_section_ties_the_head_where_the_top_level_is_silent(
    changed: Any, checkpoint: Callable[[str], Path], engine: EngineName, family: str
) -> None:
    folder = changed(family, dict)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "text_config" not in said:
        keep = ("model_type", "vision_config", "image_token_id", "video_token_id")
        keep += ("vision_start_token_id", "vision_end_token_id")
        said = {k: v for k, v in said.items() if k in keep} | {
            "text_config": {k: v for k, v in said.items() if k not in keep}
        }
    tied = said.pop("tie_word_embeddings", True)
    said["text_config"]["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    assert answer(folder, engine, family) == answer(checkpoint(family), engine, family)
    said["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    assert "lm_head.weight" in refused(folder, engine).message


def scaled(tensors: Tensors) -> Tensors:
    """Projections as fp8 beside one scale each, as NVIDIA ModelOpt writes them."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if "_proj." in name and "visual" not in name:
            scale = tensor.float().abs().max() / 448
            found[name] = (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            found[name + "_scale"] = scale.clone()
            found[name.removesuffix("weight") + "input_scale"] = torch.tensor(1.0)
    return found


def unscaled(tensors: Tensors) -> Tensors:
    """What `scaled` stands for."""
    found = scaled(tensors)
    return {
        name: (found[name].float() * found[name + "_scale"] if name + "_scale" in found else tensor)
        for name, tensor in tensors.items()
    }


SAID: dict[str, dict[str, Any]] = {
    "modelopt": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    "no method": {"quantization_config": {"quant_algo": "FP8"}},
    "nothing": {},
}


@pytest.mark.parametrize("said", SAID)
def test_fp8_of_modelopt_is_read_with_its_scales_or_not_at_all(changed: Any, said: str) -> None:
    plain = changed("qwen3", unscaled)
    wanted = answer(plain, EngineName.NATIVE, "qwen3")
    shutil.rmtree(plain)
    folder = changed("qwen3", scaled, **SAID[said])
    assert answer(folder, EngineName.NATIVE, "qwen3") == wanted
    error = refused(folder, EngineName.TRANSFORMERS)
    assert "fp8" in error.message and "q_proj.weight" in error.message
    assert "--engine native" in error.hint


@pytest.mark.parametrize("engine", ENGINES)
def test_fp8_without_scales_is_refused(changed: Any, engine: EngineName) -> None:
    folder = changed(
        "qwen3", lambda tensors: {k: t for k, t in scaled(tensors).items() if "_scale" not in k}
    )
    assert "F8_E4M3 (without scales)" in refused(folder, engine).message


@pytest.mark.parametrize("engine", ENGINES)
def test_scales_of_plain_weights_are_refused(changed: Any, engine: EngineName) -> None:
    """The weights were cast from fp8, and nobody multiplied them."""
    folder = changed(
        "qwen3",
        lambda tensors: {
            k: t.bfloat16() if t.dtype == torch.float8_e4m3fn else t
            for k, t in scaled(tensors).items()
        },
    )
    error = refused(folder, engine)
    assert "that config.json does not describe (those of fp8 or int8 with scales)" in error.message


@pytest.mark.parametrize("change", ["missing", "left over", "reshaped"])
def test_pickled_weights_are_held_to_the_same(changed: Any, change: str) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        if change == "missing":
            return {name: t for name, t in tensors.items() if ".layers.1." not in name}
        if change == "left over":
            return tensors | {"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)}
        return tensors | {"model.norm.weight": torch.ones(63)}

    folder = changed("qwen3", spoil)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    error = refused(folder, EngineName.TRANSFORMERS, allow_pickle=True)
    named = {"missing": "layers.1.", "left over": "weight_scale", "reshaped": "norm.weight is [63]"}
    assert named[change] in error.message


@pytest.mark.parametrize(
    ("kept", "part"),
    [
        (b"no pickle", "it is damaged"),
        (b"", "it is damaged"),
        (b"PK\x03\x04 torn", "it is damaged"),
        ([1, 2], "it holds list"),
        (torch.ones(2), "it holds Tensor"),
        ({}, "it holds dict"),
        ({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, "state_dict, epoch are no tensors"),
        ({1: torch.ones(2)}, "1 are no tensors by name"),
        (Path("x"), "it holds more than tensors"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_no_checkpoint_is_named(
    changed: Any, kept: Any, part: str, zipped: bool
) -> None:
    folder = changed("qwen3", dict)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if isinstance(kept, bytes):
        path.write_bytes(kept)
    else:
        torch.save(kept, path, _use_new_zipfile_serialization=zipped)
    error = refused(folder, EngineName.TRANSFORMERS, allow_pickle=True)
    assert "pytorch_model.bin is not a checkpoint" in error.message
    assert part in error.message


def test_bitsandbytes_while_loading_loses_nothing(checkpoint: Callable[[str], Path]) -> None:
    pytest.importorskip("bitsandbytes")
    for mode in (Quantization.INT8, Quantization.INT4):
        config = engine_config(
            checkpoint("qwen3_vl"), engine=EngineName.TRANSFORMERS, quantization=mode
        )
        with create_engine(config) as loaded:
            loaded.load()


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_what_bitsandbytes_saved_is_whole_to_both_engines(
    checkpoint: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    source = checkpoint("qwen3")
    folder = Path(shutil.copytree(source, tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    quantization = transformers.BitsAndBytesConfig(**settings)
    transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    ).save_pretrained(folder)
    for engine in ENGINES:
        assert len(answer(folder, engine, "qwen3")) == 8
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({k: t for k, t in tensors.items() if k != gone}, folder / "model.safetensors")
    for engine in ENGINES:
        assert "layers.0.self_attn.q_proj" in refused(folder, engine).message
