"""Writes docs/findings.md and its plots from the studies in results/; `--check` fails when stale.

Every figure on the page comes from a study's rows. The study of a GPU stands before that of a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import campaigns
from plots import effects_plot, runs_plot

from qwencli.bench.cell_words import DIFFER
from qwencli.bench.explain import explain_campaign
from qwencli.bench.stats import UNSTABLE_RATIO
from qwencli.bench.studies import origin_tables
from qwencli.bench.studies.claim_file import ALL, Study, choose
from qwencli.bench.studies.evidence import Evidence
from qwencli.bench.studies.origin_tables import series
from qwencli.bench.studies.report import effect_words
from qwencli.bench.studies.session import STUDY
from qwencli.bench.studies.verdicts import ClaimVerdict, Verdict

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PAGE = ROOT / "docs" / "findings.md"
PLOTS = ROOT / "docs" / "findings"

Found = list[tuple[Evidence, dict[str, ClaimVerdict]]]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                     for line in lines)  # fmt: skip


def studies() -> list[Evidence]:
    """The newest study of each kind of GPU in results/, the newest first, then that of a CPU."""
    newest: dict[str | None, Evidence] = {}
    for path in sorted(RESULTS.glob(f"*/{STUDY}"), reverse=True):
        evidence = Evidence(path.parent)
        newest.setdefault(evidence.environment["device"]["name"], evidence)
    return sorted(
        newest.values(), key=lambda evidence: evidence.environment["device"]["name"] is None
    )


def machine(evidence: Evidence) -> str:
    """The machine of a study, in a few words."""
    device = evidence.environment["device"]
    return str(device["name"] or f"{evidence.environment['cpu']['model']} (CPU)")


def source(evidence: Evidence) -> str:
    """Where a study's figures come from."""
    document, versions = evidence.document, evidence.environment["versions"]
    weights = ", random weights" if document["load_format"] == "dummy" else ""
    return (
        f"{machine(evidence)}, {document['model']}{weights}, {document['max_new_tokens']} new "
        f"tokens, {document['runs']} rounds, torch {versions['torch']}, transformers "
        f"{versions['transformers']}. From `results/{evidence.folder.name}/`."
    )


def settled(claim: str, found: Found) -> tuple[Evidence, ClaimVerdict] | None:
    """The first study in which the claim could run."""
    for evidence, verdicts in found:
        if claim in verdicts and verdicts[claim].verdict is not Verdict.CANNOT_RUN:
            return evidence, verdicts[claim]
    return None


def _verdict_lines(study: Study, found: Found) -> list[str]:
    """The row of a claim, and one for each of its tests."""
    on = [
        f"{verdicts[study.claim].verdict} ({machine(evidence)})"
        for evidence, verdicts in found
        if study.claim in verdicts
    ]
    best = settled(study.claim, found)
    claim = next((v[study.claim] for _, v in found if study.claim in v), None)
    claim = best[1] if best else claim
    if claim is None:
        return [f"- **{study.claim}** {study.title}: not measured yet."]
    lines = [f"- **{study.claim}** {study.title}: **{claim.verdict}**. {_sentence(claim)}"]
    if len({verdict.split(" (")[0] for verdict in on}) > 1:
        lines[0] += f" By machine: {'; '.join(on)}."
    for finding in claim.findings:
        words = effect_words(finding)
        said = finding.reason if words == "-" else f"{words}"
        lines.append(f"    - {finding.test.says}: {finding.verdict} - {said}")
    return lines


def _sentence(claim: ClaimVerdict) -> str:
    # What begins with a name keeps it: device_map, vLLM.
    first = claim.reason.split(maxsplit=1)[0].rstrip(",:")
    plain = first.isalpha() and first.islower()
    text = claim.reason[:1].upper() + claim.reason[1:] if plain else claim.reason
    return text if text.endswith(".") else f"{text}."


def _ranking(evidence: Evidence) -> list[str]:
    ranked = origin_tables.factors(evidence)
    certain = [factor for factor in ranked if factor.slowdown.low > 1]
    enough = [f for f in certain if f.slowdown.estimate >= origin_tables.ORIGIN_RATIO]
    names = ", ".join(f"`{f.name}` ({f.slowdown.estimate:.2f}x, {f.engine})" for f in certain)
    alone = ", ".join(f"`{factor.name}`" for factor in enough)
    return [
        f"On {machine(evidence)}: {len(certain)} of {len(ranked)} factors make `generate()` "
        f"slower beyond their noise: {names or 'none'}. "
        + (f"Enough for 2.76 times alone: {alone}." if enough else "None is 2.76 times alone."),
        "",
        f"![effects](findings/effects-{evidence.folder.name}.svg)",
        "",
        markdown(*origin_tables.factor_table(evidence)),
        "",
        "A share of 100% is the origin's whole ratio, on a logarithmic scale; shares of factors "
        f"that act together add up. {source(evidence)}",
    ]


_TABLES: tuple[tuple[str, Callable[[Evidence], Any]], ...] = (
    ("Speed by mode", origin_tables.mode_table),
    ("Steadiness of both engines", lambda e: origin_tables.steadiness_table(series(e))),
    ("Run after run", lambda e: origin_tables.run_table(series(e))),
    ("The first token and the others", origin_tables.stall_table),
)


