"""What runs on a GPU alone still finds what it imports from here: no test of a CPU would say so."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/gpu", "benchmarks", "tools")
OURS = ("qwencli", "tests", "benchmarks")


def imported_from_here(source: Path) -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            found += [(str(node.module), each.name) for each in node.names]
    return found


def exists(module: str, name: str) -> bool:
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        # What this machine lacks may be of another package.
        return (error.name or "").split(".")[0] not in OURS
    return True


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_name_that_is_imported_from_here_is_here(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    missing = {
        f"{source.relative_to(ROOT)}: {module}.{name}"
        for source in sources
        for module, name in imported_from_here(source)
        if not exists(module, name)
    }
    assert not missing
