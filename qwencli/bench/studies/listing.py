"""The claims as a table: what each says and what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwencli.bench.studies.claim_file import ALL, choose

if TYPE_CHECKING:
    from rich.console import RenderableType


def claims_table() -> RenderableType:
    """All claims with what was expected of them and what they need of a machine."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name in ("claim", "says", "expected before the first run", "needs"):
        table.add_column(name, overflow="fold")
    for study in choose([ALL]):
        needs = ", ".join((*study.needs, *(f"{name} to refute" for name in study.about)))
        table.add_row(study.claim, study.title, study.expected, needs or "-")
    return table
