"""Findings as a document for programs, as text for people, and as a page for an issue."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qwencli.diagnostics.advice import Advice
from qwencli.diagnostics.finding import Check, Finding, Status
from qwencli.output import counted, markdown_page

if TYPE_CHECKING:
    from rich.console import RenderableType

Result = tuple[Check, Finding]

_STYLE = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.SKIP: "dim"}
# More are one line: on a machine without a GPU most checks have nothing to look at.
MOST_SKIPS_SHOWN = 3
_SETTINGS = (
    "model", "device", "dtype", "engine", "quantization", "attention", "cache", "kernels",
    "max_seq_len",
    "max_pixels",
)  # fmt: skip


def verdict(results: Sequence[Result]) -> Status:
    """The worst of the findings; a SKIP counts as nothing."""
    statuses = {finding.status for _, finding in results}
    return next((s for s in (Status.FAIL, Status.WARN) if s in statuses), Status.PASS)


def document(
    results: Sequence[Result], advice: Advice, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """What `qwencli diagnose --json` prints; `machine` is the record that the findings rest on."""
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
                "why": check.why,
                "evidence": finding.evidence,
                "fix": finding.fix,
                "confidence": finding.confidence.value,
            }
            for check, finding in results
        ],
        "recommended": {**asdict(advice), "why": list(advice.why)},
        "machine": dict(machine),
    }


def text(results: Sequence[Result], advice: Advice) -> RenderableType:
    """Findings by group, each with its evidence and fix; reads well without colour.

    Several skipped checks are one line.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    said: dict[str, str] = {}
    skipped = [check.id for check, finding in results if finding.status is Status.SKIP]
    folded = len(skipped) > MOST_SKIPS_SHOWN
    shown = [found for found in results if not (folded and found[1].status is Status.SKIP)]
    for group, members in groupby(shown, key=lambda result: result[0].group):
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, min_width=max(len(check.id) for check, _ in results))
        table.add_column(overflow="fold")
        for check, finding in members:
            finding = replace(finding, fix=_unsaid(finding.fix, check.id, said))
            label = Text(finding.status.value.upper(), style=_STYLE[finding.status])
            table.add_row(label, check.id, _body(finding))
        parts += [Text(group, style="bold"), table, Text()]
    if folded:
        checks = counted(len(skipped), "check does", "checks do")
        line = f"SKIP {checks} not apply here: {', '.join(skipped)}"
        parts += [Text(f"{line} (--json has the reason of each)", style="dim"), Text()]
    parts += [Text("recommended", style="bold"), Text(settings_line(advice))]
    parts += [Text(line, style="dim") for line in advice.why]
    return Group(*parts, Text(), *map(Text, _to_do(results)), Text(summary_line(results)))


def _unsaid(fix: str, check: str, said: dict[str, str]) -> str:
    """The fix, each line that an earlier check has `said` replaced by that check's name."""
    lines = [
        line if (first := said.setdefault(line, check)) == check else f"as for {first}"
        for line in fix.splitlines()
    ]
    return "\n".join(dict.fromkeys(lines))


def _body(finding: Finding) -> RenderableType:
    from rich.text import Text

    body = Text(finding.what, style="dim" if finding.status is Status.SKIP else "")
    if finding.evidence:
        body.append(f"\n{finding.evidence}", style="dim")
    if finding.status in (Status.WARN, Status.FAIL):
        body.append(f"\nfix: {finding.fix} (confidence: {finding.confidence.value})")
    return body


def settings_line(advice: Advice) -> str:
    """Settings and expectations on one line."""
    parts = [
        f"{name} {value}" for name in _SETTINGS if (value := getattr(advice, name)) is not None
    ]
    if advice.vram_bytes is not None:
        parts.append(f"{advice.vram_bytes / 1e9:.1f} GB VRAM")
    if advice.expected_tok_per_s is not None:
        parts.append(f"about {advice.expected_tok_per_s:.0f} tok/s")
    elif advice.limit_tok_per_s is not None:
        parts.append(f"at most {advice.limit_tok_per_s:.0f} tok/s")
    return ", ".join(parts)


def _to_do(results: Sequence[Result]) -> list[str]:
    """What failed, once more at the end, where it is seen first."""
    return [
        f"{finding.status.value.upper()} {check.id}: {finding.what}"
        for check, finding in results
        if finding.status is Status.FAIL
    ]


def summary_line(results: Sequence[Result]) -> str:
    counts = Counter(finding.status for _, finding in results)
    parts = [f"{counts[status]} {status.value}" for status in Status if counts[status]]
    return f"{verdict(results).value.upper()}: {', '.join(parts)}"


def markdown(
    results: Sequence[Result], advice: Advice, machine: Mapping[str, Any], version: str
) -> str:
    """The page that `--report` writes, before it is redacted."""
    lines = [f"# qwencli {version} diagnose: {summary_line(results)}", ""]
    said: dict[str, str] = {}
    for status in (Status.FAIL, Status.WARN, Status.PASS, Status.SKIP):
        found = [(check, finding) for check, finding in results if finding.status is status]
        if not found:
            continue
        lines += [f"## {status.value.upper()}", ""]
        for check, finding in found:
            lines.append(f"- **{check.id}**: {finding.what}")
            lines += [f"  - {line}" for line in finding.evidence.splitlines()]
            sure = finding.confidence.value
            fix = _unsaid(finding.fix, check.id, said)
            lines += [f"  - fix ({sure}): {line}" for line in fix.splitlines()]
        lines.append("")
    lines += ["## Recommended", "", settings_line(advice), "", *(f"- {why}" for why in advice.why)]
    record = json.dumps(dict(machine), indent=1, ensure_ascii=False)
    read = ["", "<details><summary>What was read</summary>", "", "```json", record, "```", ""]
    return markdown_page(lines) + "\n".join([*read, "</details>", ""])
