"""Draws batches of scenes from signed distances in torch: no PIL, no fonts, any device.

All scenes of a batch share one canvas. A distance field is evaluated only in a window around each
object; coverage is a ramp over `softness` pixels (0 hard edges, 1 antialiased, 2 soft).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tools.scenes.digits import DIGIT_WIDTH, MAX_SEGMENTS, STROKES
from tools.scenes.geometry import MIN_STROKE, SQUARE_EDGE, STAR_RADIUS
from tools.scenes.words import SHAPES

# Columns of an object row: shape index (-1 none), x, y, diameter, rotation_deg, r, g, b, detail.
OBJECT_COLUMNS = 9
# Columns of a number row: value (-1 none), x, y, height, r, g, b.
NUMBER_COLUMNS = 7


def draw_batch(
    size: tuple[int, int],
    background: Tensor,
    objects: Tensor,
    numbers: Tensor,
    softness: Tensor,
    digit_style: Tensor,
    digit_weight: Tensor,
    device: torch.device,
) -> Tensor:
    """Float pictures [B, 3, H, W] with whole values 0..255, on `device`.

    Args (tensors on the CPU, so that choosing rows never waits for the device):
        size: (width, height) in pixels.
        background: [B, 3]; objects: [B, 4, 9]; numbers: [B, 7]; softness: [B];
        digit_style: [B] 0 or 1; digit_weight: [B] stroke width as a share of the digit's height.
    """
    width, height = size
    canvas = background.to(device)[:, :, None].repeat(1, 1, width * height)
    ink = background.to(device)
    softness_there = softness.to(device)
    for shape, rows in _groups(objects, min(size)):
        picked = objects.flatten(0, 1)[rows].to(device)
        owner = (rows // objects.shape[1]).to(device)
        window = _window(*[float(objects.flatten(0, 1)[rows, 3].max()) * 1.4] * 2, size)
        px, py, index = _pixels(picked[:, 1], picked[:, 2], window, size)
        inside = _coverage(_object_distance(shape, picked, px, py), softness_there[owner])
        _add(canvas, owner, index, inside, picked[:, 5:8] - ink[owner])
    rows = (numbers[:, 0] >= 0).nonzero().squeeze(1)
    if len(rows):
        extent = float(numbers[rows, 3].max()) * 1.2
        picked, owner = numbers[rows].to(device), rows.to(device)
        window = _window(3 * 0.75 * extent, extent, size)
        px, py, index = _pixels(picked[:, 1], picked[:, 2], window, size)
        style, weight = digit_style[rows].to(device), digit_weight[rows].to(device)
        distance = _number_distance(picked, px, py, style, weight)
        inside = _coverage(distance, softness_there[owner])
        _add(canvas, owner, index, inside, picked[:, 4:7] - ink[owner])
    return canvas.view(-1, 3, height, width).round_().clamp_(0, 255)


def _groups(objects: Tensor, short: int) -> list[tuple[str, Tensor]]:
    """Flat rows by shape and size class: each group shares one field and one window size."""
    kinds, large = objects[..., 0].flatten(), objects[..., 3].flatten() > 0.22 * short
    masks = [(s, (kinds == i) & (large == big)) for i, s in enumerate(SHAPES) for big in (0, 1)]
    return [(s, m.nonzero().squeeze(1)) for s, m in masks if bool(m.any())]


def _window(width: float, height: float, size: tuple[int, int]) -> tuple[int, int]:
    return min(size[0], math.ceil(width) + 4), min(size[1], math.ceil(height) + 4)


def _pixels(
    x: Tensor, y: Tensor, window: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets from the centre of each pixel's middle, [B, P] twice, and flat indices [B, P]."""
    columns, rows = window
    left = (x - columns / 2).round().clamp(0, size[0] - columns).long()
    top = (y - rows / 2).round().clamp(0, size[1] - rows).long()
    xs = left[:, None] + torch.arange(columns, device=x.device)  # [B, columns]
    ys = top[:, None] + torch.arange(rows, device=x.device)
    index = (ys[:, :, None] * size[0] + xs[:, None, :]).flatten(1)
    shape = (-1, rows, columns)
    px = (xs + 0.5 - x[:, None])[:, None, :].expand(shape).flatten(1)
    py = (ys + 0.5 - y[:, None])[:, :, None].expand(shape).flatten(1)
    return px, py, index


def _coverage(distance: Tensor, softness: Tensor) -> Tensor:
    return (0.5 - distance / softness.clamp(min=1e-3)[:, None]).clamp(0, 1)


def _add(canvas: Tensor, owner: Tensor, index: Tensor, inside: Tensor, change: Tensor) -> None:
    """canvas [B, 3, H*W] += inside * change. Things never overlap, so sums are blends."""
    planes = (owner[:, None] * 3 + torch.arange(3, device=owner.device))[:, :, None]
    where = planes * canvas.shape[2] + index[:, None]
    canvas.view(-1).scatter_add_(
        0, where.flatten(), (inside[:, None] * change[..., None]).flatten()
    )


