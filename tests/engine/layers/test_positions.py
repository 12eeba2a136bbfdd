from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.native.prompt_inputs import prompt_positions
from qwencli.errors import InputError
from qwencli.models.shape_reader import read_shape
from tests.models.test_shape_reader import TEXT, qwen2_5_vl, qwen3_vl

QWEN3 = read_shape(qwen3_vl())
QWEN25 = read_shape(qwen2_5_vl())
TEXT_ONLY = read_shape({"model_type": "qwen3", **TEXT})
IMAGE, VIDEO = 290, 291


@given(st.integers(1, 50))
def test_text_counts_up_on_all_axes(length: int) -> None:
    for shape in (QWEN3, TEXT_ONLY):
        laid = prompt_positions(shape, [1] * length, [])
        assert torch.equal(laid.positions, torch.arange(length).expand(3, -1))
        assert laid.delta == 0
        assert laid.visual_places.numel() == 0


def test_an_image_spans_its_larger_side() -> None:
    # Four by six patches are two by three tokens; text goes on after the larger side.
    laid = prompt_positions(QWEN3, [5, *[IMAGE] * 6, 6, 7], [Visual((1, 4, 6))])
    assert laid.positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]
    assert laid.delta == -3
    assert laid.visual_places.tolist() == [1, 2, 3, 4, 5, 6]


def test_frames_stand_apart_in_qwen3() -> None:
    ids = [5, *[VIDEO] * 2, 9, *[VIDEO] * 2]
    laid = prompt_positions(QWEN3, ids, [Visual((2, 2, 4), video=True)])
    assert laid.positions.tolist() == [[0, 1, 1, 3, 4, 4], [0, 1, 1, 3, 4, 4], [0, 1, 2, 3, 4, 5]]
    assert laid.delta == 0


@pytest.mark.parametrize(
    ("seconds", "times"), [(1.0, [0, 2, 4]), (0.5, [0, 1, 2]), (1.4, [0, 2, 5]), (0.3, [0, 0, 1])]
)
def test_frames_are_spaced_by_real_time_in_qwen2_5(seconds: float, times: list[int]) -> None:
    # Two positions a second, rounded down.
    laid = prompt_positions(QWEN25, [VIDEO] * 3 + [1], [Visual((3, 2, 2), True, seconds)])
    assert laid.positions[0].tolist() == [*times, 1]
    # The text goes on beside the frames, and what is generated goes on from the text.
    assert laid.positions[:, -1].tolist() == [1, 1, 1]
    assert laid.delta == 2 - 4


def test_neighbouring_images_are_told_apart_by_their_grids() -> None:
    laid = prompt_positions(QWEN3, [IMAGE] * 2, [Visual((1, 2, 2)), Visual((1, 2, 2))])
    assert laid.positions.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("ids", "visuals"),
    [
        ([1, IMAGE, 2], []),
        ([1, 2], [Visual((1, 2, 2))]),
        ([1, IMAGE, 2], [Visual((1, 2, 4))]),
        ([1, IMAGE, IMAGE, 2], [Visual((1, 2, 2))]),
        ([IMAGE, 1, IMAGE], [Visual((1, 2, 4))]),
        ([1, VIDEO, 2], [Visual((1, 2, 2))]),
        ([1, IMAGE, 2], [Visual((1, 2, 2), video=True)]),
        ([IMAGE, IMAGE, 1, IMAGE], [Visual((1, 2, 2)), Visual((1, 2, 4))]),
    ],
)
def test_image_tokens_must_match_the_images(ids: list[int], visuals: list[Visual]) -> None:
    for shape in (QWEN3, QWEN25):
        with pytest.raises(InputError, match=r"(image|video) tokens"):
            prompt_positions(shape, ids, visuals)


def test_a_text_model_takes_no_images() -> None:
    with pytest.raises(InputError, match="text model"):
        prompt_positions(TEXT_ONLY, [1], [Visual((1, 2, 2))])
