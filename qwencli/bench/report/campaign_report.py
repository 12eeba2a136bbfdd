"""Rebuilds a campaign's cells.csv, causes.csv, report.md and report.html from its raw rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwencli.bench.attribution.attribute import attribute
from qwencli.bench.attribution.summary import with_causes
from qwencli.bench.attribution.whole_cell import machine_of
from qwencli.bench.report.cell_statistics import CellRow, cell_rows, measurable
from qwencli.bench.report.html.page import html_page
from qwencli.bench.report.tables import (
    DETAILS,
    UNITS,
    VALUE_COLUMNS,
    DetailTable,
    by_speed,
    remarks,
    row_values,
    title,
    varying_axes,
    verdict_text,
    why_lines,
)
from qwencli.bench.storage import columns
from qwencli.bench.storage.campaign_files import (
    CAUSES,
    CELLS,
    GPU,
    HOST,
    PROBES,
    QUALITY,
    ROOFLINE,
    RUNS,
    TOKENS,
    StoredCampaign,
)
from qwencli.bench.storage.row_file import replace_file, write_rows
from qwencli.output import markdown_page


def build_report(folder: Path) -> list[CellRow]:
    """Write cells.csv, causes.csv, report.md and report.html; returns the rows of cells.csv.

    Raises:
        BenchError: the folder holds no campaign, or a file of it is broken.
        OutputError: a file cannot be written.
    """
    stored = StoredCampaign(folder)
    plan, environment = stored.plan, stored.environment
    runs, tokens, gpu, host, probes, roofline, quality = (
        stored.rows(name) for name in (RUNS, TOKENS, GPU, HOST, PROBES, ROOFLINE, QUALITY)
    )
    machine = machine_of(environment)
    cells = cell_rows(plan, runs, tokens, roofline, quality, host, gpu, machine)
    busy = {cell["cell_id"]: cell["gpu_busy_percent"] for cell in cells}
    disturbed = {cell["cell_id"]: cell for cell in cells}
    findings = attribute(runs, tokens, host, gpu, busy, disturbed)
    rows = with_causes(cells, findings, runs, probes)
    write_rows(folder / CAUSES, columns.CAUSES, map(asdict, findings))
    write_rows(folder / CELLS, columns.CELLS, rows)
    replace_file(folder / "report.md", markdown(rows, environment).encode())
    page = html_page(rows, plan, environment, runs, tokens, gpu, findings)
    replace_file(folder / "report.html", page.encode())
    return rows


def markdown(rows: Sequence[CellRow], environment: Mapping[str, Any]) -> str:
    """The campaign as a Markdown page; cells that cannot run here are counted by reason."""
    said = [f"- {remark}" for remark in remarks(rows)]
    rows = measurable(rows)
    if not rows:
        return markdown_page(["# Benchmark", "", *_device_lines(environment), "", *said])
    lines = ["# Benchmark", "", f"All cells: {title(rows)}.", "", *_device_lines(environment), ""]
    axes = varying_axes(rows)
    head = [axis.replace("_", " ") for axis in axes] + list(VALUE_COLUMNS)
    body = [
        [*(row[axis] for axis in axes), *row_values(row)[:-1], verdict_text(row)]
        for row in by_speed(rows)
    ]
    lines += [_markdown_row(head), _markdown_row(["---"] * len(head)), *map(_markdown_row, body)]
    lines += ["", f"{UNITS}.", "", *said]
    if slowed := why_lines(rows):
        lines += ["", "## Why", "", *(f"- {line}" for line in slowed)]
    for detail in DETAILS:
        lines += _markdown_details(detail, rows, axes)
    return markdown_page(lines)


def _markdown_details(
    detail: DetailTable, rows: Sequence[CellRow], axes: Sequence[str]
) -> list[str]:
    shown = detail.shown(rows)
    if not shown:
        return []
    head = [axis.replace("_", " ") for axis in axes] + [column.head for column in shown]
    body = [
        [*(row[axis] for axis in axes), *(column.show(row) for column in shown)]
        for row in by_speed(detail.rows(rows))
    ]
    table = [head, ["---"] * len(head), *body]
    return ["", f"## {detail.title}", "", *map(_markdown_row, table), "", f"{detail.note(rows)}."]


def _markdown_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _device_lines(environment: Mapping[str, Any]) -> list[str]:
    device, versions, cpu = (environment[key] for key in ("device", "versions", "cpu"))
    where = device["name"] or cpu["model"] or "an unnamed processor"
    driver = f", driver {device['driver']}" if device["driver"] else ""
    return [
        f"On {where} ({device['device']}{driver}), torch {versions['torch']}, "
        f"transformers {versions['transformers']}, seed {environment['seed']}."
    ]
