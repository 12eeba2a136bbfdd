"""Broken files of many kinds in one folder: each is a row with its reason, the rest is done."""

from __future__ import annotations

import errno
import os

import pytest
from PIL import Image

from tests.dataset.conftest import captions, failures
from tests.media_corpus import encoded, png

GOOD = encoded(Image.radial_gradient("L").convert("RGB"), "PNG")
BROKEN = {
    "cut.png": GOOD[: len(GOOD) // 2],
    "empty.jpg": b"",
    "text.webp": b"hello",
    "page.jpg": b"<html><body>404</body></html>",
    "bomb.png": png(60_000, 60_000, b"\0" * 100),
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\n",
}


def test_a_corpus_of_broken_files(caption, pictures, capsys):
    folder = pictures("a.png", "space d.png", "new\nline.png", "z/b.png")
    for name, data in BROKEN.items():
        (folder / name).write_bytes(data)
    (folder / "right.jpg").write_bytes(GOOD)  # another kind than its name says
    (folder / "._a.png").write_bytes(b"mac")
    assert caption(folder, "-r") == 1
    err = capsys.readouterr().err
    assert "fault of qwencli" not in err and "1 hidden" in err
    assert sorted(row["path"] for row in failures(folder)) == sorted(BROKEN)
    assert all(row["reason"] and row["hint"] for row in failures(folder))
    good = ["a.txt", "new\nline.txt", "right.txt", "space d.txt", "z/b.txt"]
    assert sorted(captions(folder)) == good


def test_a_picture_that_vanishes_while_the_set_is_captioned(caption, pictures, engine):
    folder = pictures("a.png", "b.png", "c.png")
    answer = engine.answer

    def removing(request):
        (folder / "c.png").unlink(missing_ok=True)
        return answer(request)

    engine.answer = removing
    assert caption(folder) == 1
    assert sorted(captions(folder)) == ["a.txt", "b.txt"]
    (row,) = failures(folder)
    assert row["path"] == "c.png" and "no such file" in row["reason"]


def test_what_only_one_picture_raises_is_its_own(caption, pictures, monkeypatch):
    from qwencli.engine.frontend import videos

    folder = pictures("a.png", "b.png")
    opened = videos.open_visual

    def failing(source, *arguments, **named):
        if str(source).endswith("a.png"):
            raise ZeroDivisionError("in a decoder")
        return opened(source, *arguments, **named)

    monkeypatch.setattr(videos, "open_visual", failing)
    assert caption(folder) == 1
    assert list(captions(folder)) == ["b.txt"]
    assert "ZeroDivisionError: in a decoder" in failures(folder)[0]["reason"]


def as_it_is(place):
    """Not when it was last looked at: following a link is a look."""
    found = place.lstat()
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_never_replaces_a_device_or_a_pipe(tmp_path, linked):
    from qwencli.dataset.report.contact_sheet import write_sheet
    from qwencli.dataset.sinks import write_whole

    place, other = tmp_path / "there", tmp_path / "other"
    if linked:  # as /dev/stdout is
        other.touch()
        with other.open() as file:
            place.symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
            before = as_it_is(place)
            with pytest.raises(FileExistsError, match="a device or a pipe is there"):
                write_whole(place, b"x")
    else:
        os.mkfifo(place)
        before = as_it_is(place)
        with pytest.raises(FileExistsError, match="a device or a pipe is there"):
            write_whole(place, b"x")
        with pytest.raises(FileExistsError, match="a device or a pipe is there"):
            write_sheet(["x"], place)
    assert as_it_is(place) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"there", "other"}


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(caption, pictures, capsys, monkeypatch):
    from qwencli.dataset import sinks

    folder = pictures(*(f"{n}.png" for n in range(60)))
    write = sinks.write_whole
    left = [5]

    def full(path, data):
        if path.suffix == ".txt" and (left := room()) <= 0:
            assert left <= 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    def room():
        left[0] -= 1
        return left[0]

    monkeypatch.setattr(sinks, "write_whole", full)
    assert caption(folder) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "Traceback" not in err
    written = captions(folder)
    assert 0 < len(written) < 60 and all(text.endswith(".\n") for text in written.values())
    monkeypatch.setattr(sinks, "write_whole", write)
    assert caption(folder, "--retry-failed") == 0
    assert len(captions(folder)) == 60 and captions(folder).items() >= written.items()


@pytest.mark.parametrize("statement", ["mark_done", "mark_writing"])
def test_a_manifest_that_cannot_be_written_is_one_line(
    caption, pictures, capsys, monkeypatch, statement
):
    import sqlite3

    from qwencli.dataset.manifest import Manifest

    folder = pictures("a.png", "b.png")
    kept = getattr(Manifest, statement)

    def full(self, rows, *arguments, **named):
        if list(rows):
            with self._failing():
                raise sqlite3.OperationalError("database or disk is full")
        return kept(self, rows, *arguments, **named)

    monkeypatch.setattr(Manifest, statement, full)
    assert caption(folder) == 1
    err = capsys.readouterr().err
    assert "database or disk is full" in err and "fault of qwencli" not in err
    monkeypatch.setattr(Manifest, statement, kept)
    assert caption(folder) == 0
    assert sorted(captions(folder)) == ["a.txt", "b.txt"]


def test_failures_that_cannot_be_written_are_listed(caption, pictures, capsys, monkeypatch):
    from qwencli.dataset import set_folder

    folder = pictures("a.png")
    (folder / "old.png").write_bytes(b"no picture")
    assert caption(folder) == 1
    pictures("new.png")
    (folder / "worse.png").write_bytes(b"no picture")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(set_folder, "write_whole", full)
    capsys.readouterr()
    assert caption(folder) == 1
    err = capsys.readouterr().err
    assert "failures.jsonl cannot be written: No space left on device" in err
    assert "1 captioned, 1 failed" in err
    assert "failed: old.png (caption): " in err and "failed: worse.png (caption): " in err


def test_a_full_disk_loses_no_failure(caption, pictures, capsys, monkeypatch):
    """Nor does what else ends a run early."""
    from qwencli.dataset import sinks

    folder = pictures(*(f"{n}.png" for n in range(60)))
    (folder / "bad.png").write_bytes(b"no picture")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sinks, "write_whole", full)
    assert caption(folder) == 1
    err = capsys.readouterr().err
    rows = failures(folder)
    assert len(rows) >= sinks.MOST_UNWRITTEN and str(folder / "failures.jsonl") in err
    assert all(row["reason"] in err for row in rows)


def test_what_makes_the_exit_code_is_said(caption, pictures, capsys):
    folder = pictures("a.png")
    (folder / "bad.png").write_bytes(b"no picture")
    assert caption(folder) == 1
    assert "exit code" not in capsys.readouterr().err
    assert caption(folder) == 1
    err = capsys.readouterr().err
    assert "0 captioned, 0 failed" in err
    assert "exit code 1: 1 caption that failed before is not tried again" in err
