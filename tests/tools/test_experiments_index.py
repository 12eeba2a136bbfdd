"""The index of experiments: from the heads of their pages, and nothing typed."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "tools" / "docs"
PAGE = """# A title

- **Date**: 2026-01-02
- **Question**: Is it?
- **Prediction**: Yes.
- **Outcome**: No.

More, from `results/2026-01-01-somewhere/cells.csv` and `results/2026-01-01-somewhere/`.
"""


@pytest.fixture
def index(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import experiments_index

    return experiments_index


def test_a_row_has_the_head_and_each_folder_of_results_once(index, tmp_path):
    (tmp_path / "2026-01-02-it.md").write_text(PAGE, encoding="utf-8")
    assert index.render(tmp_path).splitlines()[-1] == (
        "| 2026-01-02 | [A title](2026-01-02-it.md): Is it? | Yes. | No. "
        "| [2026-01-01-somewhere](../../results/2026-01-01-somewhere/) |"
    )


def test_the_newest_come_first(index, tmp_path):
    for date in ("2026-01-02", "2026-01-03"):
        (tmp_path / f"{date}-it.md").write_text(PAGE.replace("2026-01-02", date), encoding="utf-8")
    assert [one.date for one in index.experiments(tmp_path)] == ["2026-01-03", "2026-01-02"]


@pytest.mark.parametrize(
    ("old", "new"), [("- **Outcome**: No.\n", ""), ("2026-01-02", "2026-02-02"), ("# A", "A")]
)
def test_a_head_that_lacks_something_or_has_another_date_is_named(index, tmp_path, old, new):
    page = tmp_path / "2026-01-02-it.md"
    page.write_text(PAGE.replace(old, new), encoding="utf-8")
    with pytest.raises(SystemExit, match=page.name):
        index.render(tmp_path)
