"""Videos become the reference's sizes, patches and timestamps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwencli.engine.frontend.preprocess import preprocess, video_size
from qwencli.engine.frontend.processor_config import ImageProcessorConfig
from qwencli.errors import ModelFileError
from qwencli.messages import ImagePart, VideoPart
from tests.engine.frontend.reference_source import reference_function

THREE = "qwen3_vl.video_processing_qwen3_vl"
TWO = "qwen2_vl.video_processing_qwen2_vl"
SIDES = st.integers(1, 2500)


def film(count: int, width: int = 90, height: int = 70, seed: int = 0) -> VideoPart:
    noise = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    frames = tuple(Image.fromarray(shown) for shown in noise)
    return VideoPart(frames, tuple(0.5 * i for i in range(count)), 0.5 * count, "film.mp4")


class Size:
    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest_edge, self.longest_edge = shortest, longest


@given(st.integers(2, 100), SIDES, SIDES, st.sampled_from([(4096, 25165824), (131072, 786432)]))
def test_sizes_of_qwen3_vl_equal_the_references(
    frames: int, height: int, width: int, bounds: tuple[int, int]
) -> None:
    if max(height, width) > 150 * min(height, width):
        return  # the reference refuses from 200 on, which rounding may reach
    low, high = bounds
    # The cap as `resize` of the reference computes it, whose last step needs torchvision.
    share = max(min(768 * 32 * 32, high // frames), int(low * 1.05))
    theirs = reference_function(THREE, "smart_resize")(
        num_frames=frames, height=height, width=width, temporal_factor=2, factor=32,
        min_pixels=low, max_pixels=share * frames,
    )  # fmt: skip
    config = ImageProcessorConfig.for_family("qwen3_vl")
    config = replace(config, video=replace(config.video, min_pixels=low, max_pixels=high))
    assert video_size(frames, height, width, config) == theirs


@given(st.integers(2, 768), SIDES, SIDES)
def test_sizes_of_qwen2_vl_equal_the_references(frames: int, height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    low, high, total = 128 * 28 * 28, 768 * 28 * 28, int(128_000 * 28 * 28 * 0.9)
    most = max(min(high, total * 2 // frames), int(low * 1.05))
    theirs = reference_function(TWO, "smart_resize")(
        height, width, factor=28, min_pixels=low, max_pixels=most
    )
    for family in ("qwen2_vl", "qwen2_5_vl"):
        assert video_size(frames, height, width, ImageProcessorConfig.for_family(family)) == theirs


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_patches_equal_the_references(family: str, count: int) -> None:
    config = ImageProcessorConfig.for_family(family)
    part = film(count)
    ours = preprocess([part], config)
    height, width = video_size(max(count, 2), 70, 90, config)
    resized = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in part.frames]
    video = torch.from_numpy(np.stack([np.asarray(frame) for frame in resized])).double()
    mean, std = (torch.tensor(v).double() for v in (config.image_mean, config.image_std))
    video = ((video / 255 - mean) / std).permute(0, 3, 1, 2)[None]  # [1, F, C, H, W]
    theirs, *grid = reference_function(THREE, "patchify")(
        None, video, config.patch_size, config.merge_size, config.temporal_patch_size
    )
    assert ours.grid_thw == (tuple(grid),)
    assert ours.num_tokens == (grid[0] * grid[1] * grid[2] // 4,)
    np.testing.assert_allclose(ours.patches[0], theirs[0].numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_timestamps_equal_the_references(count: int) -> None:
    [visual] = preprocess([film(count)], ImageProcessorConfig.for_family("qwen3_vl")).visuals
    stamps = reference_function("qwen3_vl.processing_qwen3_vl", "_calculate_timestamps")
    assert list(visual.times_s) == pytest.approx(stamps(None, list(range(count)), 2.0))
    assert visual.video
    assert visual.seconds_per_grid == pytest.approx(1.0)


def test_pictures_and_videos_of_one_request_do_not_touch_each_other() -> None:
    config = ImageProcessorConfig.for_family("qwen2_vl")
    parts = [film(3), ImagePart(film(1).frames[0], "a.png"), film(2, 200, 40)]
    together = preprocess(parts, config)
    for index, part in enumerate(parts):
        alone = preprocess([part], config)
        assert alone.visuals == together.visuals[index : index + 1]
        np.testing.assert_array_equal(alone.patches[0], together.patches[index])


def test_the_users_bound_holds_for_each_frame() -> None:
    for family in ("qwen3_vl", "qwen2_5_vl"):
        config = ImageProcessorConfig.for_family(family).with_pixels(1024, 20_000)
        height, width = video_size(8, 1080, 1920, config)
        assert config.factor**2 <= height * width <= 20_000


def test_bounds_come_from_the_video_file(tmp_path: Path) -> None:
    def write(values: dict[str, Any]) -> None:
        path = tmp_path / "video_preprocessor_config.json"
        path.write_text(json.dumps(values), encoding="utf-8")

    write({"size": {"shortest_edge": 4096, "longest_edge": 25165824}})
    rules = ImageProcessorConfig.from_files(tmp_path, "qwen3_vl").video
    assert (rules.min_pixels, rules.max_pixels) == (4096, 25165824)
    write({"size": {"shortest_edge": 4096, "longest_edge": 0}})
    with pytest.raises(ModelFileError, match=r"video_preprocessor_config\.json: max_pixels is 0"):
        ImageProcessorConfig.from_files(tmp_path, "qwen3_vl")
