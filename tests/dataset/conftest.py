from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwencli.cli import run
from tests.dataset.fake_engine import FakeEngine


@pytest.fixture
def engine(monkeypatch) -> FakeEngine:
    """What `qwencli caption` finds in place of a model."""
    fake = FakeEngine()

    def create(config):
        fake.config = config
        return fake

    monkeypatch.setattr("qwencli.engine.factory.create_engine", create)
    return fake


@pytest.fixture
def caption(engine) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        base = ["caption", "--model", "scenes", "--device", "cpu"]
        return run([*base, *map(str, arguments)])

    return call


@pytest.fixture
def finish(caption) -> Callable[..., None]:
    """The command that was stopped, now to its end; as programs of these tests, with a seed."""

    def call(*arguments: object) -> None:
        assert caption(*arguments, "--seed", "1") == 0

    return call


@pytest.fixture
def pictures(tmp_path) -> Callable[..., Path]:
    """`pictures("a.png", "b/c.jpg")` -> a folder that holds them, each of another colour."""

    def make(*names: str, folder: str = "set") -> Path:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for name in names:
            draw(root / name)
        return root

    return make


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(hash(str(path.name)) >> shift & 255 for shift in (0, 8, 16))
    kind = {".jpg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}.get(path.suffix.lower(), "PNG")
    with path.open("wb") as file:
        Image.new("RGB", (32, 32), colour).save(file, kind)


def captions(folder: Path, pattern: str = "**/*.txt") -> dict[str, str]:
    """Caption files below a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.glob(pattern))
    }


def failures(folder: Path) -> list[dict[str, Any]]:
    path = folder / "failures.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
