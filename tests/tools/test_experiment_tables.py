"""Tables of experiments: made of result files, and a page whose figures differ is stale."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "docs")
    import experiment_tables

    return experiment_tables


def test_pages_are_as_their_files_say(tables):
    marked = 0
    for page in tables.FOLDER.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert tables.render(text) == text, f"{page.name} is stale"
        assert text.count("<!-- table:") == len(tables.MARK.findall(text)), page.name
        marked += text.count("<!-- table:")
    assert marked


def test_a_figure_typed_by_hand_goes(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    modes = [{"mode": "none", "steps": {"1": {"tok_per_s": 10.04}, "lone": {"tok_per_s": 9.0}}}]
    (tmp_path / "results" / "a.json").write_text(json.dumps({"model": "m", "modes": modes}))
    page = "Text.\n\n<!-- table: rows-step results a.json -->\n| 99.9 |\n<!-- end -->\n\nMore.\n"
    made = tables.render(page)
    assert "| m | bf16 | 10.0 |" in made and "99.9" not in made
    assert re.fullmatch(r"Text\.\n\n<!-- .*<!-- end -->\n\nMore\.\n", made, re.DOTALL)
    assert tables.render(made) == made
