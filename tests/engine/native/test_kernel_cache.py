"""The folder of compiled kernels: what is damaged, foreign or cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import triton

from qwencli.config import Quantization
from qwencli.engine.kernels.launches import Gpu
from qwencli.engine.native import kernel_cache
from qwencli.engine.native.kernel_cache import (
    CheckedFiles,
    manifest_of,
    read_manifest,
    settle_cache_keys,
    taken_notes,
    use_folder,
    write_manifest,
)
from qwencli.engine.native.kernel_plan import PlannedModel, plan_kernels
from qwencli.models.shape_reader import read_shape
from tests.engine.quant.test_prequantized import TEXT

GPU = Gpu((8, 6), 82)
KEY = "a" * 8


@pytest.fixture(autouse=True)
def knobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's settings, and what was said, of each test alone."""
    monkeypatch.setattr(kernel_cache, "_notes", [])
    monkeypatch.setattr(kernel_cache, "_used", {})
    scopes = triton.knobs.cache, triton.knobs.compilation, triton.knobs.language
    with ExitStack() as stack:
        for each in scopes:
            stack.enter_context(each.scope())
        yield


def planned(mode: Quantization = Quantization.NONE) -> PlannedModel:
    return PlannedModel(read_shape(TEXT), torch.bfloat16, mode, rows=0)


def kept(folder: Path) -> CheckedFiles:
    """A compiled kernel as Triton writes it."""
    use_folder(folder)
    entry = CheckedFiles(KEY)
    group = {name: entry.put(name.encode(), name) for name in ("k.json", "k.cubin")}
    entry.put_group("k.json", group)
    return CheckedFiles(KEY)


def test_what_was_written_is_found(tmp_path):
    assert set(kept(tmp_path).get_group("k.json")) == {"k.json", "k.cubin"}
    assert taken_notes() == ()


@pytest.mark.parametrize("wished", [None, "0"])
def test_products_and_sums_are_fused_unless_the_user_says_otherwise(tmp_path, monkeypatch, wished):
    language = triton.knobs.language
    if not hasattr(language, "default_fp_fusion"):
        pytest.skip("this Triton always fuses them")
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    if wished is not None:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", wished)
    use_folder(tmp_path)
    assert language.default_fp_fusion is (wished is None)
    assert os.environ.get("TRITON_DEFAULT_FP_FUSION") == wished


@pytest.mark.parametrize("file", ["k.json", "k.cubin", "__grp__k.json"])
@pytest.mark.parametrize("damage", [b"", b"other", None])
def test_a_damaged_entry_is_not_used_and_that_is_said_once(tmp_path, file, damage):
    entry = kept(tmp_path)
    place = Path(entry.cache_dir) / file
    if damage is None:
        place.unlink()
    else:
        place.write_bytes(damage)
    assert entry.get_group("k.json") is None
    assert entry.get_group("k.json") is None
    said = taken_notes()
    assert len(said) == (damage is not None)
    assert all("damaged and are made again" in note for note in said)
    assert taken_notes() == ()
    assert set(kept(tmp_path).get_group("k.json")) == {"k.json", "k.cubin"}


def test_an_entry_whose_writer_was_killed_is_not_used(tmp_path):
    entry = kept(tmp_path)
    (Path(entry.cache_dir) / "k.cubin.sha256").unlink()
    assert entry.get_group("k.json") is None


def test_a_folder_from_elsewhere_is_not_used(tmp_path):
    """Triton writes whole paths; those of another place may be anybody's files."""
    entry = kept(tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "here")
    use_folder(tmp_path / "here")
    assert CheckedFiles(KEY).get_group("k.json") is None
    assert entry.get_group("k.json") is None


