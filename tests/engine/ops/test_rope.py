from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwencli.config import SamplingOptions
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.hf.load_model import build_config
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.rope import Rope, axis_of_frequency, inverse_frequencies, rotate
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import RopeShape
from tests.checkpoints import engine_config, hub_config, picture, write_checkpoint

CPU = torch.device("cpu")


def test_interleaved_axes_alternate_until_their_share_is_used() -> None:
    axes = axis_of_frequency(RopeShape(1e4, (4, 2, 2), interleaved=True), 16)
    assert axes.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_sections_come_in_blocks() -> None:
    assert axis_of_frequency(RopeShape(1e4, (2, 3, 3)), 16).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert axis_of_frequency(RopeShape(1e4), 8).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dim", [8, 64])
def test_rotate_is_a_complex_rotation_of_the_halves(dim: int) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 4, dim), torch.randn(2, 3, 1, dim // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotate(x, cos, sin), expected)
    rotate(x, cos, sin, out=x)
    torch.testing.assert_close(x, expected)


def test_a_step_gathers_what_three_equal_axes_compute() -> None:
    rope = Rope(RopeShape(1e4, (12, 10, 10), interleaved=True), 64, 100, torch.float32, CPU)
    rope.reach(100)
    positions = torch.tensor([0, 7, 99])
    for mine, full in zip(
        rope.step(positions[:, None]), rope.at(positions.expand(3, 1, 3)), strict=True
    ):
        assert torch.equal(mine[:, 0], full[0])


# As the model pages of Qwen2.5, Qwen2.5-VL and Qwen3 give it, and with what else YaRN may be told.
YARNS: list[dict[str, Any]] = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 2.5, "original_max_position_embeddings": 128, "beta_fast": 16, "beta_slow": 2},
    {"factor": 4.0},
    {"factor": None, "original_max_position_embeddings": 1024},
    {"factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.25},
    {"factor": 8.0, "original_max_position_embeddings": 512, "mscale": 0.7, "mscale_all_dim": 1.5},
    {"factor": 8.0, "original_max_position_embeddings": 512, "mscale": 0.7},
    {"factor": 0.5, "original_max_position_embeddings": 512, "truncate": False},
    {"factor": 3.0, "original_max_position_embeddings": 512, "truncate": False},
]


@pytest.mark.parametrize("yarn", YARNS)
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_yarn_has_the_frequencies_of_the_reference(yarn: dict[str, Any], spelling: str) -> None:
    config = hub_config("qwen3", {"rope_scaling": {spelling: "yarn", **yarn}})
    shape = read_shape(config).text
    theirs = build_config(config)
    expected, attention = ROPE_INIT_FUNCTIONS["yarn"](theirs, CPU)
    assert torch.equal(inverse_frequencies(shape.rope, shape.head_dim), expected)
    assert shape.rope.yarn is not None
    assert shape.rope.yarn.attention_factor == pytest.approx(attention, rel=1e-12)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3"])
def test_a_model_with_yarn_answers_like_the_reference(family: str, tmp_path: Path) -> None:
    stated = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = hub_config(family)
    scaling = {**(config.get("text_config", config).get("rope_scaling") or {}), **stated}
    scaling.pop("type", None)
    folder = write_checkpoint(tmp_path / "model", family, overrides={"rope_scaling": scaling})
    visuals = () if family == "qwen3" else (picture(),)
    greedy = SamplingOptions(do_sample=False, max_new_tokens=24)
    request = GenerationRequest((user_message("Describe this image.", visuals),), greedy)
    answers = []
    for engine in (NativeEngine, TransformersEngine):
        with engine(engine_config(folder)) as loaded:
            answers.append(loaded.generate(request).token_ids)
    assert answers[0] == answers[1]
    plain = write_checkpoint(tmp_path / "plain", family)
    with NativeEngine(engine_config(plain)) as loaded:
        assert loaded.generate(request).token_ids != answers[0]
