"""Quantized weights on disk: the same bytes as without, and never in the way of a load."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwencli.config import DType, Quantization
from qwencli.engine.native import weight_cache, weights
from qwencli.models import quantized_cache
from qwencli.models.folder import read_config
from qwencli.models.locate import bundled_folder
from qwencli.models.quantized_cache import cache_file, cached_bytes
from qwencli.models.shape_reader import read_shape

CPU = torch.device("cpu")
MODES = [mode for mode in Quantization if mode is not Quantization.NONE]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled_folder(), tmp_path / "scenes"))


def load(folder: Path, mode: Quantization = Quantization.INT4) -> weights.LoadedWeights:
    shape = read_shape(read_config(folder))
    kept = cache_file(folder, mode, DType.FLOAT32)
    return weights.load(folder, shape, torch.float32, CPU, mode, cache_file=kept)


def assert_equal(left: weights.LoadedWeights, right: weights.LoadedWeights) -> None:
    assert left.scheme == right.scheme
    assert left.matrices.keys() == right.matrices.keys()
    for name, matrix in left.matrices.items():
        others = right.matrices[name].parts
        assert matrix.parts.keys() == others.keys()
        for part, tensor in matrix.parts.items():
            assert tensor.dtype == others[part].dtype
            assert torch.equal(tensor.view(torch.uint8), others[part].view(torch.uint8))


@pytest.fixture
def quantizing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each matrix that is quantized."""
    calls: list[int] = []
    real = weights.quantize

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(weights, "quantize", counted)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_the_second_load_quantizes_nothing(
    folder: Path, mode: Quantization, quantizing: list[int]
) -> None:
    first = load(folder, mode)
    assert len(quantizing) == 4 * 4 + 1
    second = load(folder, mode)
    assert len(quantizing) == 4 * 4 + 1
    assert first.warning is None and second.warning is None
    assert_equal(first, second)
    file = cache_file(folder, mode, DType.FLOAT32)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    # The file is one that others read too.
    stored = load_file(file)
    assert torch.equal(stored["text.head.data"], first.matrices["text.head"].data)
    assert cached_bytes(folder) == file.stat().st_size


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: flip(file, -1000),
        lambda file: flip(file, -1),
        lambda file: flip(file, 30),
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(
            file.read_bytes().replace(b'text.0.o\\": \\"int4', b'text.0.o\\": \\"int9')
        ),
    ],
    ids=["a value", "the last byte", "the header", "cut short", "empty", "another scheme"],
)
def test_a_damaged_file_is_written_anew(folder: Path, spoil: Any, quantizing: list[int]) -> None:
    first = load(folder)
    file = cache_file(folder, Quantization.INT4, DType.FLOAT32)
    whole = file.read_bytes()
    spoil(file)
    assert file.read_bytes() != whole
    assert_equal(load(folder), first)
    assert len(quantizing) == 2 * 17
    assert file.read_bytes() == whole


@pytest.mark.parametrize("what", ["time", "layout"])
def test_an_outdated_file_is_written_anew(
    folder: Path, what: str, quantizing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    if what == "time":
        os.utime(folder / "model.safetensors", (1, 1))
    else:
        monkeypatch.setattr(quantized_cache, "LAYOUT", quantized_cache.LAYOUT + 1)
    load(folder)
    assert len(quantizing) == 2 * 17
    load(folder)
    assert len(quantizing) == 2 * 17


def test_a_full_disk_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantizing: list[int]
) -> None:
    room = 3
    real = weight_cache.CacheWriter._append

    def append(self: Any, name: str, tensor: torch.Tensor) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, name, tensor)

    monkeypatch.setattr(weight_cache.CacheWriter, "_append", append)
    loaded = load(folder)
    assert len(loaded.matrices) == 17
    place = cache_file(folder, Quantization.INT4, DType.FLOAT32).parent
    assert loaded.warning is not None and str(place) in loaded.warning
    assert os.strerror(errno.ENOSPC) in loaded.warning
    assert list(place.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_warning(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "user-cache").write_text("in the way", encoding="utf-8")
    assert "could not be kept" in str(load(folder).warning)


def test_a_load_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(weights, "check_finite", fail)
    with pytest.raises(RuntimeError):
        load(folder)
    place = cache_file(folder, Quantization.INT4, DType.FLOAT32).parent
    assert list(place.iterdir()) == []


def test_the_engine_keeps_quantized_weights_and_says_when_it_cannot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwencli.cli import run

    scene = str(Path(__file__).parents[3] / "examples" / "scene.png")
    words = ["caption", scene, "--model", str(folder), "--engine", "native", "--device", "cpu"]
    assert run([*words, "--quantization", "8bit", "--max-new-tokens", "4"]) == 0
    assert cached_bytes(folder) > 0
    assert "could not be kept" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "user-cache")
    (tmp_path / "user-cache").write_text("in the way", encoding="utf-8")
    assert run([*words, "--quantization", "8bit", "--max-new-tokens", "4"]) == 0
    assert "warning: the quantized weights could not be kept" in capsys.readouterr().err
