"""README and measurements: tables and picture from results, and what `.ci/run` looks for."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "docs")
    import readme_tables

    return readme_tables


def test_readme_is_short_and_has_its_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    for marker, said in (("<!-- caption -->", "qwencli caption"), ("<!-- test -->", "pytest")):
        at = lines.index(marker)
        assert lines[at + 1] == "```sh" and said in lines[at + 2] and lines[at + 3] == "```"


def test_every_marker_is_of_a_table_that_is_made(tables):
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"<!-- table: ([\w-]+) -->", text)
        assert names and set(names) <= set(tables.TABLES)
        assert text.count("<!-- end -->") == len(names)


def test_every_table_names_the_files_it_is_from(tables):
    for name, table in tables.TABLES.items():
        found = re.findall(r"`(results/[^`]+)`", table())
        assert found, name
        assert all((ROOT / path).exists() for path in found)


def test_predicted_speeds_lie_in_their_range(tables):
    figures = re.findall(r"(\d+) \((\d+)-(\d+)\)", tables.your_gpu())
    assert figures
    assert all(int(low) <= int(expected) <= int(high) for expected, low, high in figures)


def test_bars_are_as_long_as_their_speeds(tables):
    bars = [("<slow>", 10.0, False), ("fast", 40.0, True)]
    drawn = ElementTree.fromstring(tables.speed_plot(b"png", "A & B.", bars, "somewhere"))
    widths = [float(e.get("width")) for e in drawn.iter() if e.get("height") == "22"]
    assert widths[1] == pytest.approx(4 * widths[0], abs=0.2)
    assert {"<slow>", "fast", "A & B."} <= {element.text for element in drawn.iter()}