def _object_distance(shape: str, rows: Tensor, px: Tensor, py: Tensor) -> Tensor:
    """Signed distance in pixels [N, P] of objects of one shape."""
    angle = -rows[:, 4] * (math.pi / 180)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    scale = rows[:, 3][:, None]
    ux, uy = (px * cos - py * sin) / scale, (px * sin + py * cos) / scale
    return _FIELDS[shape](ux, uy, rows[:, 8][:, None], scale) * scale


def _circle(x: Tensor, y: Tensor, detail: Tensor, scale: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.5


def _ring(x: Tensor, y: Tensor, detail: Tensor, scale: Tensor) -> Tensor:
    hole = (1 - torch.maximum(0.12 + 0.38 * detail, 2 * MIN_STROKE / scale)).clamp(min=0.45)
    middle, half = (1 + hole) / 4, (1 - hole) / 4
    return (torch.hypot(x, y) - middle).abs() - half


def _box(x: Tensor, y: Tensor, half_x: Tensor | float, half_y: Tensor | float) -> Tensor:
    return torch.maximum(x.abs() - half_x, y.abs() - half_y)


def _square(x: Tensor, y: Tensor, detail: Tensor, scale: Tensor) -> Tensor:
    return _box(x, y, SQUARE_EDGE / 2, SQUARE_EDGE / 2)


def _cross(x: Tensor, y: Tensor, detail: Tensor, scale: Tensor) -> Tensor:
    arm = (0.24 + 0.16 * detail) / 2
    return torch.minimum(_box(x, y, 0.5, arm), _box(x, y, arm, 0.5))


def _triangle(x: Tensor, y: Tensor, detail: Tensor, scale: Tensor) -> Tensor:
    height = 0.80 + 0.16 * detail
    # The two slanted edges run from (0, -height/2) to (+-0.5, height/2).
    length = torch.sqrt(0.25 + height**2)
    slanted = (x.abs() * height - (y + height / 2) * 0.5) / length
    return torch.maximum(slanted, y - height / 2)


def _star(x: Tensor, y: Tensor, detail: Tensor, scale: Tensor) -> Tensor:
    """Folds the plane into one tenth: a tip at angle 0, a notch at 36 degrees, one edge between."""
    inner = STAR_RADIUS * (0.38 + 0.12 * detail)
    sector = 2 * math.pi / 5
    angle = torch.atan2(y, x) + math.pi / 2
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(x, y)
    fx, fy = radius * angle.cos(), radius * angle.sin()
    notch_x, notch_y = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    edge_x, edge_y = notch_x - STAR_RADIUS, notch_y
    length = torch.hypot(edge_x, edge_y)
    return ((fx - STAR_RADIUS) * edge_y - fy * edge_x) / length


_FIELDS = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "cross": _cross,
    "triangle": _triangle,
    "star": _star,
}


@lru_cache(maxsize=4)
def _stroke_table(device: torch.device) -> Tensor:
    """[style, digit, segment, 4]; unused rows repeat the first segment."""
    rows = [
        [digit + [digit[0]] * (MAX_SEGMENTS - len(digit)) for digit in style] for style in STROKES
    ]
    return torch.tensor(rows, device=device)


def _number_distance(
    numbers: Tensor, px: Tensor, py: Tensor, style: Tensor, weight: Tensor
) -> Tensor:
    """Distance to the nearest stroke of up to three digits, in pixels [N, P]."""
    value = numbers[:, 0].long()
    height = numbers[:, 3]
    digits = 1 + (value >= 10).long() + (value >= 100).long()
    ux, uy = px / height[:, None], py / height[:, None] + 0.5
    nearest = torch.full_like(ux, 9.0)
    for place in range(3):
        power = (digits - 1 - place).clamp(min=0)
        digit = torch.div(value, 10**power, rounding_mode="floor") % 10
        left = (DIGIT_WIDTH + 0.12) * (place - digits / 2) + 0.06
        strokes = _stroke_table(px.device)[style.long(), digit]  # [N, S, 4]
        field = _segment_distance(ux - left[:, None], uy, strokes)
        nearest = torch.where((place < digits)[:, None], torch.minimum(nearest, field), nearest)
    return (nearest - weight[:, None] / 2) * height[:, None]


def _segment_distance(x: Tensor, y: Tensor, segments: Tensor) -> Tensor:
    """Distance of points [N, P] to the nearest of the segments [N, S, 4]."""
    ax, ay, bx, by = (segments[:, :, i, None] for i in range(4))  # [N, S, 1]
    dx, dy = bx - ax, by - ay
    fx, fy = x[:, None] - ax, y[:, None] - ay  # [N, S, P]
    along = ((fx * dx + fy * dy) / (dx**2 + dy**2).clamp(min=1e-6)).clamp(0, 1)
    return ((fx - along * dx) ** 2 + (fy - along * dy) ** 2).amin(1).sqrt()
