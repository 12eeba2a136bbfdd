"""What slowed the cells, in words, as a section of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qwencli.bench.attribution.summary import probe_line, why
from qwencli.bench.report.tables import by_speed, row_label

CellRow = Mapping[str, Any]


def why_section(rows: Sequence[CellRow], axes: Sequence[str]) -> str:
    """A line or two for each cell that was slowed, fastest cell first; "" where there is nothing
    to say at all."""
    places = {row["cell_id"]: place for place, row in enumerate(rows)}
    names = {row["cell_id"]: row_label(row, axes) if len(rows) > 1 else "this cell" for row in rows}
    lines = [
        f'<li><a href="#cell-{places[row["cell_id"]]}">{escape(names[row["cell_id"]])}</a>: '
        f"{escape(said)}</li>"
        for row in by_speed(rows)
        for said in why(row)
    ]
    probes = probe_line(rows)
    if not lines and probes is None:
        return ""
    lead = f'<p class="lead">{escape(probes.capitalize())}.</p>' if probes else ""
    items = f'<ul class="why">{"".join(lines)}</ul>' if lines else "<p>No gaps, no slow runs.</p>"
    return f'<section id="why"><h2>Why</h2>{lead}{items}</section>'
