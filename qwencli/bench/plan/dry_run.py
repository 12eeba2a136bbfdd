"""The table of `--dry-run`: cells in their order, what each will roughly cost, what is skipped."""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qwencli.bench.plan.cells import BenchCell
from qwencli.bench.plan.predict import Prediction
from qwencli.bench.report.tables import cell_label

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMULA = (
    "predicted: tokens x (bytes a token / read bandwidth + layers x launches / launch rate) + "
    "start + load; without prompts, pictures, compiling and checks after the runs"
)


def planned_table(
    cells: Sequence[BenchCell], predictions: Mapping[str, Prediction]
) -> RenderableType:
    """The cells of a plan in the given order, the skipped ones dim and last, by reason.

    Args:
        predictions: by cell_id, of the cells that can run here.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    runs = [cell for cell in cells if not cell.skip_reason]
    table = Table(title=f"{len(runs)} of {len(cells)} cells", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("cell", overflow="fold")
    for name in ("tok/s", "time", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, cell in enumerate(runs, start=1):
        predicted = predictions[cell.cell_id]
        table.add_row(
            str(number),
            cell_label(cell),
            "-" if predicted.tok_per_s is None else f"{predicted.tok_per_s:.3g}",
            duration(predicted.seconds),
            "-" if predicted.memory_bytes is None else f"{predicted.memory_bytes / 1e9:.1f} GB",
        )
    by_reason: dict[str, list[BenchCell]] = defaultdict(list)
    for cell in cells:
        if cell.skip_reason:
            by_reason[cell.skip_reason].append(cell)
    marks = dict(zip(by_reason, string.ascii_lowercase, strict=False))
    for reason, skipped in by_reason.items():
        for cell in skipped:
            table.add_row(marks.get(reason, "-"), cell_label(cell), style="dim")
    known = [p.seconds for p in predictions.values() if p.seconds is not None]
    lines = [f"all together about {duration(sum(known))}", FORMULA] if known else []
    lines += [
        f"{marks.get(reason, '-')} skipped: {reason} - {count} cell{'s' * (count > 1)}"
        for reason, count in ((reason, len(skipped)) for reason, skipped in by_reason.items())
    ]
    return Group(table, *(Text(line, style="dim") for line in lines))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
