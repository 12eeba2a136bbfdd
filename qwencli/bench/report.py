"""Rebuilds a campaign's cells.csv, report.md and report.html from its raw rows."""

from __future__ import annotations

from pathlib import Path

from qwencli.bench import columns
from qwencli.bench.campaign import ENVIRONMENT, GPU, PLAN, RUNS, TOKENS, read_json
from qwencli.bench.html.page import html_page
from qwencli.bench.rowfile import read_rows, replace_file, write_rows
from qwencli.bench.stats import CellRow, cell_rows
from qwencli.bench.tables import markdown


def build_report(folder: Path) -> list[CellRow]:
    """Write cells.csv, report.md and report.html; returns the rows of cells.csv.

    Raises:
        BenchError: the folder holds no campaign.
        OutputError: a file cannot be written.
    """
    plan = read_json(folder / PLAN)
    environment = read_json(folder / ENVIRONMENT)
    runs, tokens = read_rows(folder / RUNS), read_rows(folder / TOKENS)
    rows = cell_rows(plan, runs, tokens)
    write_rows(folder / "cells.csv", columns.CELLS, rows)
    replace_file(folder / "report.md", markdown(rows, environment).encode())
    page = html_page(rows, plan, environment, runs, tokens, read_rows(folder / GPU))
    replace_file(folder / "report.html", page.encode())
    return rows
