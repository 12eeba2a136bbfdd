"""Where patches lie: rotary coordinates, attention segments, windows, resampled positions.

All of it follows from the grids alone, on the host, before any block runs; so no block has to ask
the device for a length. Patches come in merge order: the patches of one merged token in a row,
tokens row by row, frame by frame, image by image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from qwencli.models.shapes import VisionShape

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class EqualSegments:
    """`count` attention segments of `length` patches each, one after the other."""

    count: int
    length: int


@dataclass(frozen=True)
class VisionLayout:
    """The order patches are processed in, and who attends to whom.

    Args:
        coordinates: int64 [N, 2], row and column of each patch, in processing order.
        frames: segments of full attention. windows: segments of window attention.
        order: int64 [N / merge area], the merged token at each place of the processing order;
            None = unchanged.
        taps: int64 [N, 4] rows of the learned position grid that mix into each patch, with
            `tap_weights` float32 [N, 4]; None where positions are rotary only.
    """

    coordinates: torch.Tensor
    frames: tuple[EqualSegments, ...]
    windows: tuple[EqualSegments, ...]
    order: torch.Tensor | None
    taps: torch.Tensor | None
    tap_weights: torch.Tensor | None


def layout(shape: VisionShape, grids: Sequence[Grid]) -> VisionLayout:
    """Lay out the patches of images and videos, given as patches (time, rows, columns)."""
    coordinates = torch.cat([_coordinates(shape, grid) for grid in grids])
    frames = group_segments(h * w for t, h, w in grids for _ in range(t))
    taps = tap_weights = None
    if shape.position_side is not None:
        mixed = [_taps(shape, grid, shape.position_side) for grid in grids]
        taps = torch.cat([tap for tap, _ in mixed])
        tap_weights = torch.cat([weight for _, weight in mixed])
    if shape.window_patches is None:
        return VisionLayout(coordinates, frames, (), None, taps, tap_weights)
    order, lengths = _windows(shape, grids, shape.window_patches // shape.merge_size)
    coordinates = coordinates.view(-1, shape.merge_area, 2)[order].flatten(0, 1)
    return VisionLayout(coordinates, frames, group_segments(lengths), order, taps, tap_weights)


def group_segments(lengths: Iterable[int]) -> tuple[EqualSegments, ...]:
    """Join neighbours of equal length, which can be attended to as one batch."""
    return tuple(EqualSegments(len(list(group)), length) for length, group in groupby(lengths))


def join_segments(pieces: Iterable[Sequence[EqualSegments]]) -> tuple[EqualSegments, ...]:
    """Segments of several pictures side by side."""
    found: list[EqualSegments] = []
    for group in (group for piece in pieces for group in piece):
        if found and found[-1].length == group.length:
            found[-1] = EqualSegments(found[-1].count + group.count, group.length)
        else:
            found.append(group)
    return tuple(found)


def _coordinates(shape: VisionShape, grid: Grid) -> torch.Tensor:
    """Row and column [t * h * w, 2] of each patch, in merge order."""
    t, h, w = grid
    merge = shape.merge_size
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    blocks = (h // merge, merge, w // merge, merge)
    frame = torch.stack(
        [axis.reshape(blocks).transpose(1, 2).flatten() for axis in (rows, columns)], dim=-1
    )
    return frame.repeat(t, 1)


def _windows(
    shape: VisionShape, grids: Sequence[Grid], side: int
) -> tuple[torch.Tensor, list[int]]:
    """Order of merged tokens, window by window, and the patches of each window.

    Attention inside a window does not depend on where the window stands, so the windows of a
    frame are sorted by size: cut ones at the right and lower edge then form few groups, and frames
    stay in one piece for the blocks that attend to all of a frame.
    """
    order: list[torch.Tensor] = []
    lengths: list[int] = []
    first = 0
    for t, h, w in grids:
        h, w = h // shape.merge_size, w // shape.merge_size
        tokens = torch.arange(h * w).view(h, w)
        windows = [
            tokens[top : top + side, left : left + side].flatten()
            for top in range(0, h, side)
            for left in range(0, w, side)
        ]
        windows.sort(key=len, reverse=True)
        frame = torch.cat(windows)
        for _ in range(t):
            order.append(frame + first)
            lengths.extend(len(window) * shape.merge_area for window in windows)
            first += h * w
    return torch.cat(order), lengths


def _taps(shape: VisionShape, grid: Grid, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear resampling of the side x side position grid to h x w, corners on corners."""
    _, h, w = grid
    coordinates = _coordinates(shape, grid)
    (row, row_weight), (column, column_weight) = (
        _axis_taps(coordinates[:, axis], size, side) for axis, size in enumerate((h, w))
    )
    taps = (row[:, :, None] * side + column[:, None, :]).flatten(1)
    return taps, (row_weight[:, :, None] * column_weight[:, None, :]).flatten(1)


def _axis_taps(index: torch.Tensor, size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The neighbours [N, 2] of each index stretched from `size` to `side`, and their weights."""
    at = index.float() * (side - 1) / max(size - 1, 1)
    low = at.floor()
    taps = torch.stack((low, low + 1), dim=-1).long().clamp(max=side - 1)
    share = at - low
    return taps, torch.stack((1 - share, share), dim=-1)
