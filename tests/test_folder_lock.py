"""One writer a folder, whatever stands in the place of its lock."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from qwencli.errors import BenchError, OutputError
from qwencli.folder_lock import LOCK, FolderLock


def take(folder: Path) -> FolderLock:
    return FolderLock(folder, BenchError, "wait")


def test_one_at_a_time(tmp_path: Path) -> None:
    lock = take(tmp_path)
    with pytest.raises(BenchError, match=f"is being written by process {os.getpid()}, since"):
        take(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    take(tmp_path).release()


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b'{"process": "x"}', b"\xff" * 2000])
def test_what_others_left_refuses_nobody(tmp_path: Path, left: bytes) -> None:
    (tmp_path / LOCK).write_bytes(left)
    take(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        take(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        take(tmp_path / "none")


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes are POSIX's")
def test_no_other_file_is_emptied(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("kept", encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / LOCK).symlink_to(mine)
    with pytest.raises(OutputError, match="cannot be written"):
        take(folder)
    assert mine.read_text(encoding="utf-8") == "kept"
    (folder / LOCK).unlink()
    os.mkfifo(folder / LOCK)
    with pytest.raises(OutputError, match="cannot be written"):
        take(folder)


def test_a_full_disk_is_named_and_the_lock_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OutputError, match="No space left"):
            take(tmp_path)
    assert list(tmp_path.iterdir()) == []
    take(tmp_path).release()
