"""One self-contained HTML page from a campaign's rows: no network, opens from file://.

What can be read stands in the page as HTML; what is drawn lies beside it as JSON, one script
element a cell, which the browser decodes when that cell is opened. Why so:
docs/decisions/0006-html-report.md.

The matrix is shown as coloured tables: quantization and attention down, cache across. Tables
rather than a picture: figures can be read, copied and heard; colour only repeats them.
"""

from __future__ import annotations

import math
import string
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from qwencli.bench.causes import Finding
from qwencli.bench.report.cell_statistics import measurable
from qwencli.bench.report.html.charts import (
    CAUSE_MARKS,
    GPU_POINTS,
    TOKEN_POINTS,
    RawRow,
    cell_charts,
    points_per_run,
    traces_by_cell,
)
from qwencli.bench.report.html.sections import (
    blank_section,
    cell_section,
    cells_table,
    detail_sections,
    environment_table,
    header,
    skipped_section,
    why_section,
)
from qwencli.bench.report.tables import is_quotable, row_label, speed_text, title, varying_axes
from qwencli.html_page import json_element, page_around

CellRow = Mapping[str, Any]

ASSETS = Path(__file__).with_name("assets")
# In this order: each file uses only what stands before it.
SCRIPTS = (
    "draw.js",
    "causes.js",
    "timeline.js",
    "zoom.js",
    "distribution.js",
    "runs.js",
    "page.js",
)
STEPS = 7  # .heat-0 .. .heat-6 in assets/style.css
_LINKS = "".join(
    f'<a href="#{name.lower()}">{name}</a>' for name in ("Matrix", "Table", "Cells", "Environment")
)
# Axes of a map's own rows and columns; by the others cells are on maps of their own.
_ON_MAP = ("quantization", "attention", "cache")
_IN_TITLE = ("model", "engine", "load_mode")


