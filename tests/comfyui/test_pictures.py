from __future__ import annotations

import io
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwencli.comfyui.pictures import Batch, video_part
from qwencli.engine.frontend.images import open_image
from qwencli.errors import InputError


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 4]), st.booleans())
def test_a_picture_is_what_its_file_would_be(seed: int, channels: int, half: bool) -> None:
    levels = np.random.default_rng(seed).integers(0, 256, (2, 5, 7, channels), np.uint8)
    tensor = torch.from_numpy(levels.astype(np.float32) / 255.0)
    if half:
        tensor = tensor.to(torch.float16)  # holds 256 levels exactly enough
    batch = Batch(tensor, "images")
    for index in range(2):
        file = io.BytesIO()
        Image.fromarray(levels[index].squeeze(-1) if channels == 1 else levels[index]).save(
            file, "PNG"
        )
        assert batch.image(index).tobytes() == open_image(file.getvalue()).image.tobytes()
        assert batch.part(index).name == f"picture {index + 1} of images"
    if channels == 3:
        back = batch.pictures_like([batch.image(0), batch.image(1)])
        assert torch.equal((back * 255).round().to(torch.uint8), torch.from_numpy(levels))


@settings(max_examples=50)
@given(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_number_is_a_pixel_or_an_error(value: float, dtype: torch.dtype) -> None:
    tensor = torch.full((1, 2, 2, 3), 0.5, dtype=dtype)
    tensor[0, 0, 0, 0] = value
    try:
        batch = Batch(tensor, "images")
    except InputError as error:
        assert "NaN or infinity" in error.message
        assert not torch.isfinite(tensor).all() or abs(value) > 1e37
        return
    level = batch.image(0).getpixel((0, 0))[0]  # type: ignore[index]
    # To the nearest, computed in float32.
    assert abs(level - min(max(float(tensor[0, 0, 0, 0]), 0.0), 1.0) * 255) <= 0.5 + 1e-4


def test_a_picture_without_a_batch_is_one_of_one() -> None:
    batch = Batch(torch.zeros(4, 6, 3), "image_1")
    assert (len(batch), batch.size, batch.name_of(0)) == (1, (6, 4), "image_1")


@pytest.mark.parametrize("other", [None, "x", 3, {"samples": 1}, torch.zeros(1, 0, 4, 3)])
def test_what_is_no_picture_is_said(other: Any) -> None:
    with pytest.raises(InputError, match="images"):
        Batch(other, "images")


@pytest.mark.parametrize(
    "other", [torch.zeros(1, 4, 4, 3, dtype=torch.uint8), np.zeros((1, 4, 4, 3), np.float32)]
)
def test_only_tensors_of_floats_are_pictures(other: Any) -> None:
    """Bytes from 0 to 255 would be all white."""
    with pytest.raises(InputError, match=r"^images holds .*(uint8|float32)"):
        Batch(other, "images")


def test_masks_are_inside_of_boxes() -> None:
    masks = Batch(torch.zeros(2, 4, 6, 3), "images").masks_like([[[1, 0, 3, 2], [2, 1, 4, 3]], []])
    assert masks.shape == (2, 4, 6) and masks[0].sum() == 7 and masks[1].sum() == 0


class FromComponents:
    """A video that ComfyUI holds as frames."""

    def __init__(self, images: torch.Tensor, rate: Fraction) -> None:
        self.components = SimpleNamespace(images=images, frame_rate=rate)

    def get_components(self) -> Any:
        return self.components

    def get_duration(self) -> float:
        return float(len(self.components.images) / self.components.frame_rate)


class FromFile(FromComponents):
    """A video file, of which a part may be meant."""

    def __init__(self, data: io.BytesIO, images: torch.Tensor, rate: Fraction) -> None:
        super().__init__(images, rate)
        self.data = data

    def get_stream_source(self) -> Any:
        return self.data

    def get_dimensions(self) -> tuple[int, int]:
        height, width = self.components.images.shape[1:3]
        return width, height

    def get_components(self) -> Any:
        self.asked = True
        return super().get_components()


def test_a_video_of_frames() -> None:
    frames = torch.linspace(0, 1, 20)[:, None, None, None].expand(20, 8, 8, 3)
    part = video_part(FromComponents(frames, Fraction(10)), 3)
    assert part.times_s == (0.0, 1.0, 1.9) and part.duration_s == 2.0
    levels = [frame.getpixel((0, 0))[0] for frame in part.frames]  # type: ignore[index]
    assert levels == [0, 134, 255]


def test_a_video_file_is_decoded_by_us_unless_a_part_of_it_is_meant() -> None:
    av = pytest.importorskip("av")
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for number in range(20):
            picture = np.full((64, 64, 3), number * 12, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    whole = FromFile(data, torch.zeros(20, 64, 64, 3), Fraction(10))
    part = video_part(whole, 4)
    assert len(part.frames) == 4 and part.frames[0].size == (64, 64)
    assert not hasattr(whole, "asked") and abs(part.duration_s - 2.0) < 0.2
    cut = FromFile(data, torch.zeros(5, 64, 64, 3), Fraction(10))
    assert video_part(cut, 4).duration_s == 0.5 and cut.asked
    cropped = FromFile(data, torch.zeros(20, 64, 32, 3), Fraction(10))
    assert video_part(cropped, 4).frames[0].size == (32, 64) and cropped.asked


class Broken:
    """A video whose frames cannot be had."""

    def get_components(self) -> Any:
        raise ValueError("No video stream found\nin 'x'")


@pytest.mark.parametrize(
    ("video", "line"),
    [
        (3, "^video is no video"),
        (torch.zeros(1, 8, 8, 3), "^video is no video"),
        (Broken(), "^video cannot be decoded: No video stream found in 'x'"),
        (FromComponents(torch.zeros(2, 8, 8, 3), Fraction(0)), "^video has 0.0 frames a second"),
        (FromComponents(torch.zeros(0, 8, 8, 3), Fraction(9)), "^video is empty"),
    ],
)
def test_what_is_no_video_is_said(video: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        video_part(video, None)
