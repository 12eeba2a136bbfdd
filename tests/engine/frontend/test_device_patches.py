"""Patches made by torch equal Pillow's and numpy's bit by bit; here on the CPU, on a GPU in
tests/gpu/test_device_patches.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwencli.engine.frontend.device_patches import DevicePatches, bicubic_weights
from qwencli.engine.frontend.preprocess import patchify_on_host
from qwencli.engine.frontend.processor_config import ImageProcessorConfig
from qwencli.errors import OutOfMemoryError
from tests.checkpoints import engine_config, picture


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Random bytes, with areas of black and white whose edges make the filter overshoot."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2][pixels[: height // 2] < 128] = 0
    pixels[height // 2 :][pixels[height // 2 :] >= 128] = 255
    return Image.fromarray(pixels)


def assert_equal_to_host(
    device: str, family: str, source: tuple[int, int], blocks: tuple[int, int], frames: int
) -> None:
    config = ImageProcessorConfig.for_family(family)
    size = (blocks[0] * config.factor, blocks[1] * config.factor)
    shown = [noise(*source, seed) for seed in range(frames)]
    ours = DevicePatches(device)(shown, size, config)
    assert ours.device.type == device
    np.testing.assert_array_equal(ours.cpu().numpy(), patchify_on_host(shown, size, config))


SIDE = st.integers(1, 400)
BLOCKS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(st.sampled_from(["qwen3_vl", "qwen2_vl"]), SIDE, SIDE, BLOCKS, st.sampled_from([1, 2, 4]))
@settings(max_examples=60)
def test_equal_to_the_host(
    family: str, width: int, height: int, blocks: tuple[int, int], frames: int
) -> None:
    assert_equal_to_host("cpu", family, (width, height), blocks, frames)


def test_large_pictures_and_none_that_need_no_resizing() -> None:
    assert_equal_to_host("cpu", "qwen3_vl", (3000, 1999), (20, 30), 1)
    assert_equal_to_host("cpu", "qwen3_vl", (96, 64), (2, 3), 2)


@pytest.mark.parametrize(("length", "new_length"), [(7, 3), (3, 7), (1, 5), (1000, 32), (31, 32)])
def test_weights_of_each_pixel_sum_to_one(length: int, new_length: int) -> None:
    firsts, weights = bicubic_weights(length, new_length)
    assert np.abs(weights.sum(0) - 2**22).max() <= len(weights)
    assert firsts.min() >= 0
    assert firsts.max() < length


def test_preparing_pictures_without_memory_is_one_typed_error(checkpoint, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import torch

    from qwencli.engine.native.engine import NativeEngine
    from qwencli.messages import GenerationRequest, user_message

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    request = GenerationRequest((user_message("Describe", (picture(),)),))
    with NativeEngine(engine_config(checkpoint("qwen3_vl"))) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("qwencli.engine.frontend.prompt.preprocess", exhausted)
            with pytest.raises(OutOfMemoryError, match="while preparing the pictures"):
                engine.generate(request)
        assert engine.generate(request).num_new_tokens > 0
