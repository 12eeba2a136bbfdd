"""Rebuilds a campaign's cells.csv and report.md from its raw rows."""

from __future__ import annotations

from pathlib import Path

from qwencli.bench import columns
from qwencli.bench.campaign import ENVIRONMENT, PLAN, RUNS, TOKENS, read_json
from qwencli.bench.rowfile import read_rows, replace_file, write_rows
from qwencli.bench.stats import CellRow, cell_rows
from qwencli.bench.tables import markdown


def build_report(folder: Path) -> list[CellRow]:
    """Write cells.csv and report.md; returns the rows of cells.csv.

    Raises:
        BenchError: the folder holds no campaign.
        OutputError: a file cannot be written.
    """
    plan = read_json(folder / PLAN)
    rows = cell_rows(plan, read_rows(folder / RUNS), read_rows(folder / TOKENS))
    write_rows(folder / "cells.csv", columns.CELLS, rows)
    page = markdown(rows, read_json(folder / ENVIRONMENT))
    replace_file(folder / "report.md", page.encode())
    return rows