def test_what_cannot_be_kept_is_compiled_for_this_process_and_that_is_said_once(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    use_folder(tmp_path / "file" / "kernels")
    entry = CheckedFiles(KEY)
    path = entry.put(b"code", "k.cubin")
    assert Path(path).read_bytes() == b"code"
    assert Path(CheckedFiles(KEY).get_file("k.cubin")).read_bytes() == b"code"
    (said,) = taken_notes()
    assert "could not be kept" in said
    assert str(tmp_path / "file") in said


def test_a_full_disk(tmp_path, monkeypatch):
    use_folder(tmp_path)
    entry, replace = CheckedFiles(KEY), kernel_cache.os.replace

    def full(source: str, to: str) -> None:
        if str(to).startswith(str(tmp_path)):
            raise OSError(28, "No space left on device")
        replace(source, to)

    monkeypatch.setattr(kernel_cache.os, "replace", full)
    assert Path(entry.put(b"code", "k.cubin")).read_bytes() == b"code"
    assert "No space left on device" in taken_notes()[0]


def test_a_list_is_read_as_it_was_written(tmp_path):
    model = planned(Quantization.INT4)
    launches = plan_kernels(model, GPU)
    file = manifest_of(model, GPU, tmp_path)
    assert read_manifest(file) is None
    write_manifest(file, launches)
    assert read_manifest(file) == launches
    assert taken_notes() == ()
    file.write_text(file.read_text().replace("gemv", "gemw", 1))
    assert read_manifest(file) is None
    assert "damaged" in taken_notes()[0]


@pytest.mark.parametrize(
    "other",
    [
        (planned(Quantization.FP8), GPU),
        (planned(), Gpu((8, 6), 28)),
        (planned(), Gpu((12, 0), 82)),
    ],
)
def test_another_mode_or_gpu_has_a_list_of_its_own(tmp_path, other):
    assert manifest_of(planned(), GPU, tmp_path) == manifest_of(planned(), GPU, tmp_path)
    assert manifest_of(*other, tmp_path) != manifest_of(planned(), GPU, tmp_path)


def test_the_folder_stays_where_it_is_and_the_environment_as_it_was(tmp_path, monkeypatch):
    """Triton writes its settings there, where another load would take them for the user's."""
    monkeypatch.setattr(kernel_cache, "gpu_of", lambda device: GPU)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = dict(os.environ)
    first = kernel_cache.use_folder_of(torch.device("cuda"))
    assert first.parent == tmp_path
    assert kernel_cache.use_folder_of(torch.device("cuda")) == first
    kernel_cache.keep_nothing("no reason")
    assert dict(os.environ) == before


class Function:
    """What Triton makes of a kernel, as far as its hash goes."""

    def __init__(self, name: str) -> None:
        self.name, self.hash, self.parsed = name, None, 0

    @property
    def cache_key(self) -> str:
        if self.hash is None:
            self.hash, self.parsed = f"hash of {self.name}", self.parsed + 1
        return self.hash


def test_hashes_of_kernels_are_worked_out_once(tmp_path, monkeypatch):
    def settled() -> dict[str, Function]:
        """In a new process."""
        functions = {name: Function(name) for name in ("a_kernel", "b_kernel")}
        monkeypatch.setattr(kernel_cache, "jit_functions", lambda: functions)
        settle_cache_keys(tmp_path)
        assert {f.hash for f in functions.values()} == {"hash of a_kernel", "hash of b_kernel"}
        return functions

    assert all(function.parsed == 1 for function in settled().values())
    assert all(function.parsed == 0 for function in settled().values())
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("hash of a_kernel", "hash of b_kernel"))
    assert all(function.parsed == 1 for function in settled().values())
    assert [note for note in taken_notes() if "damaged" in note]
    assert all(function.parsed == 0 for function in settled().values())


def test_where_hashes_cannot_be_kept_they_are_worked_out_again(tmp_path, monkeypatch):
    functions = {"a_kernel": Function("a_kernel")}
    monkeypatch.setattr(kernel_cache, "jit_functions", lambda: functions)
    settle_cache_keys(tmp_path / "missing")
    assert functions["a_kernel"].parsed == 1 and not taken_notes()
