"""The generated page: from the studies that are kept, and nothing typed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qwencli.bench.studies.claim_file import names

DOCS = Path(__file__).parents[2] / "tools" / "docs"


@pytest.fixture(scope="module")
def findings():
    sys.path.insert(0, str(DOCS))
    try:
        import findings

        yield findings
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def files(findings):
    return findings.files()


def test_every_claim_has_its_verdict_and_every_study_its_plots(findings, files):
    page = files[findings.PAGE]
    for claim in names():
        assert page.count(f"\n| {claim} | ") == 1
    for evidence in findings.studies():
        for kind in ("effects", "runs"):
            path = findings.PLOTS / f"{kind}-{evidence.folder.name}.svg"
            assert f"findings/{path.name}" in page
            ElementTree.fromstring(files[path])  # whole and well formed
            assert "generate()" in files[path], "of which time or speed it is"


def test_what_the_page_leaves_out_is_in_tables_that_it_links(findings, files):
    tables = {path: text for path, text in files.items() if path.suffix == ".csv"}
    for path, text in tables.items():
        head, *rows = csv.reader(text.splitlines())
        assert head[0] == "machine" and rows
        assert {len(row) for row in rows} == {len(head)}
        assert f"(findings/{path.name})" in files[findings.PAGE]
    claims = list(csv.DictReader(tables[findings.PLOTS / "claims.csv"].splitlines()))
    for evidence in findings.studies():
        here = [row for row in claims if row["machine"] == findings.machine(evidence)]
        assert len(here) == sum(
            1 + len(claim.findings) for claim in findings.verdicts(evidence).values()
        )
    # A claim that could run shows the verdict of the first machine and what others say.
    (line,) = [line for line in files[findings.PAGE].splitlines() if line.startswith("| C11 ")]
    first = next(row for row in claims if row["claim"] == "C11")
    assert f"**{first['verdict']}**" in line


def test_what_no_machine_has_settled_is_named_with_its_command(findings, files):
    page = files[findings.PAGE]
    open_claims = page.split("## What other machines have to settle")[1].split("\n## ")[0]
    command = open_claims.split("--claims ")[1].split()[0].split(",")
    assert set(command) == {line[2:5] for line in open_claims.splitlines() if line[:3] == "- C"}
    assert {"C23", "C24", "C25"} <= set(command)


def test_a_study_of_a_gpu_comes_first(findings):
    kinds = [findings.environment(study)["device"]["name"] is None for study in findings.studies()]
    assert kinds == sorted(kinds)