def page(found: Found) -> str:
    """The whole of docs/findings.md."""
    claims = choose([ALL])
    lines = [
        "# Findings",
        "",
        "What became of the measurements and claims that this project started from: a node pack "
        "whose identical runs differed 2.76 times on an RTX 5090, and whose cause was never found. "
        "This page is made by `tools/docs/findings.py` from the studies in `results/`; how they "
        "are made and by which rules they decide stands in [bench](bench.md).",
        "",
        "## What makes identical runs differ",
        "",
    ]
    for evidence, _ in found:
        lines += [*_ranking(evidence), ""]
    lines += _undisturbed()
    lines += ["## The claims", ""]
    best = [settled(study.claim, found) for study in claims]
    counts = [one[1].verdict if one else Verdict.CANNOT_RUN for one in best]
    tally = {verdict: sum(verdict is one for one in counts) for verdict in Verdict}
    lines += [
        f"{', '.join(f'{n} {verdict}' for verdict, n in tally.items())}.",
        "",
        "The verdict is that of the first machine in the list above on which the claim could run. "
        "An effect above 1 is as claimed; intervals are 95 %; n counts runs.",
        "",
    ]
    for study in claims:
        lines += _verdict_lines(study, found)
    lines += ["", *_missing(claims, found)]
    lines += ["## The origin's tables, made again", ""]
    for evidence, _ in found:
        lines += [f"### {machine(evidence)}", "", source(evidence), ""]
        lines += [f"![runs](findings/runs-{evidence.folder.name}.svg)", ""]
        for title, table in _TABLES:
            lines += [f"#### {title}", "", markdown(*table(evidence)), ""]
    lines += _more_runs()
    lines += [
        "tok/s is tokens over the time of the whole `generate()`, as in the origin; the first "
        "stall is the time to the first token; MHz before is the last reading before a run, "
        "during the mean within it. Runs of a series were made in turns with other conditions."
    ]
    return "\n".join(lines) + "\n"


def _more_runs() -> list[str]:
    """Both engines in the campaign that has more runs of them, where there is one of a GPU."""
    folder = campaigns.newest_of_gpu("engines")
    if folder is None:
        return []
    steady = origin_tables.steadiness_table(campaigns.series(folder))
    runs = origin_tables.run_table(campaigns.series(folder))
    return [
        "### Both engines, more runs", "", campaigns.source(folder), "",
        "#### Steadiness", "", markdown(*steady), "", "#### Run after run", "", markdown(*runs), "",
    ]  # fmt: skip


def _undisturbed() -> list[str]:
    """What is said of modes whose runs differ although nothing was done to them."""
    folder = campaigns.newest_of_gpu("modes")
    if folder is None:
        return []
    said: dict[str, list[str]] = {}
    for one in explain_campaign(folder):
        if one.cell is not None:
            said.setdefault(one.cell, []).append(f"{one.what} ({one.figure})")
    apart = {
        cell: words for cell, words in said.items() if any(w.startswith(DIFFER) for w in words)
    }
    return [
        "### With nothing done to them",
        "",
        f"{len(apart)} of {len(said)} modes in one campaign have runs that differ more than "
        f"{UNSTABLE_RATIO:g} times. What `qwencli diagnose explain` says of each:",
        "",
        *(f"- **{cell}**: {'; '.join(words)}" for cell, words in apart.items()),
        "",
        campaigns.source(folder),
        "",
    ]


def _missing(claims: Sequence[Study], found: Found) -> list[str]:
    """What other hardware has to settle, with the command."""
    open_claims = [
        study for study in claims if _is_open(study, found) or not settled(study.claim, found)
    ]
    if not open_claims:
        return []
    names = ",".join(study.claim for study in open_claims)
    lines = ["## What other machines have to settle", ""]
    for study in open_claims:
        why = [*study.needs, *study.about]
        lines.append(f"- {study.claim}: needs {', '.join(why) or 'to be run'}")
    return [
        *lines,
        "",
        "On a machine that has it, this writes one redacted archive to send back:",
        "",
        f"    qwencli bench study --claims {names} --model qwen3-vl-4b --load-format dummy --share",
        "",
    ]


def _is_open(study: Study, found: Found) -> bool:
    """Whether no machine yet was one that the claim is about."""
    looked = [evidence for evidence, verdicts in found if study.claim in verdicts]
    return all(study.claim in evidence.document["about"] for evidence in looked)


def files() -> dict[Path, str]:
    """What is to be written where."""
    found: Found = [
        (evidence, {claim.study.claim: claim for claim in evidence.verdicts()})
        for evidence in studies()
    ]
    written = {PAGE: page(found)}
    for evidence, _ in found:
        name = evidence.folder.name
        written[PLOTS / f"effects-{name}.svg"] = effects_plot(evidence)
        written[PLOTS / f"runs-{name}.svg"] = runs_plot(evidence)
    return written


def main() -> None:
    fresh = files()
    stale = [
        path
        for path, text in fresh.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    unknown = [path for path in PLOTS.glob("*.svg") if path not in fresh]
    if "--check" in sys.argv:
        if stale or unknown:
            sys.exit(f"{(stale or unknown)[0].relative_to(ROOT)} is stale: run make docs")
        return
    PLOTS.mkdir(exist_ok=True)
    for path in stale:
        path.write_text(fresh[path], encoding="utf-8")
    for path in unknown:
        path.unlink()


if __name__ == "__main__":
    main()
