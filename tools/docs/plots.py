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

    height = _TOP + _ROW * len(found) + 78
    bottom = height - 74
    parts = [_text(12, 20, "What each factor does to the time of generate()",
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
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 36,
                       "time with the factor / time without it (ratio, logarithmic)",
                       "middle"))  # fmt: skip
    keys = [
        (_ACCENT, "95 % interval without 1"),
        ("#888", "95 % interval around 1: no effect shown"),
    ]
    keys += [(_SECOND, "2.76x: between the origin's runs")] if low < 2.76 < high else []
    return _svg(height, [*parts, *_legend(keys, height - 14)])


def _legend(keys: Sequence[tuple[str, str]], y: float) -> list[str]:
    """Colours and what they stand for, side by side."""
    parts, x = [], 12.0
    for colour, name in keys:
        parts.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="14" height="10" fill="{colour}"/>')
        parts.append(_text(x + 20, y, name))
        x += 44 + 6.6 * len(name)
    return parts


def runs_plot(evidence: Evidence) -> str:
    """Speed of generate() run after run, kept and loaded anew, as a share of the median."""
    lines = [(f"{engine}, {mode}", speeds(rows)) for engine, mode, rows in series(evidence)]
    pane, left, right = 96, _LEFT - 84, _WIDTH - _RIGHT - 16
    bottom = _TOP + pane * len(lines)
    parts = [_text(12, 20, "Identical runs, one after the other", extra='font-weight="bold"'),
             _text(left - 44, 36,
                   "tok/s of the whole generate(), percent of the series' median")]  # fmt: skip
    largest = max((max(found) / _middle(found) for _, found in lines), default=1.0)
    smallest = min((min(found) / _middle(found) for _, found in lines), default=1.0)
    high, low = max(1.2, largest * 1.05), min(0.8, smallest * 0.95)
    most = max((len(found) for _, found in lines), default=1)
    width = (right - left) / most
    for number, (name, found) in enumerate(lines):
        top, floor = _TOP + pane * number, _TOP + pane * number + pane - 24

        def y(share: float, top: float = top, floor: float = floor) -> float:
            return floor - (floor - top) * (share - low) / (high - low)

        parts.append(_text(12, y(1.0) - 4, name))
        parts.append(
            _text(12, y(1.0) + 12, f"median {_middle(found):,.{_middle(found) < 100:d}f} tok/s")
        )
        for tick in _percent_ticks(low, high):
            at = y(tick / 100)
            parts.append(_line(left, at, right, at, _INK if tick == 100 else _GRID))
            parts.append(_text(left - 8, at + 4, f"{tick} %", "end", extra='font-size="10"'))
        colour = _ACCENT if name.startswith("native") else _SECOND
        for run, speed in enumerate(found):
            at, place = y(speed / _middle(found)), left + width * run
            parts.append(_line(place, at, place + width * 0.8, at, colour, 4))
        ratio = max(found) / min(found)
        parts.append(_text(_WIDTH - 12, y(1.0) + 4, f"max/min {ratio:.2f}", "end"))
    for run in range(0, most, max(1, -(-most // 20))):
        parts.append(_text(left + width * (run + 0.4), bottom - 6, str(run + 1), "middle"))
    parts.append(_text((left + right) / 2, bottom + 12, "run", "middle"))
    keys = [
        (colour, name)
        for colour, name in ((_ACCENT, "native"), (_SECOND, "transformers"))
        if any(line.startswith(name) for line, _ in lines)
    ]
    return _svg(bottom + 44, [*parts, *_legend(keys, bottom + 34)])


def _percent_ticks(low: float, high: float) -> list[int]:
    """100 and a step on either side of it, as far as there is room for."""
    step = next(step for step in (10, 20, 50, 100, 200, 500) if (high - low) * 100 / step <= 4)
    return [tick for tick in range(0, int(high * 100) + 1, step) if tick >= low * 100]


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
