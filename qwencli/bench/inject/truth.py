"""truth.csv: what was done to each run, and when. Attribution never reads it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwencli.bench.attribution.causes import Cause
from qwencli.bench.storage.campaign_files import check_table
from qwencli.bench.storage.row_file import read_table

FILE = "truth.csv"
COLUMNS = ("run", "cause", "t_s", "span_ms")
# The cause of a run that was left alone.
NONE = "none"


def rows_of(run: int, cause: str, spans: Iterable[tuple[float, float]]) -> list[dict[str, Any]]:
    """A row for each time the fault was on, `t_s` its end; one without times where it was not."""
    rows = [
        {"run": run, "cause": cause, "t_s": end, "span_ms": 1e3 * (end - start)}
        for start, end in spans
    ]
    return rows or [{"run": run, "cause": cause, "t_s": None, "span_ms": None}]


def read_truth(folder: Path) -> list[dict[str, str]]:
    """The rows of a campaign's truth.csv; [] where nothing was injected.

    Raises:
        BenchError: it is broken.
    """
    table = read_table(folder / FILE)
    causes = {"cause": (NONE, *map(str, Cause))}
    check_table(table, COLUMNS, len(COLUMNS), ("run", "cause"), causes)
    return table.rows
