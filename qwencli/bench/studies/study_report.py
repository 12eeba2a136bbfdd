"""verdicts.csv and report.md of a study, and the same as a table for the terminal."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.bench.storage.json_documents import Rule, check_document, is_count, read_environment
from qwencli.bench.storage.row_file import replace_file, write_rows
from qwencli.bench.studies.claim_file import ALL, choose
from qwencli.bench.studies.metrics import WORDS
from qwencli.bench.studies.study_evidence import Evidence
from qwencli.bench.studies.study_plan import STUDY
from qwencli.bench.studies.verdicts import ClaimVerdict, Finding, Verdict
from qwencli.errors import OutputError
from qwencli.output import counted, markdown_page

if TYPE_CHECKING:
    from rich.console import RenderableType


VERDICTS, REPORT = "verdicts.csv", "report.md"
# `part` 0 is the claim itself, the parts from 1 on its tests. `effect` is turned so that above 1 is
# as claimed; `value` and `against_value` are the statistics as measured.
COLUMNS = (
    "claim", "part", "verdict", "says", "reason", "metric", "statistic", "expect", "by",
    "arm", "against", "value", "against_value", "effect", "effect_low", "effect_high",
    "n", "n_against", "evidence", "evidence_against",
)  # fmt: skip
# What the page says of study.json beside what verdicts need (see `evidence`).
_RULES: tuple[Rule, ...] = (
    ("runs", is_count, "a whole number from 1"),
    ("seed", lambda value: isinstance(value, int), "a whole number"),
)
STYLES = {
    Verdict.SUPPORTED: "green",
    Verdict.REFUTED: "red",
    Verdict.NOT_REPRODUCED: "yellow",
    Verdict.CANNOT_RUN: "dim",
}
# Raw rows, plans and reports. Logs stay: what libraries print is not ours to vouch for.
_KINDS = (".csv", ".json", ".md")


def build_study_report(folder: Path) -> list[ClaimVerdict]:
    """Write verdicts.csv and report.md from the rows of a study; returns the verdicts.

    Raises:
        BenchError: the folder holds no study.
        OutputError: a file cannot be written.
    """
    evidence = Evidence(folder)
    found = evidence.verdicts()
    write_rows(folder / VERDICTS, COLUMNS, verdict_rows(evidence, found))
    replace_file(folder / REPORT, markdown(evidence, found).encode())
    return found


def verdict_rows(evidence: Evidence, found: Sequence[ClaimVerdict]) -> list[dict[str, Any]]:
    """The rows of verdicts.csv."""
    rows: list[dict[str, Any]] = []
    for claim in found:
        head = {"claim": claim.study.claim, "part": 0, "says": claim.study.title}
        rows.append({**head, "verdict": claim.verdict, "reason": claim.reason})
        for part, finding in enumerate(claim.findings, start=1):
            rows.append({**head, "part": part, **_finding_row(evidence, claim, finding)})
    return rows


def _finding_row(evidence: Evidence, claim: ClaimVerdict, finding: Finding) -> dict[str, Any]:
    test, effect = finding.test, finding.effect
    arms = isinstance(test.against, str)
    return {
        "verdict": finding.verdict,
        "says": test.says,
        "reason": finding.reason,
        "metric": test.metric,
        "statistic": test.statistic,
        "expect": test.expect,
        "by": test.by,
        "arm": test.arm,
        "against": test.against,
        "value": finding.value,
        "against_value": finding.against_value,
        "effect": effect and effect.estimate,
        "effect_low": effect and effect.low,
        "effect_high": effect and effect.high,
        "n": finding.n or None,
        "n_against": finding.n_against or None,
        "evidence": evidence.evidence_of(claim.study, test.arm) if effect else None,
        "evidence_against": (
            evidence.evidence_of(claim.study, str(test.against)) if effect and arms else None
        ),
    }


def effect_words(finding: Finding) -> str:
    """The measured effect in words: value against value, ratio, interval and n."""
    effect, test = finding.effect, finding.test
    if effect is None or finding.value is None or finding.against_value is None:
        return "-"
    n = f"{finding.n}" if finding.n_against is None else f"{finding.n}+{finding.n_against}"
    what = "max/min of " if test.statistic == "spread" else ""
    return (
        f"{what}{WORDS.get(test.metric, test.metric)}: {finding.value:.4g} against "
        f"{finding.against_value:.4g}, effect {effect.estimate:.3g} "
        f"({effect.low:.3g} to {effect.high:.3g}), n {n}"
    )


def markdown(evidence: Evidence, found: Sequence[ClaimVerdict]) -> str:
    """The study as a Markdown page."""
    environment, document = read_environment(evidence.folder), evidence.document
    check_document(evidence.folder / STUDY, document, _RULES)
    device, versions = environment["device"], environment["versions"]
    where = device["name"] or environment["cpu"]["model"] or "an unnamed processor"
    lines = [
        "# Study",
        "",
        f"On {where} ({device['device']}), torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {document['model']}, {document['max_new_tokens']} new tokens,"
        f" {counted(document['runs'], 'round')}, seed {document['seed']}. An effect above 1 is "
        "as claimed; intervals are 95 %.",
        "",
        "| claim | verdict | what was measured |",
        "| --- | --- | --- |",
    ]
    for claim in found:
        lines.append(
            f"| {claim.study.claim} {claim.study.title} | {claim.verdict} | {claim.reason} |"
        )
        for finding in claim.findings:
            lines.append(f"| - {finding.test.says} | {finding.verdict} | {_measured(finding)} |")
    return markdown_page(line.replace("\n", " ") for line in lines)


def _measured(finding: Finding) -> str:
    words = effect_words(finding)
    return finding.reason if words == "-" else f"{words}; {finding.reason}"


def terminal_table(found: Sequence[ClaimVerdict]) -> RenderableType:
    """The verdicts for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title=counted(len(found), "claim"), title_justify="left")
    for name in ("claim", "verdict", "why"):
        table.add_column(name, overflow="fold")
    for claim in found:
        style = STYLES[claim.verdict]
        table.add_row(claim.study.claim, Text(claim.verdict, style=style), claim.reason)
    counts = {v: sum(claim.verdict is v for claim in found) for v in Verdict}
    line = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    return Group(table, Text(line))


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


def share(folder: Path, redact: Callable[[str], str]) -> Path:
    """Write FOLDER.zip beside the folder, every text through `redact`; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    archive = folder.with_name(folder.name + ".zip")
    files = sorted(path for path in folder.rglob("*") if path.suffix in _KINDS)
    try:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for path in files:
                name = Path(folder.name) / path.relative_to(folder)
                text = redact(path.read_text(encoding="utf-8"))
                # A date of its own would tell nothing, and make equal archives differ.
                target.writestr(zipfile.ZipInfo(name.as_posix()), text, zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise OutputError(
            f"{archive} cannot be written: {error.strerror or error}", "free some space"
        ) from error
    return archive
