"""The Markdown report of a campaign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwencli.bench.report.detail_tables import DETAILS, DetailTable
from qwencli.bench.report.tables import (
    UNITS,
    VALUE_COLUMNS,
    by_speed,
    remarks,
    row_values,
    title,
    varying_axes,
    verdict_text,
    why_lines,
)
from qwencli.output import markdown_page

CellRow = Mapping[str, Any]


def markdown(rows: Sequence[CellRow], environment: Mapping[str, Any]) -> str:
    """The campaign as a Markdown page."""
    axes = varying_axes(rows)
    head = [axis.replace("_", " ") for axis in axes] + list(VALUE_COLUMNS)
    body = [
        [*(row[axis] for axis in axes), *row_values(row)[:-1], verdict_text(row)]
        for row in by_speed(rows)
    ]
    lines = ["# Benchmark", "", f"All cells: {title(rows)}.", "", *_device_lines(environment), ""]
    lines += [_markdown_row(head), _markdown_row(["---"] * len(head)), *map(_markdown_row, body)]
    lines += ["", f"{UNITS}.", "", *(f"- {remark}" for remark in remarks(rows))]
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
    return ["", f"## {detail.title}", "", *map(_markdown_row, table), "", f"{detail.note}."]


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
