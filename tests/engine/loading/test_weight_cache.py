"""Quantized weights on disk: the same bytes as without, and never in the way of a load."""

from __future__ import annotations

import errno
import functools
import gc
import os
import re
import shutil
import sys
import threading
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwencli.config import DType, Quantization
from qwencli.engine.loading import weight_cache, weights
from qwencli.engine.quant.quantized_tensor import Scheme, quantize
from qwencli.models import quantized_cache
from qwencli.models.builtin import bundled_folder
from qwencli.models.folder import read_config
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
    loaded = weights.load(folder, shape, torch.float32, CPU, mode, cache_file=kept)
    if loaded.keeping is not None:
        loaded.keeping.begin()
        loaded.keeping.write()
    return loaded


def warning_of(loaded: weights.LoadedWeights) -> str | None:
    return None if loaded.keeping is None else loaded.keeping.warning


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
    real = weights._Kept._quantize

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(weights._Kept, "_quantize", counted)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_the_second_load_quantizes_nothing(
    folder: Path, mode: Quantization, quantizing: list[int]
) -> None:
    first = load(folder, mode)
    assert len(quantizing) == 4 * 4 + 1
    second = load(folder, mode)
    assert len(quantizing) == 4 * 4 + 1
    assert warning_of(first) is None and second.keeping is None
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


def replace(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content and len(old) == len(new)
    file.write_bytes(content.replace(old, new))


def turn_a_shape(file: Path) -> None:
    content = file.read_bytes()
    found = re.search(rb'"shape": \[(\d+), (?!\1)(\d+)\]', content)
    assert found
    replace(file, found[0], b'"shape": [%s, %s]' % (found[2], found[1]))


def swap_names(file: Path, one: bytes, other: bytes) -> None:
    content = file.read_bytes()
    assert one in content and other in content
    content = content.replace(one, b"?" * len(one)).replace(other, one)
    file.write_bytes(content.replace(b"?" * len(one), other))


def swap_words(file: Path, one: int, other: int) -> None:
    content = bytearray(file.read_bytes())
    words = [bytes(content[at : at + 8 or None]) for at in (one, other)]
    assert words[0] != words[1]
    for at, word in zip((one, other), reversed(words), strict=True):
        content[at : at + 8 or None] = word
    file.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: flip(file, -1000),
        lambda file: flip(file, -1),
        lambda file: flip(file, 30),
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(b""),
        lambda file: replace(file, b'text.0.o\\": \\"int4', b'text.0.o\\": \\"int9'),
        lambda file: turn_a_shape(file),
        lambda file: replace(file, b'"text.0.o.data"', b'"text.9.o.data"'),
        lambda file: swap_names(file, b'"text.0.o.data"', b'"text.1.o.data"'),
        lambda file: swap_words(file, -800, -8),
        lambda file: swap_words(file, -40_000, -80_000),
        lambda file: swap_words(file, -800, -800 - 8 * 4096),
    ],
    ids=[
        "a value", "the last byte", "the header", "cut short", "empty", "another scheme",
        "another shape", "another name", "two names", "two words", "two far words", "words of rows",
    ],
)  # fmt: skip
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


def test_other_weights_of_equal_size_and_time_are_noticed(
    folder: Path, quantizing: list[int]
) -> None:
    load(folder)
    file = folder / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    load(folder)
    assert len(quantizing) == 2 * 17


