"""Our pixels equal the reference processor's; what no model takes is refused before it loads."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwencli.engine.frontend.images import open_image
from qwencli.engine.frontend.preprocess import (
    VisualInputs,
    pixels_of,
    preprocess,
)
from qwencli.engine.frontend.processor_config import (
    VISION_FAMILIES,
    ImageProcessorConfig,
    check_visual,
    smart_resize,
)
from qwencli.errors import InputError, ModelFileError, UsageError
from qwencli.messages import ImagePart

QWEN3 = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN2 = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
FILES: dict[str, dict[str, Any]] = {
    "qwen3_5": QWEN3,
    "qwen3_5_moe": QWEN3,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen2_5_vl": QWEN2,
    "qwen2_vl": QWEN2,
}


def picture(width: int, height: int, seed: int = 0) -> ImagePart:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ImagePart(Image.fromarray(pixels), f"{width}x{height}.png")


def patches(inputs: VisualInputs) -> np.ndarray[Any, Any]:
    return np.concatenate(inputs.patches)


def folder_with(tmp_path: Path, values: object, name: str = "preprocessor_config.json") -> Path:
    (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


# --- against the reference --------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> Any:
    """The numpy and Pillow processor of transformers: it needs no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil


@given(
    family=st.sampled_from(["qwen3_vl", "qwen2_5_vl"]),
    sizes=st.lists(
        st.tuples(st.integers(1, 420), st.integers(1, 420)).filter(
            lambda s: max(s) <= 200 * min(s)
        ),
        min_size=1,
        max_size=3,
    ),
    bounds=st.sampled_from([(None, None), (4096, 20_000), (40_000, 90_000)]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pixels_equal_the_references(
    reference: Any, family: str, sizes: list[tuple[int, int]], bounds: tuple[int | None, int | None]
) -> None:
    config = ImageProcessorConfig.for_family(family).with_pixels(*bounds)
    parts = [picture(*size, seed) for seed, size in enumerate(sizes)]
    ours = preprocess(parts, config)
    # A copy, because the reference writes the bounds into the object it is given.
    values = copy.deepcopy(FILES[family])
    values |= {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    theirs = reference(**values)([part.image for part in parts], return_tensors="np")
    assert patches(ours).dtype == np.float32
    assert patches(ours).flags.c_contiguous
    np.testing.assert_array_equal(np.array(ours.grid_thw), theirs["image_grid_thw"])
    # Both resize with Pillow on bytes: what is left is rounding of the float arithmetic.
    np.testing.assert_allclose(patches(ours), theirs["pixel_values"], rtol=0, atol=2e-6)


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([28, 32]),
    bounds=st.sampled_from([(3136, 12845056), (65536, 16777216), (1024, 1024), (200704, 1003520)]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sizes_equal_the_references(
    reference: Any, height: int, width: int, factor: int, bounds: tuple[int, int]
) -> None:
    theirs = sys.modules[reference.__module__].smart_resize
    if max(height, width) > 200 * min(height, width):
        return
    args = {"factor": factor, "min_pixels": bounds[0], "max_pixels": bounds[1]}
    assert smart_resize(height, width, **args) == theirs(height, width, **args)


def test_a_transparent_picture_equals_the_references(reference: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    clear = Image.fromarray(pixels)
    file = io.BytesIO()
    clear.save(file, "PNG")
    config = ImageProcessorConfig.for_family("qwen3_vl").with_pixels(1024, None)
    ours = preprocess([open_image(file.getvalue())], config)
    processor = reference(**copy.deepcopy(FILES["qwen3_vl"]) | {"min_pixels": 1024})
    flat = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    theirs = processor([flat], return_tensors="np")
    np.testing.assert_allclose(patches(ours), theirs["pixel_values"], rtol=0, atol=2e-6)


# --- without the reference --------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([28, 32]))
def test_resized_sizes_keep_the_rules(height: int, width: int, factor: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    low, high = 65536, 1_000_000
    rows, columns = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
    assert rows % factor == columns % factor == 0
    assert low <= rows * columns
    # A side never goes under one block, so only very long pictures may exceed the bound.
    assert rows * columns <= high or min(rows, columns) == factor


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((48, 80), (64, 64)),  # 1.5 and 2.5 blocks: a half rounds to even, up and down
        ((16, 336), (32, 160)),  # 0.5 blocks rounds to 0, and the lower bound lifts it
    ],
)
def test_halves_round_to_even(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, factor=32, min_pixels=1024, max_pixels=10**6) == expected


def test_patches_are_in_block_order_with_the_channel_outside() -> None:
    """Each value spells its place, so that a swapped axis cannot pass."""
    config = ImageProcessorConfig(
        patch_size=2,
        min_pixels=16,
        max_pixels=10**6,
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
        video=ImageProcessorConfig.for_family("qwen2_vl").video,
        rescale_factor=1.0,
    )
    height, width = 8, 12
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([y * width + x, np.full_like(y, 101), np.full_like(y, 202)], axis=-1)
    part = ImagePart(Image.fromarray(pixels.astype(np.uint8)), "places")
    inputs = preprocess([part], config)
    assert inputs.grid_thw == ((1, 4, 6),)
    assert inputs.num_tokens == (6,)
    expected = []
    for block_y in range(2):
        for block_x in range(3):
            for in_y in range(2):
                for in_x in range(2):
                    top, left = (block_y * 2 + in_y) * 2, (block_x * 2 + in_x) * 2
                    patch = pixels[top : top + 2, left : left + 2]
                    frames = [patch[..., c].reshape(-1) for c in range(3) for _ in range(2)]
                    expected.append(np.concatenate(frames))
    np.testing.assert_array_equal(patches(inputs), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("size", [(1, 1), (37, 23), (3000, 1500)])
def test_pixels_are_read_where_pillow_holds_them(size: tuple[int, int]) -> None:
    picture = Image.effect_noise(size, 90).convert("RGB")
    picture.putpixel((0, 0), (1, 2, 3))
    pixels, expected = pixels_of(picture), np.asarray(picture)
    del picture  # which they keep alive
    assert np.array_equal(pixels[..., :3], expected)


def test_one_pixel_is_fine() -> None:
    inputs = preprocess([picture(1, 1)], ImageProcessorConfig.for_family("qwen3_vl"))
    assert inputs.grid_thw == ((1, 16, 16),)
    assert inputs.num_tokens == (64,)
    assert len(np.unique(patches(inputs)[:, :256])) == 1


def test_several_pictures_do_not_touch_each_other() -> None:
    config = ImageProcessorConfig.for_family("qwen2_vl")
    parts = [picture(70, 90), picture(200, 40), picture(56, 56)]
    together = preprocess(parts, config)
    alone = [preprocess([part], config) for part in parts]
    np.testing.assert_array_equal(
        patches(together),
        np.concatenate([patches(one) for one in alone]),
    )
    assert together.grid_thw == tuple(one.grid_thw[0] for one in alone)
    assert together.num_tokens == tuple(one.num_tokens[0] for one in alone)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (10, 2001)])
def test_very_long_pictures_are_refused(size: tuple[int, int]) -> None:
    part = ImagePart(Image.new("RGB", size), "strip.png")
    with pytest.raises(InputError, match=rf"strip\.png is {size[0]}x{size[1]}.*200 times"):
        check_visual(part)
    with pytest.raises(InputError):
        preprocess([part], ImageProcessorConfig.for_family("qwen3_vl"))


def test_the_longest_allowed_picture_passes() -> None:
    part = ImagePart(Image.new("RGB", (2000, 10)), "strip.png")
    check_visual(part)
    inputs = preprocess([part], ImageProcessorConfig.for_family("qwen3_vl"))
    assert inputs.grid_thw[0][1] >= 2


# --- configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(VISION_FAMILIES))
def test_family_defaults_are_the_published_values(family: str, tmp_path: Path) -> None:
    from_file = ImageProcessorConfig.from_files(folder_with(tmp_path, FILES[family]), family)
    assert from_file == ImageProcessorConfig.for_family(family)


def test_both_ways_to_state_the_bounds(tmp_path: Path) -> None:
    edges = {"size": {"shortest_edge": 5000, "longest_edge": 90_000}}
    pixels = {"min_pixels": 5000, "max_pixels": 90_000}
    for values in (edges, pixels, {"size": pixels}, {"size": {"shortest_edge": 1}} | pixels):
        config = ImageProcessorConfig.from_files(folder_with(tmp_path, values), "qwen3_vl")
        assert (config.min_pixels, config.max_pixels) == (5000, 90_000)


def test_processor_config_is_read_where_it_is_the_only_file(tmp_path: Path) -> None:
    folder_with(tmp_path, {"image_processor": {"patch_size": 12}}, "processor_config.json")
    assert ImageProcessorConfig.from_files(tmp_path, "qwen3_vl").patch_size == 12
    folder_with(tmp_path, {"patch_size": 10})
    assert ImageProcessorConfig.from_files(tmp_path, "qwen3_vl").patch_size == 10


def test_without_a_file_the_family_decides(tmp_path: Path) -> None:
    config = ImageProcessorConfig.from_files(tmp_path, "qwen2_5_vl")
    assert config == ImageProcessorConfig.for_family("qwen2_5_vl")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": "14"}, "patch_size"),
        ({"merge_size": True}, "merge_size"),
        ({"size": 448}, "size"),
        ({"size": {"shortest_edge": 2 * 10**8, "longest_edge": 2 * 10**8}}, "min_pixels"),
        ({"size": {"shortest_edge": -1}}, "min_pixels"),
        ({"min_pixels": 10_000, "max_pixels": 5000}, "min_pixels"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": "grey"}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"rescale_factor": math.nan}, "rescale_factor"),
        ({"resample": 0}, "resample"),
        ({"do_normalize": False}, "do_normalize"),
        ([1, 2], "not a JSON object"),
    ],
)
def test_a_value_that_cannot_be_names_file_and_key(
    values: object, named: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError) as caught:
        ImageProcessorConfig.from_files(folder_with(tmp_path, values), "qwen3_vl")
    assert named in caught.value.message
    assert "preprocessor_config.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["{", "\udcff", "[" * 100_000])
def test_a_file_that_is_not_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ModelFileError, match="is not JSON"):
        ImageProcessorConfig.from_files(tmp_path, "qwen3_vl")


def test_user_bounds_override() -> None:
    config = ImageProcessorConfig.for_family("qwen3_vl")
    assert config.with_pixels(None, None) == config
    assert config.with_pixels(None, 100_000).max_pixels == 100_000
    assert config.with_pixels(1024, 1024).min_pixels == 1024
    inputs = preprocess([picture(500, 300)], config.with_pixels(1024, 1024))
    assert inputs.num_tokens == (1,)


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        ((90_000, 70_000), "--min-pixels 90000 is more than --max-pixels 70000"),
        ((None, 2048), r"--min-pixels 65536 \(the model's own\) is more than --max-pixels 2048"),
        ((1023, None), "--min-pixels 1023 is out of range"),
        ((None, 0), "--max-pixels 0 is out of range"),
        ((10**12, 10**13), "--min-pixels 1000000000000 is out of range"),
    ],
)
def test_user_bounds_that_cannot_be(bounds: tuple[int | None, int | None], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        ImageProcessorConfig.for_family("qwen3_vl").with_pixels(*bounds)
