"""The index of results: what is measured where, for which question, and who names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "tools" / "docs"


@pytest.fixture
def index(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import results_index

    return results_index


def test_a_folder_is_named_by_its_whole_name_only(index, tmp_path):
    page, code = tmp_path / "page.md", tmp_path / "code.py"
    page.write_text("`results/2026-01-01-a-b/` and 2026-01-01-a-b/x.csv", encoding="utf-8")
    code.write_text("# 2026-01-01-a.", encoding="utf-8")
    names = ["2026-01-01-a", "2026-01-01-a-b", "2026-01-01-c"]
    found = index.citations(names, iter([page, code]))
    assert found == {"2026-01-01-a-b": [page], "2026-01-01-a": [code]}


def test_the_machine_is_read_from_the_environment_then_from_the_name(index, tmp_path):
    folder = tmp_path / "2026-01-01-h100-x"
    folder.mkdir()
    assert index.machine(folder) == "NVIDIA H100"
    about = {"device": {"name": None}, "cpu": {"model": "A processor"}}
    (folder / "environment.json").write_text(json.dumps(about), encoding="utf-8")
    assert index.machine(folder) == "A processor (CPU)"


def test_rows_that_are_gone_are_said_to_be(index, tmp_path):
    assert index.rows_kept(tmp_path) == ""
    (tmp_path / "runs.csv").touch()
    assert index.rows_kept(tmp_path) == "summary"
    (tmp_path / "gpu.csv.gz").touch()
    assert index.rows_kept(tmp_path) == "summary, gpu.csv"
    (tmp_path / "tokens.csv.gz").touch()
    assert index.rows_kept(tmp_path) == "all"


def test_what_nothing_names_is_an_error(index, tmp_path, monkeypatch):
    (tmp_path / "2026-01-01-unnamed").mkdir()
    monkeypatch.setattr(index, "RESULTS", tmp_path)
    monkeypatch.setattr(index, "citing", lambda: iter(()))
    with pytest.raises(SystemExit, match="2026-01-01-unnamed is named nowhere"):
        index.render()
