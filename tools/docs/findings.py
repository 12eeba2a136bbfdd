"""Writes docs/findings.md, its plots and its tables from the studies in results/; `--check` fails
when one is stale.

The page has the verdicts; what they rest on is in docs/findings/*.csv, a table each. Every figure
comes from a study's rows. The study of a GPU stands before that of a CPU.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import campaigns
from plots import effects_plot, runs_plot

from qwencli.bench.report.explain import explain_campaign
from qwencli.bench.report.explain_rules import DIFFER
from qwencli.bench.report.tables import ORIGIN_MODES
from qwencli.bench.run.campaign import ENVIRONMENT
from qwencli.bench.statistics.robust import UNSTABLE_RATIO
from qwencli.bench.studies import origin_tables
from qwencli.bench.studies.claim_file import ALL, Study, choose
from qwencli.bench.studies.origin_tables import kept_modes, series
from qwencli.bench.studies.study_evidence import Evidence
from qwencli.bench.studies.study_plan import STUDY
from qwencli.bench.studies.study_report import effect_words
from qwencli.bench.studies.verdicts import ClaimVerdict, Finding, Verdict

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PAGE = ROOT / "docs" / "findings.md"
PLOTS = ROOT / "docs" / "findings"
# The machine of the origin's own rows.
ORIGIN = "RTX 5090"

Found = list[tuple[Evidence, dict[str, ClaimVerdict]]]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                     for line in lines)  # fmt: skip


def studies() -> list[Evidence]:
    """The newest study of each kind of GPU in results/, the newest first, then that of a CPU."""
    newest: dict[str | None, Evidence] = {}
    for evidence in _all_studies():
        if not _is_addition(evidence):
            newest.setdefault(environment(evidence)["device"]["name"], evidence)
    return sorted(
        newest.values(), key=lambda evidence: environment(evidence)["device"]["name"] is None
    )


def _all_studies() -> list[Evidence]:
    paths = [*RESULTS.glob(f"*/{STUDY}"), *RESULTS.glob(f"*/*/{STUDY}")]
    return [Evidence(path.parent) for path in sorted(paths, reverse=True)]


def _is_addition(evidence: Evidence) -> bool:
    """Whether it is of a few claims that an earlier study could not run."""
    return 2 * len(evidence.document["claims"]) < len(choose([ALL]))


def verdicts(evidence: Evidence) -> dict[str, ClaimVerdict]:
    """Those of a study, and of additions on the same kind of machine where it could not run."""
    found = {claim.study.claim: claim for claim in evidence.verdicts()}
    for added in _all_studies():
        if _is_addition(added) and machine(added) == machine(evidence):
            for claim in added.verdicts():
                if found[claim.study.claim].verdict is Verdict.CANNOT_RUN:
                    found[claim.study.claim] = claim
    return found


def environment(evidence: Evidence) -> dict[str, Any]:
    """Device, processor and versions that a study was made with."""
    return campaigns.document(evidence.folder, ENVIRONMENT)


def machine(evidence: Evidence) -> str:
    """The machine of a study, in a few words."""
    device = environment(evidence)["device"]
    return str(device["name"] or f"{environment(evidence)['cpu']['model']} (CPU)")


def source(evidence: Evidence) -> str:
    """Where a study's figures come from."""
    document, versions = evidence.document, environment(evidence)["versions"]
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


def _claim_row(study: Study, found: Found) -> list[str]:
    """A claim's verdict, the test that has most to do with it, and what other machines say."""
    best = settled(study.claim, found)
    if best is None:
        looked = next((v[study.claim] for _, v in found if study.claim in v), None)
        reason = _short(looked.reason) if looked else "not measured yet"
        return [study.claim, study.title, f"**{Verdict.CANNOT_RUN}**", reason, "-"]
    evidence, claim = best
    others = [
        f"{verdicts[study.claim].verdict} ({_card(other)})"
        for other, verdicts in found
        if study.claim in verdicts
        and verdicts[study.claim].verdict not in (claim.verdict, Verdict.CANNOT_RUN)
    ]
    decisive = next((f for f in claim.findings if f.verdict is claim.verdict), claim.findings[0])
    apart = [f for f in claim.findings if f.verdict is not claim.verdict and f.effect]
    measured = "; ".join(
        [_effect(decisive), *(f"{other.verdict}: {_effect(other)}" for other in apart)]
    )
    verdict = f"**{claim.verdict}** ({_card(evidence)})"
    return [study.claim, study.title, verdict, measured, "; ".join(others) or "-"]


