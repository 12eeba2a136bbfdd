"""One self-contained HTML page from a campaign's rows: no network, opens from file://.

What can be read stands in the page as HTML; what is drawn lies beside it as JSON, one script
element a cell, which the browser decodes when that cell is opened. Why so:
docs/decisions/0006-html-report.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from qwencli.bench.attribution.causes import Finding
from qwencli.bench.report.html.charts import (
    CAUSE_MARKS,
    GPU_POINTS,
    TOKEN_POINTS,
    cell_charts,
    points_per_run,
)
from qwencli.bench.report.html.details import detail_sections
from qwencli.bench.report.html.heatmap import heat_maps
from qwencli.bench.report.html.sections import (
    blank_section,
    cell_section,
    cells_table,
    environment_table,
    header,
)
from qwencli.bench.report.html.takes import RawRow, takes_by_cell
from qwencli.bench.report.html.why import why_section
from qwencli.bench.report.tables import row_label, title, varying_axes

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
        rows: the rows of cells.csv, in its order.
        runs, tokens, gpu: the raw rows, as strings.
        findings: the rows of causes.csv.

    Raises:
        BenchError: a raw row holds something else than a number where one belongs.
    """
    takes = takes_by_cell(runs, tokens, gpu, findings)
    count = sum(map(len, takes.values()))
    limits = [points_per_run(most, count) for most in (TOKEN_POINTS, GPU_POINTS, CAUSE_MARKS)]
    axes = varying_axes(rows)
    fastest = max((row["decode_tok_per_s_max"] or 0.0 for row in rows), default=0.0)
    widest = max(rows, key=lambda row: row["run_ratio_max_min"] or 0.0)
    sections, data = [], []
    for place, row in enumerate(rows):
        label = row_label(row, axes)
        if not takes[row["cell_id"]]:
            sections.append(blank_section(place, row, label))
            continue
        sections.append(cell_section(place, row, label, fastest, opened=row is widest))
        data.append(_script(f"charts-{place}", cell_charts(takes[row["cell_id"]], *limits)))
    return Template(_asset("page.html")).substitute(
        style=_asset("style.css"),
        script="\n".join(map(_asset, SCRIPTS)),
        header=header(plan, environment),
        shared=escape(title(rows)),
        map=heat_maps(rows),
        table=cells_table(rows, axes),
        why=why_section(rows, axes),
        details=detail_sections(rows, axes),
        cells="\n".join(sections),
        environment=environment_table(environment),
        data="\n".join(data),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _script(name: str, value: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever a model is called."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
