"""Rebuilds a campaign's cells.csv, causes.csv, report.md and report.html from its raw rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from qwencli.bench import columns
from qwencli.bench.attribution.attribute import attribute
from qwencli.bench.attribution.summary import with_causes
from qwencli.bench.attribution.whole_cell import machine_of
from qwencli.bench.campaign import (
    BESIDE,
    ENVIRONMENT,
    GPU,
    HOST,
    PLAN,
    PROBES,
    RUNS,
    TOKENS,
    beside_path,
    read_json,
)
from qwencli.bench.html.page import html_page
from qwencli.bench.markdown import markdown
from qwencli.bench.rowfile import read_rows, replace_file, write_rows
from qwencli.bench.stats import CellRow, cell_rows

CAUSES = "causes.csv"


def build_report(folder: Path) -> list[CellRow]:
    """Write cells.csv, causes.csv, report.md and report.html; returns the rows of cells.csv.

    Raises:
        BenchError: the folder holds no campaign.
        OutputError: a file cannot be written.
    """
    plan = read_json(folder / PLAN)
    environment = read_json(folder / ENVIRONMENT)
    runs, tokens = read_rows(folder / RUNS), read_rows(folder / TOKENS)
    gpu, host = read_rows(folder / GPU), read_rows(folder / HOST)
    beside = {name: read_rows(beside_path(folder, name)) for name in BESIDE}
    machine = machine_of(environment)
    cells = cell_rows(plan, runs, tokens, **beside, host=host, gpu=gpu, machine=machine)
    busy = {cell["cell_id"]: cell["gpu_busy_percent"] for cell in cells}
    disturbed = {cell["cell_id"]: cell for cell in cells}
    findings = attribute(runs, tokens, host, gpu, busy, disturbed)
    rows = with_causes(cells, findings, runs, read_rows(folder / PROBES))
    write_rows(folder / CAUSES, columns.CAUSES, map(asdict, findings))
    write_rows(folder / "cells.csv", columns.CELLS, rows)
    replace_file(folder / "report.md", markdown(rows, environment).encode())
    page = html_page(rows, plan, environment, runs, tokens, gpu, findings)
    replace_file(folder / "report.html", page.encode())
    return rows
