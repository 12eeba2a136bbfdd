"""Outlines of the shapes in a box of edge 1 around the origin (y down), for both renderers."""

from __future__ import annotations

import math

Point = tuple[float, float]

SQUARE_EDGE = 0.9
STAR_RADIUS = 0.53
MIN_STROKE = 2.2


def ring_hole(detail: float, diameter: float) -> float:
    """Radius of a ring's hole as a share of its outer radius; the line is at least 2.2 px wide."""
    thin = 1 - max(0.12 + 0.38 * detail, 2 * MIN_STROKE / diameter)
    return max(0.45, thin)


def star_sharpness(detail: float) -> float:
    """Inner over outer radius of a star."""
    return 0.38 + 0.12 * detail


def cross_arm(detail: float) -> float:
    """Width of a cross's arm as a share of its extent."""
    return 0.24 + 0.16 * detail


def triangle_height(detail: float) -> float:
    """Height of a triangle of width 1."""
    return 0.80 + 0.16 * detail


def outline(shape: str, detail: float) -> list[Point]:
    """Corners of the polygon shapes (square, triangle, star, cross)."""
    if shape == "square":
        half = SQUARE_EDGE / 2
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":
        half = triangle_height(detail) / 2
        return [(0.0, -half), (0.5, half), (-0.5, half)]
    if shape == "star":
        inner = STAR_RADIUS * star_sharpness(detail)
        radii = (STAR_RADIUS, inner) * 5
        turns = [math.pi * (index / 5 - 0.5) for index in range(10)]
        return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]
    assert shape == "cross", shape
    arm = cross_arm(detail) / 2
    quarter = [(arm, -0.5), (arm, -arm), (0.5, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


def rotate(points: list[Point], degrees: float) -> list[Point]:
    """Clockwise on screen (y points down)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
