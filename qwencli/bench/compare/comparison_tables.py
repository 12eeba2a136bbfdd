"""A comparison in words: the terminal table and the JSON document."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qwencli.bench.attribution.whole_cell import over_limits
from qwencli.bench.compare.comparison import CellComparison, Comparison, Verdict, counts
from qwencli.bench.compare.intervals import CHANGE_CONFIDENCE, SAME_CONFIDENCE
from qwencli.bench.compare.sides import SideCell
from qwencli.bench.plan.matrix import AXES
from qwencli.bench.report.tables import (
    by_kind,
    is_quotable,
    row_label,
    speed_text,
    title,
    varying_axes,
)
from qwencli.output import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLE = {Verdict.FASTER: "green", Verdict.SLOWER: "red", Verdict.AMBIGUOUS: "yellow"}


def comparison_table(found: Comparison) -> RenderableType:
    """A table that fits 80 columns, in A's order, with what cannot be compared under it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = [Text(line, style="dim") for line in _lines(found)]
    if not found.cells:
        return Group(Text("no cell has figures on both sides"), *lines)
    rows = [cell.a.row for cell in found.cells]
    axes = varying_axes(rows)
    table = Table(title=title(rows), box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column(" ".join(axis.replace("_", " ") for axis in axes), overflow="fold")
    for name in ("A tok/s", "B tok/s", "B vs A", f"{SAME_CONFIDENCE:.0%} interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for cell in found.cells:
        table.add_row(
            row_label(cell.a.row, axes),
            *map(_speed, (cell.a, cell.b)),
            *_change(cell),
            Text(str(cell.verdict), style=_STYLE.get(cell.verdict, "")),
        )
    return Group(table, *lines)


def _speed(side: SideCell) -> str:
    """What is compared; where that is not to be quoted, what the runs span."""
    return f"{side.level:.1f}" if is_quotable(side.row) else speed_text(side.row)


def _change(cell: CellComparison) -> tuple[str, str]:
    if cell.ratio is None:
        return f"{_ratio(cell) - 1:+.1%}", "-"
    same = cell.ratio.same
    return f"{same.estimate - 1:+.1%}", f"{(same.low - 1) * 100:+.1f} to {same.high - 1:+.1%}"


def _ratio(cell: CellComparison) -> float:
    """The estimate that the interval is around, where there is one."""
    return cell.ratio.same.estimate if cell.ratio else cell.b.level / cell.a.level


def _lines(found: Comparison) -> list[str]:
    """What the table has no room for, equal remarks together, cells as the table names them."""
    lines = [
        f"A = {found.a}, B = {found.b}",
        ", ".join(f"{count} {verdict}" for verdict, count in counts(found.cells).items())
        + f"; within {found.threshold:.1%} counts as SAME",
    ]
    if any(cell.verdict is Verdict.AMBIGUOUS and cell.ratio for cell in found.cells):
        lines.append(
            "AMBIGUOUS: the interval crosses an edge of that band, or does so at "
            f"{CHANGE_CONFIDENCE:.0%}, which a change needs; more processes narrow it"
        )
    busy = any(over_limits(side.row) for cell in found.cells for side in (cell.a, cell.b))
    if busy and not found.in_turns:
        lines.append(
            "a side on a busy machine is never FASTER or SLOWER; measure it on a quiet one, or "
            "both in turns: bench compare --run"
        )
    if few := sum(cell.ratio is not None and cell.ratio.few for cell in found.cells):
        lines.append(
            f"{few} with one process a side: what processes differ by is taken from other "
            "campaigns; --processes 3 or more shows it"
        )
    if found.forced:
        lines.append(f"not alike, compared by force: {'; '.join(found.forced)}")
    if found.changes:
        lines.append(f"changed: {', '.join(found.changes)}")
    return lines + _grouped(_remarks(found))


def _remarks(found: Comparison) -> Iterable[tuple[str, str]]:
    of_a = [cell.a for cell in found.cells] + [a for a, _ in found.no_figure]
    sides = (*of_a, *found.only_in_a, *found.only_in_b)
    axes = varying_axes([side.row for side in sides])
    for cell in found.cells:
        for remark in cell.remarks:
            yield remark, row_label(cell.a.row, axes)
    for a, b in found.no_figure:
        if a.speeds or b.speeds:
            name, empty = ("B", b) if a.speeds else ("A", a)
            yield f"no figure in {name}: {_why(empty)}", row_label(a.row, axes)
        else:
            yield "no figure in A and B", row_label(a.row, axes)
    for name, cells in (("A", found.only_in_a), ("B", found.only_in_b)):
        for alone in cells:
            yield f"only in {name}", row_label(alone.row, axes)


def _grouped(remarks: Iterable[tuple[str, str]]) -> list[str]:
    return [
        f"{remark} - {labels[0] if len(labels) == 1 else counted(len(labels), 'cell')}"
        for remark, labels in by_kind(remarks)
    ]


def _why(cell: SideCell) -> str:
    status, reason = cell.row["status"], cell.row["reason"]
    return f"{status}: {reason}" if reason else str(status)


def comparison_document(found: Comparison) -> dict[str, Any]:
    """The object of `bench compare --json`; ratios are B / A of decode speeds."""
    return {
        "a": found.a,
        "b": found.b,
        "threshold_percent": round(found.threshold * 100, 9),
        "confidence": SAME_CONFIDENCE,
        "change_confidence": CHANGE_CONFIDENCE,
        "counts": counts(found.cells),
        "cells": [_cell(cell) for cell in found.cells],
        "no_figure": [
            {"cell_id": a.row["cell_id"], "a": _figure(a), "b": _figure(b)}
            for a, b in found.no_figure
        ],
        "only_in_a": [cell.row["cell_id"] for cell in found.only_in_a],
        "only_in_b": [cell.row["cell_id"] for cell in found.only_in_b],
        "forced": list(found.forced),
        "changes": list(found.changes),
    }


def _figure(cell: SideCell) -> str:
    return "measured" if cell.speeds else _why(cell)


def _cell(cell: CellComparison) -> dict[str, Any]:
    same, change = (cell.ratio.same, cell.ratio.change) if cell.ratio else (None, None)
    return {
        "cell_id": cell.a.row["cell_id"],
        **{axis: cell.a.row[axis] for axis in AXES},
        "verdict": str(cell.verdict),
        "ratio": _ratio(cell),
        "ratio_low": same.low if same else None,
        "ratio_high": same.high if same else None,
        "change_low": change.low if change else None,
        "change_high": change.high if change else None,
        "a_decode_tok_per_s_median": statistics.median(cell.a.speeds),
        "b_decode_tok_per_s_median": statistics.median(cell.b.speeds),
        "a_runs": len(cell.a.speeds),
        "b_runs": len(cell.b.speeds),
        "a_processes": len(cell.a.processes),
        "b_processes": len(cell.b.processes),
        "remarks": list(cell.remarks),
    }
