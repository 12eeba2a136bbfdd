"""Packages that are installed, and older than the extras of pyproject.toml ask for."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwencli.cli import run
from qwencli.commands.serve import check_extra
from qwencli.config import Quantization
from qwencli.dataset.ray_cluster import RayWorkers
from qwencli.dataset.shards import pyarrow_parquet
from qwencli.diagnostics.check_table import CHECKS, run_check
from qwencli.diagnostics.finding import Status
from qwencli.engine.constrained import read_schema
from qwencli.engine.frontend.videos import open_visual
from qwencli.engine.hf.quantization import quantization_config
from qwencli.engine.machine import flash_attn, packages
from qwencli.errors import MissingDependencyError
from tests.diagnostics.replay import machine

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
Installed = Callable[..., None]


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Installed:
    """`installed(llguidance="1.6.1")`: their metadata and that of this pyproject.toml are found
    before all others."""

    def write(name: str, version: str, *lines: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*head, *lines]) + "\n")

    def metadata(**versions: str) -> None:
        extras = PROJECT["optional-dependencies"]
        lines = [f"Requires-Dist: {each}" for each in PROJECT["dependencies"]]
        # As hatchling writes them: in alphabetical order, those of other extras repeated.
        repeated = [
            each for name in ("video", "parquet", "schema", "serve") for each in extras[name]
        ]
        for extra, wanted in sorted({**extras, "dev": repeated}.items()):
            lines.append(f"Provides-Extra: {extra}")
            for each in wanted:
                package, _, marker = each.partition(";")
                also = f" and {marker.strip()}" if marker else ""
                lines.append(f"Requires-Dist: {package}; extra == '{extra}'{also}")
        write("qwencli", "0.1.0", *lines)
        for name, version in versions.items():
            write(name, version)
        monkeypatch.syspath_prepend(tmp_path)
        forget()

    def forget() -> None:
        packages.least_versions.cache_clear()
        packages.outdated.cache_clear()

    yield metadata
    forget()


def schema(folder: Path) -> None:
    read_schema('{"type": "string"}', "s.json")


def video(folder: Path) -> None:
    (folder / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    open_visual(folder / "a.mp4")


def parquet(folder: Path) -> None:
    pyarrow_parquet("m.parquet")


def serve(folder: Path) -> None:
    check_extra()


def ray(folder: Path) -> None:
    (folder / "ray.py").write_text("raise AssertionError('too old to be imported')\n")
    with RayWorkers(None, "local", print):  # type: ignore[arg-type]
        pass


def bitsandbytes(folder: Path) -> None:
    quantization_config(Quantization.INT8, torch.float16)


@pytest.mark.parametrize(
    ("use", "package", "said", "hint"),
    [
        (schema, "llguidance", "--schema", "'qwencli[schema]'"),
        (video, "av", "a.mp4 is a video file", "'qwencli[video]', or give an animated GIF"),
        (parquet, "pyarrow", "m.parquet is a Parquet file", "'qwencli[parquet]', or use .jsonl"),
        (serve, "starlette", "qwencli serve", "'qwencli[serve]'"),
        (serve, "uvicorn", "qwencli serve", "'qwencli[serve]'"),
        (serve, "pydantic", "qwencli serve", "'qwencli[serve]'"),
        (ray, "ray", "--ray", "'qwencli[ray]', or use --devices"),
        (bitsandbytes, "bitsandbytes", "--quantization 8bit", "bitsandbytes, or use --quantiz"),
    ],
)
def test_each_feature_says_that_its_package_is_too_old(
    installed, tmp_path, use, package, said, hint
):
    installed(**{package: "0.1"})
    with pytest.raises(MissingDependencyError) as found:
        use(tmp_path)
    least = packages.least_versions()[package].version
    assert found.value.message.endswith(
        f"{said}: {package} 0.1 is older than {least}, which qwencli needs"
    )
    assert found.value.hint.startswith(f"pip install --upgrade {hint}")


def test_an_old_package_is_one_line_of_the_command(installed, capsys):
    installed(llguidance="1.6.1")
    assert run(["caption", "examples/scene.png", "--model", "scenes", "--schema", "boxes"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert (
        "error: --schema: llguidance 1.6.1 is older than 1.7, which qwencli needs "
        "(pip install --upgrade 'qwencli[schema]')\n"
    ) in said.err


@pytest.mark.parametrize(
    ("version", "is_old"),
    [
        ("1.6.1", True),
        ("1.7.0rc1", True),
        ("1.7", False),
        ("1.7.0+cu128", False),
        ("1.9.0rc1", False),
        ("1.7.0.post2", False),
        ("1.10", False),
        ("of-our-own", False),
        ("", False),
    ],
)
def test_what_is_older(installed, version, is_old):
    installed(llguidance=version)
    assert (packages.outdated("llguidance") is not None) == is_old


def test_metadata_that_an_interrupted_upgrade_left(installed, tmp_path):
    installed()
    (tmp_path / "llguidance-1.6.1.dist-info").mkdir()
    packages.outdated.cache_clear()
    schema(tmp_path)


def test_nothing_is_asked_of_packages_beside_a_source_folder(installed, monkeypatch):
    installed(llguidance="1.6.1")

    def none(name: str) -> None:
        raise packages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "metadata", none)
    assert packages.least_versions() == {}
    assert packages.outdated("llguidance") is None and packages.outdated_optional() == ()


def test_every_extra_of_a_user_has_its_least_versions(installed):
    installed()
    extras = PROJECT["optional-dependencies"]
    found = packages.least_versions()
    for extra in extras.keys() - {"test", "dev"}:
        names = [line.partition(">=")[0].partition("[")[0] for line in extras[extra]]
        assert all(found[name].extra == extra for name in names if name in found)
        assert extra == "ray" or set(names) <= set(found)
    assert "pytest" not in found and found["torch"].extra == ""


def test_flash_attn_is_held_to_what_its_extra_asks_for(installed):
    installed()
    assert packages.least_versions()["flash-attn"].version == ".".join(map(str, flash_attn.LEAST))


def test_diagnose_names_them(installed):
    installed(llguidance="1.6.1", uvicorn="0.39", starlette="0.9", av="99")
    recorded = [
        {"name": old.name, "version": old.version, "least": vars(old.least)}
        for old in packages.outdated_optional()
    ]
    check = next(check for check in CHECKS if check.id == "packages")
    found = run_check(check, machine("healthy-5090", outdated_optional=recorded))
    assert found.status is Status.WARN
    assert found.evidence == (
        "llguidance 1.6.1 (needs 1.7), starlette 0.9 (needs 1.0), uvicorn 0.39 (needs 0.40)"
    )
    assert found.fix == (
        "pip install --upgrade 'qwencli[schema]'\npip install --upgrade 'qwencli[serve]'"
    )
    also = machine("healthy-5090", outdated_optional=recorded, packages={"transformers": "5.1"})
    found = run_check(check, also)
    assert "transformers 5.1" in found.evidence and "llguidance" in found.evidence
    assert "clone" in found.fix and "qwencli[schema]" in found.fix
