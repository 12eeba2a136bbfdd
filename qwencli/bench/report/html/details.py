"""The tables beside the main one: steadiness, with its shares of variance drawn, and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qwencli.bench.report.detail_tables import DETAILS, STEADINESS, DetailTable
from qwencli.bench.report.tables import by_speed, row_label

CellRow = Mapping[str, Any]

# Share of variance -> its class in assets/style.css and its name in the legend.
_LEVELS = {
    "variance_within_run_percent": ("within", "within runs"),
    "variance_between_runs_percent": ("between", "between runs"),
    "variance_between_processes_percent": ("processes", "between processes"),
}


def detail_sections(rows: Sequence[CellRow], axes: Sequence[str]) -> str:
    """A section for each table that has anything in it."""
    return "\n".join(_section(detail, rows, axes) for detail in DETAILS if detail.shown(rows))


def _section(detail: DetailTable, rows: Sequence[CellRow], axes: Sequence[str]) -> str:
    shown = detail.shown(rows)
    bars = detail is STEADINESS and any(_shares(row) for row in rows)
    heads = [escape(column.head) for column in shown] + ["variance of token times"] * bars
    places = {row["cell_id"]: place for place, row in enumerate(rows)}
    lines = []
    for row in by_speed(detail.rows(rows)):
        label = escape(row_label(row, axes))
        cells = [f"<td>{escape(column.show(row))}</td>" for column in shown]
        cells += [f"<td>{_bar(row)}</td>"] * bars
        link = f'<a href="#cell-{places[row["cell_id"]]}">{label}</a>'
        lines.append(f'<tr><th scope="row">{link}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("cell", *heads))
    return (
        f"<section><h2>{escape(detail.title)}</h2>"
        f'<p class="lead">{escape(detail.note)}.{_legend() if bars else ""}</p>'
        f'<div class="wide"><table class="cells details"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _shares(row: CellRow) -> list[tuple[str, str, float]]:
    return [
        (kind, name, row[column])
        for column, (kind, name) in _LEVELS.items()
        if row.get(column) is not None
    ]


def _bar(row: CellRow) -> str:
    """A bar of the shares; the figures stand in the columns beside it."""
    parts = "".join(
        f'<i class="{kind}" style="width:{share:.1f}%" title="{name}: {share:.0f} %"></i>'
        for kind, name, share in _shares(row)
    )
    return f'<span class="shares">{parts}</span>' if parts else ""


def _legend() -> str:
    keys = "".join(
        f'<span class="key"><i class="{kind}"></i> {name}</span> '
        for kind, name in _LEVELS.values()
    )
    return f'<span class="sharekeys">{keys}</span>'