def _effect(finding: Finding) -> str:
    effect = finding.effect
    if effect is None:
        return finding.reason
    return f"{finding.test.says}: {effect.estimate:.3g} ({effect.low:.3g} to {effect.high:.3g})"


def _short(reason: str) -> str:
    """A reason without the advice in brackets that an error may end in."""
    return reason.split(" (")[0]


def _card(evidence: Evidence) -> str:
    """A machine in one word."""
    name = environment(evidence)["device"]["name"]
    return str(name).removeprefix("NVIDIA ").split()[0] if name else "CPU"


def _ranking(evidence: Evidence) -> str:
    ranked = origin_tables.factors(evidence)
    certain = [factor for factor in ranked if factor.slowdown.low > 1]
    enough = [f for f in certain if f.slowdown.estimate >= origin_tables.ORIGIN_RATIO]
    names = ", ".join(f"`{f.name}` {f.slowdown.estimate:.2f}x ({f.engine})" for f in certain)
    alone = ", ".join(f"`{factor.name}` ({factor.engine})" for factor in enough)
    return (
        f"- **{machine(evidence)}**: {len(certain)} of {len(ranked)} factors make `generate()` "
        f"slower beyond their noise: {names or 'none'}. "
        + (f"Enough for 2.76 times alone: {alone}." if enough else "None is 2.76 times alone.")
    )


def details(found: Found) -> dict[Path, str]:
    """The tables behind the page, a CSV each, with a column for the machine."""
    tables: dict[str, list[list[str]]] = {}

    def add(name: str, where: str, table: origin_tables.Table) -> None:
        head, rows = table
        file = tables.setdefault(name, [["machine", *head]])
        for row in rows:
            origin = row[0].startswith("origin")  # stands in the table of every machine
            made = [ORIGIN if origin else where, *row]
            if not (origin and made in file):
                file.append(made)

    for evidence, verdicts in found:
        where = machine(evidence)
        add("factors", where, origin_tables.factor_table(evidence))
        add("claims", where, _test_table(verdicts))
        add("modes", where, origin_tables.mode_table(kept_modes(evidence)))
        add("steadiness", where, origin_tables.steadiness_table(series(evidence)))
        add("runs", where, origin_tables.run_table(series(evidence)))
        add("first-tokens", where, origin_tables.stall_table(evidence))
    folder = campaigns.newest_of_gpu("engines")
    if folder is not None:
        more = f"{_gpu(folder)}, {folder.name}"
        add("steadiness", more, origin_tables.steadiness_table(campaigns.series(folder)))
        add("runs", more, origin_tables.run_table(campaigns.series(folder)))
    folder = campaigns.newest_of_gpu("origin")
    if folder is not None:
        more = f"{_gpu(folder)}, {folder.name}"
        add("modes", more, _campaign_modes(folder))
    folder = campaigns.newest_of_gpu("modes")
    if folder is not None:
        said = [[cell, *words] for cell, lines in _explained(folder).items() for words in lines]
        add("explained-modes", _gpu(folder), (["cell", "finding", "figure"], said))
    return {PLOTS / f"{name}.csv": _csv(rows) for name, rows in tables.items()}


