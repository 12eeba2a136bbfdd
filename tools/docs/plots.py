"""Plots as plain SVG: a study's effects with their intervals, its runs, and speeds as bars.

Written by hand because three plots do not need a plotting library; colours and sizes suit a page
that is read in a browser, on white.
"""

from __future__ import annotations

import base64
import math
import textwrap
from collections.abc import Sequence
from html import escape

from qwencli.bench.studies.origin_tables import factors, series, speeds
from qwencli.bench.studies.study_evidence import Evidence

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 860, 330, 90, 22, 46
_FONT = 'font-family="sans-serif" font-size="12"'
_INK, _GRID, _ACCENT, _SECOND = "#222", "#ddd", "#1f6feb", "#c2410c"


def _svg(height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" {_FONT} fill="{_INK}">'
    )
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>', *parts,
                      "</svg>", ""])  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{colour}" stroke-width="{width}"/>'
    )


def effects_plot(evidence: Evidence) -> str:
    """Each factor's slowdown of generate() with its 95 % interval, on a logarithmic scale."""
    found = factors(evidence)
    ends = [end for factor in found for end in (factor.slowdown.low, factor.slowdown.high)]
    low, high = min([0.8, *ends]) * 0.95, max([3.0, *ends]) * 1.05

    def x(ratio: float) -> float:
        span = math.log(high) - math.log(low)
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (math.log(ratio) - math.log(low)) / span

    height = _TOP + _ROW * len(found) + 34
    bottom = height - 30
    parts = [_text(12, 20, "Time of generate() with the factor, over without it (95 % interval)",
                   extra='font-weight="bold"')]  # fmt: skip
    for tick in (0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 2.76, 4.0, 6.0, 10.0, 20.0):
        if low < tick < high:
            own = _SECOND if tick == 2.76 else _INK if tick == 1.0 else _GRID
            parts.append(_line(x(tick), _TOP - 12, x(tick), bottom, own))
            parts.append(_text(x(tick), bottom + 16, f"{tick:g}x", "middle"))
    for number, factor in enumerate(found):
        y = _TOP + _ROW * number + 6
        slow = factor.slowdown
        colour = _ACCENT if slow.low > 1 or slow.high < 1 else "#888"
        parts.append(_text(_LEFT - 12, y + 4, f"{factor.name} ({factor.engine})", "end"))
        parts.append(_line(x(slow.low), y, x(slow.high), y, colour, 2.5))
        parts.append(f'<circle cx="{x(slow.estimate):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(_text(_WIDTH - 12, y + 4, f"{slow.estimate:.2f}x", "end"))
    return _svg(height, parts)


def runs_plot(evidence: Evidence) -> str:
    """Speed of generate() run after run, kept and loaded anew, as a share of the median."""
    lines = [(f"{engine}, {mode}", speeds(rows)) for engine, mode, rows in series(evidence)]
    pane = 96
    height = _TOP + pane * len(lines) + 16
    parts = [_text(12, 20, "Identical runs, each as a share of its series' median tok/s",
                   extra='font-weight="bold"')]  # fmt: skip
    largest = max((max(found) / _middle(found) for _, found in lines), default=1.0)
    smallest = min((min(found) / _middle(found) for _, found in lines), default=1.0)
    high, low = max(1.2, largest * 1.05), min(0.8, smallest * 0.95)
    for number, (name, found) in enumerate(lines):
        top, bottom = _TOP + pane * number, _TOP + pane * number + pane - 24

        def y(share: float, top: float = top, bottom: float = bottom) -> float:
            return bottom - (bottom - top) * (share - low) / (high - low)

        parts.append(_text(12, y(1.0) + 4, name))
        parts.append(_text(_LEFT - 140, y(1.0) + 18, f"{_middle(found):.3g} tok/s", "end"))
        parts.append(_line(_LEFT - 120, y(1.0), _WIDTH - _RIGHT, y(1.0), _GRID))
        width = (_WIDTH - _RIGHT - _LEFT + 120) / len(found)
        colour = _ACCENT if name.startswith("native") else _SECOND
        for run, speed in enumerate(found):
            share = speed / _middle(found)
            left = _LEFT - 120 + width * run
            parts.append(_line(left, y(share), left + width * 0.8, y(share), colour, 4))
        ratio = max(found) / min(found)
        parts.append(_text(_WIDTH - 12, y(1.0) + 4, f"max/min {ratio:.2f}", "end"))
    return _svg(height, parts)


def speed_plot(
    png: bytes, caption: str, bars: Sequence[tuple[str, float, bool]], source: str
) -> str:
    """A picture with its caption beside a bar for each speed in tok/s; ours in another colour.

    Args:
        bars: what ran, tokens a second, and whether it is ours; drawn from the top.
    """
    row, left, right = 34, 490, 60
    height = max(260, _TOP + row * len(bars) + 30)
    largest = max(speed for _, speed, _ in bars)
    encoded = base64.b64encode(png).decode()
    parts = [
        f'<image x="14" y="18" width="232" height="174" href="data:image/png;base64,{encoded}"/>',
        '<rect x="14" y="18" width="232" height="174" fill="none" stroke="#ddd"/>',
        *(_text(14, 212 + 16 * n, line) for n, line in enumerate(textwrap.wrap(caption, 40))),
        _text(left, 28, "Tokens a second, one sequence", extra='font-weight="bold"'),
    ]
    for number, (name, speed, ours) in enumerate(bars):
        y, width = _TOP + row * number, (_WIDTH - left - right) * speed / largest
        colour = _ACCENT if ours else "#888"
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="22" fill="{colour}"/>')
        parts.append(_text(left - 10, y + 15, name, "end"))
        parts.append(_text(left + width + 8, y + 15, f"{speed:.0f}"))
    size = 'font-size="10" fill="#666"'
    parts.append(_text(_WIDTH - 12, height - 8, source, "end", extra=size))
    return _svg(height, parts)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
