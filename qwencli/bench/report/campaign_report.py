"""Rebuilds a campaign's cells.csv, causes.csv, report.md and report.html from its raw rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from qwencli.bench.attribution.attribute import attribute
from qwencli.bench.attribution.summary import with_causes
from qwencli.bench.attribution.whole_cell import machine_of
from qwencli.bench.report.cell_statistics import CellRow, cell_rows
from qwencli.bench.report.html.page import html_page
from qwencli.bench.report.markdown import markdown
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
