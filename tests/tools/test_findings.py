"""The generated page: from the studies that are kept, and nothing typed."""

from __future__ import annotations

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


def test_every_claim_has_its_verdict_and_every_study_its_plots(findings):
    files = findings.files()
    page = files[findings.PAGE]
    for claim in names():
        assert page.count(f"- **{claim}** ") == 1
    for evidence in findings.studies():
        for kind in ("effects", "runs"):
            path = findings.PLOTS / f"{kind}-{evidence.folder.name}.svg"
            assert f"findings/{path.name}" in page
            ElementTree.fromstring(files[path])  # whole and well formed


def test_what_no_machine_has_settled_is_named_with_its_command(findings):
    page = findings.files()[findings.PAGE]
    open_claims = page.split("## What other machines have to settle")[1].split("\n## ")[0]
    command = open_claims.split("--claims ")[1].split()[0].split(",")
    assert set(command) == {line[2:5] for line in open_claims.splitlines() if line[:3] == "- C"}
    assert {"C23", "C24", "C25"} <= set(command)


def test_a_study_of_a_gpu_comes_first(findings):
    kinds = [study.environment["device"]["name"] is None for study in findings.studies()]
    assert kinds == sorted(kinds)
