"""Findings as a document for programs and as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qwencli.diagnostics.finding import Check, Finding, Status

if TYPE_CHECKING:
    from rich.console import RenderableType

Result = tuple[Check, Finding]

_STYLE = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.SKIP: "dim"}


def verdict(results: Sequence[Result]) -> Status:
    """The worst of the findings; a SKIP counts as nothing."""
    statuses = {finding.status for _, finding in results}
    return next((s for s in (Status.FAIL, Status.WARN) if s in statuses), Status.PASS)


def document(results: Sequence[Result], recommended: Mapping[str, str]) -> dict[str, Any]:
    """What `qwencli diagnose --json` prints."""
    counts = Counter(finding.status for _, finding in results)
    return {
        "summary": {
            "verdict": verdict(results).value,
            **{status.value: counts[status] for status in Status},
        },
        "checks": [
            {
                "id": check.id,
                "group": check.group,
                "status": finding.status.value,
                "what": finding.what,
                "evidence": finding.evidence,
                "fix": finding.fix,
                "confidence": finding.confidence.value,
            }
            for check, finding in results
        ],
        "recommended": dict(recommended),
    }


def text(results: Sequence[Result], recommended: Mapping[str, str]) -> RenderableType:
    """Findings by group, each with its evidence and fix; reads well without colour."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for group, members in groupby(results, key=lambda result: result[0].group):
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, min_width=max(len(check.id) for check, _ in results))
        table.add_column(overflow="fold")
        for check, finding in members:
            label = Text(finding.status.value.upper(), style=_STYLE[finding.status])
            table.add_row(label, check.id, _body(finding))
        parts += [Text(group, style="bold"), table, Text()]
    modes = ", ".join(f"{axis} {mode}" for axis, mode in recommended.items() if axis != "why")
    parts += [Text("recommended", style="bold"), Text(modes), Text(recommended["why"], style="dim")]
    return Group(*parts, Text(), Text(summary_line(results)))


def _body(finding: Finding) -> RenderableType:
    from rich.text import Text

    body = Text(finding.what, style="dim" if finding.status is Status.SKIP else "")
    if finding.evidence:
        body.append(f"\n{finding.evidence}", style="dim")
    if finding.fix and finding.status in (Status.WARN, Status.FAIL):
        body.append(f"\nfix: {finding.fix}")
    return body


def summary_line(results: Sequence[Result]) -> str:
    counts = Counter(finding.status for _, finding in results)
    parts = [f"{counts[status]} {status.value}" for status in Status if counts[status]]
    return f"{verdict(results).value.upper()}: {', '.join(parts)}"
