"""A campaign in words: what its rows show, each sentence with the figure behind it.

Reads the CSV files alone. A sentence is said only where its figures are there and say something;
a column that a campaign does not have is as one that no sensor could read.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from qwencli.bench.attribution.whole_cell import over_limits
from qwencli.bench.plan.matrix import AXES
from qwencli.bench.report.cell_statistics import NOT_QUOTABLE, UNSTABLE, CellRows
from qwencli.bench.report.explain_rules import CELL_RULES
from qwencli.bench.report.steadiness import steadiness
from qwencli.bench.storage.campaign_files import CAUSES, CELLS, GPU, RUNS, TOKENS, read_file
from qwencli.errors import BenchError
from qwencli.output import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

# Below this two modes are as fast as each other, whatever the third digit says.
SAME_SPEED = 0.03
Row = Mapping[str, str]


@dataclass(frozen=True)
class Explained:
    """One finding: `cell` is None for what concerns the whole campaign."""

    cell: str | None
    what: str
    figure: str


@dataclass
class _Rows:
    """The rows of one campaign by cell."""

    cells: list[Row]
    runs: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    gpu: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    causes: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))


def explain_campaign(folder: Path) -> list[Explained]:
    """The findings, those of the whole campaign first.

    Raises:
        BenchError: the folder has no cells.csv with rows, or a file is broken.
    """
    cells: list[Row] = list(read_file(folder, CELLS))
    if not cells:
        raise BenchError(
            f"{folder} holds no {CELLS}",
            "name a campaign's folder; `qwencli bench report` makes the file",
        )
    rows = _Rows(cells)
    for name, kept in (
        (RUNS, rows.runs),
        (TOKENS, rows.tokens),
        (GPU, rows.gpu),
        (CAUSES, rows.causes),
    ):
        for row in read_file(folder, name):
            kept[row["cell_id"]].append(row)
    whole = (said for rule in CAMPAIGN_RULES for said in rule(rows))
    return [Explained(None, *said) for said in whole] + list(_of_cells(rows))


def _of_cells(rows: _Rows) -> Iterator[Explained]:
    axes = [axis for axis in AXES if len({cell.get(axis, "") for cell in rows.cells}) > 1]
    steady = {
        entry.cell_id: entry
        for cell in rows.cells
        for entry in steadiness(rows.runs[cell["cell_id"]], rows.tokens[cell["cell_id"]])
    }
    for cell in rows.cells:
        name = cell["cell_id"]
        data = CellRows(
            cell,
            rows.runs[name],
            rows.tokens[name],
            rows.gpu[name],
            steady.get(name),
            rows.causes[name],
        )
        if not data.measured:
            continue
        label = " ".join(cell.get(axis, "") for axis in axes) or cell["model"]
        for rule in CELL_RULES:
            for what, figure in rule(data):
                yield Explained(label, what, figure)


def _speeds(rows: _Rows) -> dict[str, float]:
    """Median speeds by cell_id, where they may be quoted: others tell nothing of their modes."""
    return {
        cell["cell_id"]: float(cell["decode_tok_per_s_median"])
        for cell in rows.cells
        if cell["decode_tok_per_s_median"] and not _unquoted(cell)
    }


def _unquoted(cell: Row) -> str | None:
    """Why the cell's median is not to be quoted, in a word or two."""
    if over_limits(cell):
        return NOT_QUOTABLE
    verdict = cell.get("verdict") or ""
    return next(
        (word for word in (NOT_QUOTABLE, UNSTABLE, "FAIL") if verdict.startswith(word)), None
    )


def _left_out(rows: _Rows) -> Iterator[tuple[str, str]]:
    """The cells by which no modes are compared."""
    measured = [cell for cell in rows.cells if cell["decode_tok_per_s_median"]]
    reasons = Counter(reason for cell in measured if (reason := _unquoted(cell)))
    if not reasons or len(measured) < 2:
        return
    left = len(measured) - reasons.total()
    yield (
        f"modes are compared by {left} of {counted(len(measured), 'cell')}: the others have no "
        "figure to quote"
        if left > 1
        else "no modes are compared: fewer than two cells have a figure to quote",
        ", ".join(f"{count} {reason}" for reason, count in reasons.items()),
    )