def test_other_weights_are_told_by_their_values_where_times_tell_nothing(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = b"\x10" + bytes(7) + b"{}" + bytes(100_000)
    found = set()
    for filler in (0, 1):
        file.write_bytes(content.replace(bytes(1000), bytes([filler]) * 1000))
        with mock.patch.object(Path, "stat", return_value=os.stat_result([0] * 6 + [9] * 4)):
            found.add(quantized_cache.fingerprint([file]))
    assert len(found) == 2


def test_what_killed_writers_left_is_deleted_and_what_is_being_written_is_not(
    folder: Path,
) -> None:
    place = cache_file(folder, Quantization.INT4, DType.FLOAT32).parent
    other = place.parent / "another-0123456789abcdef"
    for each in (place, other):
        each.mkdir(parents=True)
        (each / ".4bit-float32.safetensors.1234").write_bytes(bytes(10))
    running = weight_cache.CacheWriter(other / "8bit-float32.safetensors", "", {})
    running.begin()
    load(folder)
    assert [path.name for path in place.iterdir()] == ["4bit-float32.safetensors"]
    assert len(list(other.iterdir())) == 1
    running.abandon()
    assert list(other.iterdir()) == []


@settings(max_examples=60)
@given(
    st.integers(1, 3 * 4096 + 5),
    st.tuples(st.integers(0), st.integers(0)),
    st.sampled_from([torch.int8, torch.float16, torch.int32]),
)
def test_a_checksum_tells_any_two_words_that_changed_places(
    count: int, places: tuple[int, int], dtype: torch.dtype
) -> None:
    values = torch.randint(0, 100, (8 * count + 3,), generator=torch.Generator().manual_seed(count))
    tensor = values.to(dtype)
    one, other = (place % len(tensor) for place in places)
    swapped = tensor.clone()
    swapped[[one, other]] = tensor[[other, one]]
    same = torch.equal(tensor, swapped)
    assert (weight_cache.checksum(tensor) == weight_cache.checksum(swapped)) is same


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
    warning = warning_of(loaded)
    assert warning is not None and str(place) in warning
    assert os.strerror(errno.ENOSPC) in warning
    assert list(place.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes")
@pytest.mark.parametrize("room", [0, 100, 1 << 16, 1 << 20])
def test_a_disk_that_takes_a_part_keeps_nothing(folder: Path, room: int) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        loaded = load(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(loaded.matrices) == 17
    assert "could not be kept" in str(warning_of(loaded))
    assert list(cache_file(folder, Quantization.INT4, DType.FLOAT32).parent.iterdir()) == []


@pytest.mark.parametrize("how", ["gone", "cut", "unreadable"])
def test_a_file_that_changes_while_it_is_read_is_written_anew(
    folder: Path, how: str, monkeypatch: pytest.MonkeyPatch, quantizing: list[int]
) -> None:
    first = load(folder)
    file = cache_file(folder, Quantization.INT4, DType.FLOAT32)
    real = weight_cache.CachedMatrices.begin

    def unreadable(open_file: Any, source: Any) -> Any:
        if source.file == file:
            raise OSError(errno.EIO, "x")
        return open_file(source)

    def begin(self: Any, reader: Any) -> Any:
        if how == "gone":
            file.unlink()
        if how == "cut":
            os.truncate(file, 100_000)
        if how == "unreadable":
            monkeypatch.setattr(reader, "_open", functools.partial(unreadable, reader._open))
        return real(self, reader)

    monkeypatch.setattr(weight_cache.CachedMatrices, "begin", begin)
    second = load(folder)
    assert_equal(first, second)
    assert warning_of(second) is None and len(quantizing) == 2 * 17
    assert file.exists()


def test_what_a_damaged_file_gave_is_gone_before_other_weights_are_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    file = cache_file(folder, Quantization.INT4, DType.FLOAT32)
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    made: list[weakref.ref[weights._Attempt]] = []
    there: list[int] = []
    attempting = weights._Attempt.__init__

    def attempt(self: Any, *about: Any) -> None:
        gc.collect()
        there.append(sum(each() is not None for each in made))
        made.append(weakref.ref(self))
        attempting(self, *about)

    monkeypatch.setattr(weights._Attempt, "__init__", attempt)
    load(folder)
    assert there == [0, 0]


def test_a_writer_that_finds_no_memory_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nat ...")

    monkeypatch.setattr(weight_cache.ByteSums, "add", no_memory)
    warning = warning_of(load(folder))
    assert warning is not None and "can't allocate memory); the next load" in warning
    assert list(cache_file(folder, Quantization.INT4, DType.FLOAT32).parent.iterdir()) == []


def test_other_loads_take_no_file_that_is_just_begun(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = quantized_cache._lock, 0

    def lock_late(stream: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            quantized_cache.remove_leftovers()
        return real(stream)

    monkeypatch.setattr(quantized_cache, "_lock", lock_late)
    assert warning_of(load(folder)) is None
    file = cache_file(folder, Quantization.INT4, DType.FLOAT32)
    assert list(file.parent.iterdir()) == [file]


def test_what_is_no_file_is_in_the_way_of_no_load(folder: Path) -> None:
    first = load(folder)
    file = cache_file(folder, Quantization.INT4, DType.FLOAT32)
    file.unlink()
    if sys.platform != "win32":
        os.mkfifo(file)  # nobody will ever write to it
        assert_equal(load(folder), first)
        assert file.is_file()
        file.unlink()
    file.mkdir()
    second = load(folder)
    assert "could not be kept" in str(warning_of(second))
    assert_equal(second, first)


def test_a_file_that_was_changed_anywhere_is_written_anew(folder: Path) -> None:
    first = load(folder)
    file = cache_file(folder, Quantization.INT4, DType.FLOAT32)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    @settings(max_examples=8, deadline=None)
    @given(
        st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1)),
        st.sampled_from(["bit", "cut", "added", "zeros", "taken out"]),
        st.integers(1, 4096),
    )
    def spoilt(at: int, how: str, count: int) -> None:
        content = bytearray(whole)
        if how == "bit":
            content[at] ^= 1 << count % 8
        elif how == "cut":
            del content[at:]
        elif how == "added":
            content[at:at] = bytes(count)
        elif how == "zeros":
            content[at : at + count] = bytes(len(content[at : at + count]))
        else:
            del content[at : at + count]
        file.write_bytes(content)
        assert_equal(load(folder), first)
        assert _without_spaces(file.read_bytes()) == _without_spaces(whole)

    spoilt()


def _without_spaces(content: bytes) -> bytes:
    """A header is filled up with them; which of them there are, nobody reads."""
    return content.translate(None, b" \t\r\n")


def test_a_place_that_cannot_be_written_is_a_warning(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "user-cache").write_text("in the way", encoding="utf-8")
    assert "could not be kept" in str(warning_of(load(folder)))


def test_a_load_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(weights, "check_finite", fail)
    with pytest.raises(RuntimeError):
        load(folder)
    place = cache_file(folder, Quantization.INT4, DType.FLOAT32).parent
    assert not place.exists() or list(place.iterdir()) == []


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


def background(file: Path) -> weight_cache.BackgroundWriter:
    matrix = quantize(torch.randn(8, 128), Scheme.INT4)
    writer = weight_cache.CacheWriter(file, "made of", {"a": matrix, "b": matrix})
    writer.begin()
    return weight_cache.BackgroundWriter(writer, CPU)


def test_what_is_written_beside_requests_is_there_when_the_engine_ends(tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    assert background(file).end(60.0) is None
    assert weight_cache.open_cache(file, "made of", ["a", "b"]) is not None
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_process_that_ends_waits_for_so_long_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    real, begun, go = weight_cache.CacheWriter._append, threading.Event(), threading.Event()

    def slow(self: Any, name: str, tensor: torch.Tensor) -> None:
        begun.set()
        go.wait(60.0)
        real(self, name, tensor)

    monkeypatch.setattr(weight_cache.CacheWriter, "_append", slow)
    monkeypatch.setattr(weight_cache, "_TENSOR_S", 0.01)
    writing = background(tmp_path / "kept.safetensors")
    assert begun.wait(60.0)
    if interrupted:
        monkeypatch.setattr(writing._thread, "join", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writing.end(60.0)
    else:
        assert writing.end(0.01) is None
    go.set()
    threading.Thread.join(writing._thread, 60.0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = mock.Mock(free=1000)
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda path: room)
    loaded = load(folder)
    assert os.strerror(errno.ENOSPC) in str(warning_of(loaded))
    assert list(cache_file(folder, Quantization.INT4, DType.FLOAT32).parent.iterdir()) == []


def test_what_goes_wrong_after_the_load_is_said_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwencli.cli import run

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_cache.CacheWriter, "_append", full)
    scene = str(Path(__file__).parents[3] / "examples" / "scene.png")
    words = ["caption", scene, "--model", str(folder), "--engine", "native", "--device", "cpu"]
    assert run([*words, "--quantization", "4bit", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().err.count("warning: the quantized weights could not be kept") == 1
