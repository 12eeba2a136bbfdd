from __future__ import annotations

import pytest
import torch

from qwencli.engine.native.rope import Rope, axis_of_frequency, rotate
from qwencli.models.shapes import RopeShape

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