def _range(rows: _Rows) -> Iterator[tuple[str, str]]:
    speeds = _speeds(rows)
    if len(speeds) < 2:
        return
    axes = [axis for axis in AXES if len({cell.get(axis, "") for cell in rows.cells}) > 1]
    label = {cell["cell_id"]: " ".join(cell.get(axis, "") for axis in axes) for cell in rows.cells}
    fast, slow = max(speeds, key=lambda c: speeds[c]), min(speeds, key=lambda c: speeds[c])
    cells = "cell" if not any(map(_unquoted, rows.cells)) else "of them"
    yield (
        f"the fastest {cells} ({label[fast]}) decodes {speeds[fast] / speeds[slow]:.1f} times as "
        f"fast as the slowest ({label[slow]})",
        f"{speeds[fast]:.1f} and {speeds[slow]:.1f} tok/s",
    )


def _axis_effects(rows: _Rows) -> Iterator[tuple[str, str]]:
    """For each value of an axis the ratio to the first, over cells that differ in it alone."""
    speeds = _speeds(rows)
    by_axes = {
        tuple(cell.get(axis, "") for axis in AXES): speeds[cell["cell_id"]]
        for cell in rows.cells
        if cell["cell_id"] in speeds
    }
    for at, axis in enumerate(AXES):
        values = list(dict.fromkeys(key[at] for key in by_axes))
        base = values[0] if values else ""
        for value in values[1:]:
            ratios = [
                speed / by_axes[pair]
                for key, speed in by_axes.items()
                if key[at] == value and (pair := (*key[:at], base, *key[at + 1 :])) in by_axes
            ]
            if ratios:
                yield _effect(axis.replace("_", " "), base, value, ratios)


def _effect(axis: str, base: str, value: str, ratios: Sequence[float]) -> tuple[str, str]:
    middle = statistics.median(ratios)
    if min(ratios) < 1 - SAME_SPEED and max(ratios) > 1 + SAME_SPEED:
        said = f"{axis}: {value} is sometimes faster, sometimes slower than {base}"
    elif abs(middle - 1) <= SAME_SPEED:
        said = f"{axis}: {value} is as fast as {base}"
    elif middle > 1:
        said = f"{axis}: {value} is {middle:.2f} times as fast as {base}"
    else:
        said = f"{axis}: {value} takes {1 / middle:.2f} times as long a token as {base}"
    pairs = counted(len(ratios), "pair of cells", "pairs of cells")
    return said, f"ratio of tok/s {middle:.2f}, {min(ratios):.2f} to {max(ratios):.2f} over {pairs}"


def _not_run(rows: _Rows) -> Iterator[tuple[str, str]]:
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for cell in rows.cells:
        if cell["status"] != "ok":
            reasons[cell["status"], cell["reason"]] += 1
    for (status, reason), count in reasons.items():
        yield (
            f"{counted(count, 'cell')} {status}: {reason}",
            f"{count} of {counted(len(rows.cells), 'cell')}",
        )


CAMPAIGN_RULES: tuple[Callable[[_Rows], Iterator[tuple[str, str]]], ...] = (
    _left_out,
    _range,
    _axis_effects,
    _not_run,
)


def explained_text(findings: Sequence[Explained]) -> RenderableType:
    """The findings under a heading for each cell; reads well at 80 columns without colour."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for cell, group in groupby(findings, key=lambda finding: finding.cell):
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in group:
            line = Text(f"{finding.what} ")
            line.append(f"({finding.figure})", style="dim")
            table.add_row("-", line)
        parts += [Text(cell or "whole campaign", style="bold"), table, Text()]
    return Group(*parts[:-1])