def _csv(rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _gpu(folder: Path) -> str:
    return str(campaigns.document(folder, ENVIRONMENT)["device"]["name"])


def _test_table(verdicts: dict[str, ClaimVerdict]) -> origin_tables.Table:
    """A row a claim, and one for each of its tests."""
    rows = []
    for name, claim in verdicts.items():
        rows.append([name, claim.study.title, claim.verdict, claim.reason, ""])
        for finding in claim.findings:
            said = effect_words(finding)
            row = [name, finding.test.says, finding.verdict, finding.reason]
            rows.append([*row, "" if said == "-" else said])
    return ["claim", "says", "verdict", "reason", "measured"], rows


def _explained(folder: Path) -> dict[str, list[list[str]]]:
    """What `qwencli diagnose explain` says of each cell of a campaign: finding and figure."""
    said: dict[str, list[list[str]]] = {}
    for one in explain_campaign(folder):
        if one.cell is not None:
            said.setdefault(one.cell, []).append([one.what, one.figure])
    return said


def page(found: Found) -> str:
    """The whole of docs/findings.md."""
    claims = choose([ALL])
    best = [settled(study.claim, found) for study in claims]
    counts = [one[1].verdict if one else Verdict.CANNOT_RUN for one in best]
    tally = {verdict: sum(verdict is one for one in counts) for verdict in Verdict}
    first = found[0][0]
    head = ["claim", "what it says", "verdict", "effect (95 % interval)", "other machines"]
    lines = [
        "# Findings",
        "",
        "What became of the measurements and claims that this project started from: a node pack "
        "whose identical runs differed 2.76 times on an RTX 5090, and whose cause was never found. "
        "Generated by `python tools/docs/findings.py` from the studies in "
        "[results](../results/README.md); the rules are in [bench](bench.md#studies).",
        "",
        "## What makes identical runs differ",
        "",
        *(_ranking(evidence) for evidence, _ in found),
        "",
        f"![time with each factor over time without it](findings/effects-{first.folder.name}.svg)",
        "",
        source(first),
        "",
        *_undisturbed(),
        "## The claims",
        "",
        f"{', '.join(f'{n} {verdict}' for verdict, n in tally.items())}. The verdict is that of "
        "the first machine on which a claim could run. An effect above 1 is as claimed; shown are "
        "the test that decided, and those that came out otherwise.",
        "",
        markdown(head, [_claim_row(study, found) for study in claims]),
        "",
        *_missing(claims, found),
        "## The origin's tables, made again",
        "",
        *_modes(first),
        markdown(*origin_tables.steadiness_table(series(first))),
        "",
        f"{source(first)} tok/s is tokens over the time of the whole `generate()`, as in the "
        "origin; runs of a series were made in turns with other conditions.",
        "",
        "## Details",
        "",
        *_listed(found),
    ]
    return "\n".join(lines) + "\n"


def _modes(evidence: Evidence) -> list[str]:
    """The origin's modes in a study; what it lacks from a campaign, with what stood beside it."""
    folder = campaigns.newest_of_gpu("origin")
    elsewhere = {} if folder is None else campaigns.kept_modes(folder)
    lines = [markdown(*origin_tables.mode_table(kept_modes(evidence), elsewhere)), ""]
    if folder is not None:
        lines += [markdown(*_campaign_modes(folder)), "", campaigns.source(folder), ""]
    return lines


def _campaign_modes(folder: Path) -> origin_tables.Table:
    """The modes that a campaign has; it is for some of them, so that the others are no gaps."""
    everything = {("transformers", *mode) for mode in ORIGIN_MODES}
    return origin_tables.mode_table(campaigns.kept_modes(folder), everything)


def _listed(found: Found) -> list[str]:
    """Links to what the page leaves out, all machines in each file."""
    about = {
        "claims": "every test of every claim, with its values",
        "factors": "what each factor costs",
        "modes": "speed by mode, beside the origin's",
        "steadiness": "both engines, kept and loaded anew",
        "runs": "run after run, with the clock before and during it",
        "first-tokens": "the first token and the others, run by run",
        "explained-modes": "what `qwencli diagnose explain` says of each mode",
    }
    lines = [f"- [{name}.csv](findings/{name}.csv): {what}" for name, what in about.items()]
    for evidence, _ in found:
        name = evidence.folder.name
        lines.append(
            f"- {machine(evidence)}: [effects](findings/effects-{name}.svg), "
            f"[runs](findings/runs-{name}.svg), `results/{name}/` ({evidence.document['runs']} "
            "rounds)"
        )
    folder = campaigns.newest_of_gpu("engines")
    if folder is not None:
        lines.append(f"- More runs of both engines: {campaigns.source(folder)}")
    return lines


def _undisturbed() -> list[str]:
    """Modes whose runs differ although nothing was done to them, and what is said of most."""
    folder = campaigns.newest_of_gpu("modes")
    if folder is None:
        return []
    said = _explained(folder)
    apart = {c: lines for c, lines in said.items() if any(w.startswith(DIFFER) for w, _ in lines)}
    common = Counter(
        what for lines in apart.values() for what in {w for w, _ in lines} if "because" in what
    )
    engines = sorted({cell.split()[0] for cell in apart})
    return [
        "### With nothing done to them",
        "",
        f"{len(apart)} of {len(said)} modes in one campaign have runs that differ more than "
        f"{UNSTABLE_RATIO:g} times, all of them of {' and '.join(engines)}. "
        "What `qwencli diagnose explain` finds in them:",
        "",
        *(f"- {what}: {n} of {len(apart)}" for what, n in common.items() if 2 * n > len(apart)),
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
    return [
        "## What other machines have to settle",
        "",
        *(
            f"- {study.claim}: needs {', '.join([*study.needs, *study.about]) or 'to be run'}"
            for study in open_claims
        ),
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
    found: Found = [(evidence, verdicts(evidence)) for evidence in studies()]
    written = {PAGE: page(found), **details(found)}
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
    unknown = [path for path in PLOTS.iterdir() if path not in fresh]
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