def html_page(
    rows: Sequence[CellRow],
    plan: Mapping[str, Any],
    environment: Mapping[str, Any],
    runs: Iterable[RawRow],
    tokens: Iterable[RawRow],
    gpu: Iterable[RawRow],
    findings: Sequence[Finding] = (),
) -> str:
    """The whole page.

    Args:
        rows: the rows of cells.csv, in its order; those that were skipped are listed with their
            reasons and are in no table.
        runs, tokens, gpu: the raw rows, as strings.
        findings: the rows of causes.csv.

    Raises:
        BenchError: a raw row holds something else than a number where one belongs.
    """
    traces = traces_by_cell(runs, tokens, gpu, findings)
    count = sum(map(len, traces.values()))
    limits = [points_per_run(most, count) for most in (TOKEN_POINTS, GPU_POINTS, CAUSE_MARKS)]
    skipped = skipped_section(rows)
    rows = measurable(rows)
    axes = varying_axes(rows)
    fastest = max((row["decode_tok_per_s_max"] or 0.0 for row in rows), default=0.0)
    widest = max(rows, key=lambda row: row["run_ratio_max_min"] or 0.0, default=None)
    sections, data = [], []
    for place, row in enumerate(rows):
        label = row_label(row, axes)
        if not traces[row["cell_id"]]:
            sections.append(blank_section(place, row, label))
            continue
        sections.append(cell_section(place, row, label, fastest, opened=row is widest))
        charts = cell_charts(
            traces[row["cell_id"]],
            *limits,
            as_origin=bool(plan.get("as_origin")),
            quotable=is_quotable(row),
        )
        data.append(json_element(f"charts-{place}", charts))
    body = Template(_asset("page.html")).substitute(
        lead=lead(rows),
        map=heat_maps(rows),
        table=cells_table(rows, axes),
        skipped=skipped,
        why=why_section(rows, axes),
        details=detail_sections(rows, axes),
        cells="\n".join(sections),
        environment=environment_table(environment),
    )
    return page_around(
        body + "\n".join(data),
        brand="qwencli benchmark",
        links=_LINKS,
        header=header(plan, environment),
        style=_asset("style.css"),
        script="\n".join(map(_asset, SCRIPTS)),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def lead(rows: Sequence[CellRow]) -> str:
    """What the figures of the map are, of the kinds that occur, and what all cells share."""
    known = [row for row in rows if row["decode_tok_per_s_median"]]
    said = ["Tokens per second, median of the runs; below it the fastest run over the slowest."]
    if not all(map(is_quotable, known)):
        said.append("In grey what the runs span, where no figure may be quoted.")
    if rows and (shared := title(rows)):
        said.append(f"All cells: {shared}.")
    return escape(" ".join(said))


def heat_maps(rows: Sequence[CellRow]) -> str:
    """One table for each model, engine and load mode, and whatever else tells cells apart that a
    table has no rows or columns for; one scale of colour for all of them.

    Args:
        rows: in the order of cells.csv; a cell's place among them is its anchor, `#cell-N`.
    """
    notes = _Notes()
    scale = _Scale([row["decode_tok_per_s_median"] for row in rows if is_quotable(row)])
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    more = [axis for axis in varying_axes(rows) if axis not in (*_IN_TITLE, *_ON_MAP)]
    for place, row in enumerate(rows):
        group = [row[axis] for axis in _IN_TITLE]
        group += [f"{axis.replace('_', ' ')} {row[axis]}" for axis in more]
        groups[tuple(group)].append(place)
    tables = [_table(name, rows, places, scale, notes) for name, places in groups.items()]
    return f'<div class="maps">{"".join(tables)}</div>{scale.legend()}{notes.lines()}'


class _Scale:
    """Logarithmic, because modes differ by factors: on a linear scale one fast cell hides the
    differences of all others."""

    def __init__(self, speeds: Sequence[float | None]) -> None:
        known = [speed for speed in speeds if speed]
        self.low, self.high = min(known, default=1.0), max(known, default=1.0)

    def step(self, speed: float) -> int:
        if self.high <= self.low:
            return STEPS - 1
        share = math.log(speed / self.low) / math.log(self.high / self.low)
        return min(STEPS - 1, int(share * STEPS))

    def legend(self) -> str:
        if self.high <= self.low:
            return ""
        swatches = "".join(f'<i class="heat-{step}"></i>' for step in range(STEPS))
        return (
            f'<p class="legend">{self.low:.1f} tok/s <span aria-hidden="true">{swatches}</span> '
            f"{self.high:.1f} tok/s, logarithmic</p>"
        )


class _Notes:
    """Letters for the reasons why cells have no figure."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def letter(self, said: str) -> str:
        number = len(self._letters)
        letters = string.ascii_lowercase
        name = letters[number % 26] * (1 + number // 26)
        return self._letters.setdefault(said, name)

    def lines(self) -> str:
        items = "".join(
            f"<li><b>{letter}</b> {escape(said)}</li>" for said, letter in self._letters.items()
        )
        return f'<ul class="notes">{items}</ul>' if items else ""


def _table(
    name: Sequence[str],
    rows: Sequence[CellRow],
    places: Sequence[int],
    scale: _Scale,
    notes: _Notes,
) -> str:
    by_modes = {
        (rows[place]["quantization"], rows[place]["attention"], rows[place]["cache"]): place
        for place in places
    }
    caches = list(dict.fromkeys(cache for *_, cache in by_modes))
    attentions: dict[str, list[str]] = defaultdict(list)
    for quantization, attention, _ in by_modes:
        if attention not in attentions[quantization]:
            attentions[quantization].append(attention)
    head = "".join(f'<th scope="col">{escape(cache)}</th>' for cache in caches)
    lines = []
    for quantization, kinds in attentions.items():
        for number, attention in enumerate(kinds):
            first = f'<th scope="rowgroup" rowspan="{len(kinds)}">{escape(quantization)}</th>'
            cells = "".join(
                _cell(by_modes.get((quantization, attention, cache)), rows, scale, notes)
                for cache in caches
            )
            lines.append(
                f'<tr>{first if number == 0 else ""}<th scope="row">{escape(attention)}</th>'
                f"{cells}</tr>"
            )
    caption = escape(", ".join(name))
    return (
        f'<table class="map"><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">quantization</th><th scope="col">attention</th>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _cell(place: int | None, rows: Sequence[CellRow], scale: _Scale, notes: _Notes) -> str:
    if place is None:
        return '<td class="absent" title="not run">·</td>'
    row = rows[place]
    speed, status = row["decode_tok_per_s_median"], row["status"]
    mark = ""
    if status != "ok":
        said = f"{status}: {row['reason']}" if row["reason"] else status
        mark = f"<sup>{notes.letter(said)}</sup>"
    if not speed:
        return f'<td class="none"><a href="#cell-{place}">{escape(status)}{mark}</a></td>'
    # Between the speeds of its runs no colour is that of the cell.
    kind = f"heat-{scale.step(speed)}" if is_quotable(row) else "unquotable"
    return (
        f'<td class="{kind}"><a href="#cell-{place}">'
        f"<b>{speed_text(row)}</b>{mark}{_spread(row)}</a></td>"
    )


def _spread(row: CellRow) -> str:
    """The fastest run over the slowest, with a sign where the verdict has something to say."""
    ratio, verdict = row["run_ratio_max_min"], row["verdict"]
    figure = f"max/min {ratio:.2f}" if ratio else ""
    if verdict == "ok":
        return f"<small>{figure}</small>"
    return f'<small title="{escape(verdict)}">⚠ {figure}</small>'
