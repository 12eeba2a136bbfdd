"""Relative links of all Markdown here lead to files, anchors to headings, and results are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "benchmarks", "docs", "examples", "qwencli", "results", "tests", "tools")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
RESULT = re.compile(r"results/([\w.-]*[\w-](?:/[\w./-]*\w)?)")


def pages() -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.md"))
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.md"))


def prose(text: str) -> str:
    """Without blocks of code, in which brackets mean something else."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them: a second one of a name ends in -1."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(1 for other in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other))
        found.add(f"{name}-{number}" if name in found else name)
    return found


def broken(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    wrong = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(text))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page if not path else page.parent / path
        there = target.exists()
        if not there or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", list(pages()), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_results_that_pages_name_are_there():
    named = {
        (page.relative_to(ROOT).as_posix(), name)
        for page in pages()
        for name in RESULT.findall(page.read_text(encoding="utf-8"))
    }
    assert [
        (page, name) for page, name in sorted(named) if not (ROOT / "results" / name).exists()
    ] == []


def test_a_wrong_link_and_a_wrong_anchor_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A `b`: c\n# A b c\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "[ok](there.md#a-b-c) [ok](there.md#a-b-c-1) [web](https://example.org)\n"
        "[no](gone.md) [no](there.md#a-b-c-2) `[code](x)`\n```\n[code](y)\n```\n",
        encoding="utf-8",
    )
    assert broken(page) == ["gone.md", "there.md#a-b-c-2"]


def test_options_that_task_pages_name_are_those_of_the_command_line():
    known = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "docs" / "cli.md").read_text("utf-8")))
    for page in sorted((ROOT / "docs" / "tasks").glob("*.md")):
        code = re.findall(r"```sh\n.*?```|`[^`\n]+`", page.read_text("utf-8"), flags=re.DOTALL)
        named = set(re.findall(r"(?<!\w)--[a-z][a-z-]+", "\n".join(code)))
        assert named <= known, page.name
