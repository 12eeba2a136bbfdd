from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwencli.engine.layers.vision_layout import EqualSegments, group_segments, layout
from qwencli.models.shape_reader import read_shape
from tests.models.test_shape_reader import qwen2_5_vl, qwen3_vl

QWEN3 = read_shape(qwen3_vl()).vision
QWEN25 = read_shape(qwen2_5_vl()).vision
SIDE = st.integers(1, 12).map(lambda n: n * 2)
GRIDS = st.lists(st.tuples(st.integers(1, 2), SIDE, SIDE), min_size=1, max_size=3)


def test_equal_neighbours_are_one_run() -> None:
    assert group_segments([4, 4, 6, 4]) == (
        EqualSegments(2, 4),
        EqualSegments(1, 6),
        EqualSegments(1, 4),
    )


def test_coordinates_come_in_merge_order() -> None:
    assert QWEN3 is not None
    found = layout(QWEN3, [(1, 2, 4)])
    assert found.coordinates.tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
    ]  # fmt: skip
    assert found.frames == (EqualSegments(1, 8),)
    assert found.order is None


@given(GRIDS)
def test_positions_resample_like_interpolate(grids: list[tuple[int, int, int]]) -> None:
    assert QWEN3 is not None
    assert QWEN3.position_side is not None
    side = QWEN3.position_side
    table = torch.randn(side * side, 3)
    found = layout(QWEN3, grids)
    assert found.taps is not None
    assert found.tap_weights is not None
    mine = (table[found.taps] * found.tap_weights[..., None]).sum(1)
    start = 0
    for t, h, w in grids:
        image = table.view(side, side, 3).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(
            image, (h, w), mode="bilinear", align_corners=True
        )
        for _ in range(t):
            rows, columns = found.coordinates[start : start + h * w].unbind(-1)
            expected = resized[0][:, rows, columns].t()
            torch.testing.assert_close(mine[start : start + h * w], expected, atol=1e-5, rtol=1e-5)
            start += h * w


@given(GRIDS)
def test_windows_partition_every_frame(grids: list[tuple[int, int, int]]) -> None:
    assert QWEN25 is not None
    found = layout(QWEN25, grids)
    assert found.order is not None
    assert sorted(found.order.tolist()) == list(range(len(found.order)))
    lengths = [run.length for run in found.windows for _ in range(run.count)]
    assert (
        sum(lengths)
        == sum(run.count * run.length for run in found.frames)
        == len(found.coordinates)
    )
    window = 0
    start = 0
    for t, h, w in grids:
        for _ in range(t):
            stop = start + h * w
            seen = set()
            while start < stop:
                inside = found.coordinates[start : start + lengths[window]] // 8
                cell = {tuple(place) for place in inside.tolist()}
                assert len(cell) == 1, "a window holds the patches of one 8 x 8 square"
                assert not cell & seen
                seen |= cell
                start += lengths[window]
                window += 1
            assert start == stop, "no window crosses a frame"
            assert len(seen) == -(-h // 8) * -(-w // 8)
