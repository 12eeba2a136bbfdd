"""All rows of one cell, as the rules that put them into words look at them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwencli.bench.report.steadiness import Steadiness

Row = Mapping[str, str]
# Sentence and figure, for each thing that there is to say.
Said = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class CellRows:
    """All rows of one cell; `steady` is None where nothing was measured, `causes` is empty where
    nothing was slow or a campaign has no causes.csv."""

    cell: Row
    runs: Sequence[Row]
    tokens: Sequence[Row]
    gpu: Sequence[Row]
    steady: Steadiness | None
    causes: Sequence[Row] = ()

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.runs if row["status"] == "ok"]

    def numbers(self, column: str) -> list[float]:
        """Of the measured runs; runs without a figure are left out."""
        return [float(row[column]) for row in self.measured if row.get(column)]

    def median(self, column: str) -> float | None:
        found = self.numbers(column)
        return statistics.median(found) if found else None
