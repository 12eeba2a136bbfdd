"""Patches made on the GPU equal the host's, and the engines use them there."""

from __future__ import annotations

import pytest

from qwencli.config import EngineName
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.device_patches import DevicePatches
from tests.checkpoints import engine_config
from tests.engine.frontend.test_device_patches import assert_equal_to_host


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl"])
@pytest.mark.parametrize("frames", [1, 2, 6])
@pytest.mark.parametrize(
    ("source", "blocks"),
    [((640, 480), (15, 20)), ((101, 333), (9, 3)), ((3000, 1999), (20, 30)), ((32, 32), (40, 40))],
)
def test_equal_to_the_host(family, frames, source, blocks):
    assert_equal_to_host("cuda", family, source, blocks, frames)


@pytest.mark.parametrize("engine", [EngineName.NATIVE, EngineName.TRANSFORMERS])
def test_engines_prepare_pictures_on_their_device(checkpoint, engine):
    config = engine_config(checkpoint("qwen3_vl"), engine=engine, device="cuda")
    with create_engine(config) as loaded:
        assert isinstance(loaded.files.prompts.patchify, DevicePatches)
