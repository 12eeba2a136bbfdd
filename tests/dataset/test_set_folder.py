"""One manifest for a set and the sets in it, and one picture for each caption."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from qwencli.dataset.manifest import STATE_FOLDER
from qwencli.errors import DatasetError
from qwencli.folder_lock import FolderLock
from tests.dataset.conftest import captions, draw, failures

APPEND = ("--existing", "append")


def held(folder):
    """What another run holds while it captions a folder."""
    (folder / STATE_FOLDER).mkdir(exist_ok=True)
    return FolderLock(folder / STATE_FOLDER, DatasetError, "wait")


def manifests(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.sqlite"))


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_folder_and_one_in_it_know_of_each_other(caption, pictures, engine, inner_first):
    folder = pictures("a.png", "sub/b.png")
    (folder / "sub" / "b.txt").write_text("mine", encoding="utf-8")
    runs = [(folder, "-r"), (folder / "sub",)]
    for run in reversed(runs) if inner_first else runs:
        assert caption(*run, *APPEND) == 0
    for run in runs:
        assert caption(*run, *APPEND) == 0
    assert engine.answered == 2
    assert captions(folder)["sub/b.txt"].count("A picture") == 1
    assert manifests(folder) == [".qwencli/manifest.sqlite"]


def test_keys_do_not_depend_on_what_else_is_named(caption, pictures, engine):
    folder = pictures("a.png", "sub/b.png")
    assert caption(folder / "sub" / "b.png", *APPEND) == 0
    assert caption(folder / "a.png", folder / "sub" / "b.png", *APPEND) == 0
    assert caption(folder / "sub", *APPEND) == 0
    assert engine.answered == 2


@pytest.mark.parametrize(("holder", "named"), [(".", "sub"), ("sub", ".")])
def test_two_runs_on_a_folder_and_one_in_it(caption, pictures, engine, capsys, holder, named):
    folder = pictures("a.png", "sub/b.png")
    assert caption(folder / holder, *(["-r"] if holder == "." else [])) == 0
    draw(folder / "sub" / "c.png")
    answered = engine.answered
    lock = held(folder / holder)
    try:
        assert caption(folder / named, "-r") == 1
        assert "is being written by process" in capsys.readouterr().err
        assert engine.answered == answered
    finally:
        lock.release()
    assert caption(folder / named, "-r") == 0


def test_two_runs_that_begin_at_once(caption, pictures, capsys, monkeypatch):
    """The inner one looked before the outer one had a manifest."""
    from qwencli.dataset import set_folder

    folder = pictures("a.png", "sub/b.png")
    made = set_folder.Manifest

    def late(*arguments, **named):
        manifest = made(*arguments, **named)
        monkeypatch.setattr(set_folder, "Manifest", made)
        assert caption(folder) == 0  # of the outer folder, in the meantime
        return manifest

    monkeypatch.setattr(set_folder, "Manifest", late)
    assert caption(folder / "sub") == 1
    assert "another run has just begun" in capsys.readouterr().err
    assert manifests(folder) == [".qwencli/manifest.sqlite"]


def test_records_of_a_set_that_is_taken_into_another(caption, pictures, engine):
    folder = pictures("sub/b.png", "sub/deep/c.png", "a.png")
    (folder / "sub" / "bad.png").write_bytes(b"no picture")
    assert caption(folder / "sub" / "deep", "--prompt", "How deep?") == 0
    assert caption(folder / "sub", "--prompt", "What?") == 1
    assert caption(folder, "-r") == 1
    assert engine.answered == 3
    assert [row["path"] for row in failures(folder)] == ["sub/bad.png"]
    assert not (folder / "sub" / "failures.jsonl").exists()
    with closing(sqlite3.connect(folder / STATE_FOLDER / "manifest.sqlite")) as db:
        known = dict(db.execute("SELECT path, prompt FROM entries WHERE status = 'done'"))
    assert known["sub/b.png"] == "What?" and known["sub/deep/c.png"] == "How deep?"
    assert len(known) == 3
    assert caption(folder, "-r", "--redo", "prompt = 'How deep?'") == 1
    assert engine.answered == 4


def test_a_manifest_is_none_from_the_moment_its_removal_begins(
    caption, pictures, engine, monkeypatch
):
    """Without the file beside it, a database of a run that was killed may be damaged."""
    folder = pictures("a.png", "sub/b.png")
    assert caption(folder / "sub", *APPEND) == 0
    inner, remove = folder / "sub" / STATE_FOLDER / "manifest.sqlite", Path.unlink
    inner.with_name("manifest.sqlite-wal").touch()

    def killed(path, **named):
        remove(path, **named)
        if path.name.startswith(inner.name) and path.parent == inner.parent:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert caption(folder, "-r", *APPEND) == 130
    assert not inner.exists()
    assert caption(folder, "-r", *APPEND) == 0
    assert engine.answered == 2


def test_a_set_in_this_one_that_nobody_can_write(caption, pictures, engine, monkeypatch):
    folder = pictures("a.png", "sub/b.png")
    (folder / "sub" / "b.txt").write_text("mine", encoding="utf-8")
    assert caption(folder / "sub", *APPEND) == 0
    before = {path: path.read_bytes() for path in folder.rglob("sub/**/*") if path.is_file()}
    open_file = os.open

    def read_only(path, flags, *rest, **named):
        if flags & os.O_RDWR and Path(path).is_relative_to(folder / "sub"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_file(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        for _ in range(2):
            assert caption(folder, "-r", *APPEND) == 0
    assert engine.answered == 2
    assert before.items() == {path: path.read_bytes() for path in before}.items()
    assert caption(folder, "-r", *APPEND) == 0
    assert engine.answered == 2
    assert manifests(folder) == [".qwencli/manifest.sqlite"]


def test_a_look_takes_nothing_over(caption, pictures, capsys):
    folder = pictures("a.png", "sub/b.png")
    assert caption(folder / "sub", *APPEND) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert caption(folder, "-r", *APPEND, "--dry-run") == 0
    assert "1 to caption, 1 with a caption" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_look_at_what_a_killed_run_was_writing(caption, pictures, capsys):
    folder = pictures("a.png", "sub/b.png")
    assert caption(folder, "-r") == 0
    with closing(sqlite3.connect(folder / STATE_FOLDER / "manifest.sqlite")) as db, db:
        db.execute("UPDATE captions SET status = 'writing'")
    capsys.readouterr()
    assert caption(folder / "sub", "--dry-run") == 0
    said = capsys.readouterr().err
    assert "0 to caption, 1 with a caption" in said and "error" not in said


@pytest.mark.skipif(not hasattr(os, "chown") or os.geteuid() != 0, reason="needs another user")
def test_a_manifest_above_that_is_somebody_elses_is_not_used(caption, pictures):
    folder = pictures("a.png", "sub/b.png")
    assert caption(folder) == 0
    for path in (folder / STATE_FOLDER, *(folder / STATE_FOLDER).iterdir()):
        os.chown(path, 12345, 12345)
    assert caption(folder / "sub") == 0
    assert (folder / "sub" / STATE_FOLDER).is_dir()


def test_a_manifest_of_before_is_read(caption, pictures, engine):
    folder = pictures("a.png", "sub/b.png")
    assert caption(folder, "-r", *APPEND) == 0
    as_version_1(folder / STATE_FOLDER / "manifest.sqlite")
    assert caption(folder, "-r", *APPEND) == 0
    assert engine.answered == 2
    assert caption(folder, "-r", "--redo", "path = 'a.png'") == 0
    assert engine.answered == 3


@pytest.mark.parametrize("output", ["out", "t.jsonl"])
def test_a_manifest_of_before_with_captions_of_two_folders(
    caption, pictures, engine, tmp_path, output
):
    folders = pictures("p.png", folder="a"), pictures("q.png", folder="b")
    options = ("--output", tmp_path / output, *APPEND)
    for each in folders:
        assert caption(each, *options) == 0
    name = "manifest.sqlite" if output == "out" else f"{output}.sqlite"
    [manifest] = tmp_path.rglob(name)
    as_version_1(manifest)
    for each in folders * 2:
        assert caption(each, *options) == 0
    assert engine.answered == 2


def as_version_1(path):
    columns = (
        "key, field, sample, status, caption, written, kept, reason, hint, size, mtime_ns, run, "
        "time, prompt_hash, seed, attempts, finish_reason, num_prompt_tokens, num_image_tokens, "
        "num_new_tokens, e2e_s"
    )
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP VIEW entries")
        db.execute("ALTER TABLE captions RENAME TO newer")
        db.execute(
            f"CREATE TABLE captions ({columns}, PRIMARY KEY (key, field, sample)) WITHOUT ROWID"
        )
        db.execute(f"INSERT INTO captions SELECT {columns} FROM newer")
        db.execute("DROP TABLE newer")
        db.execute("CREATE VIEW entries AS SELECT key AS path FROM captions")
        db.execute("PRAGMA user_version = 1")


def test_two_folders_into_one(caption, pictures, engine, tmp_path):
    one, other = pictures("p.png", folder="a"), pictures("p.png", "q.png", folder="b")
    out = tmp_path / "out"
    assert caption(one, "--output", out) == 0
    text = captions(out)["p.txt"]
    assert caption(other, "--output", out) == 1
    (row,) = failures(out)
    assert row["reason"].endswith("p.txt is the caption of ../a/p.png")
    assert captions(out)["p.txt"] == text and "q.txt" in captions(out)
    assert caption(other, "--output", out, "--existing", "overwrite") == 1
    assert captions(out)["p.txt"] == text
    # Whose it was is gone: as where a folder is renamed.
    shutil.rmtree(one)
    assert caption(other, "--output", out) == 0
    assert not failures(out)
    assert caption(other, "--output", out, "--existing", "overwrite") == 0
    draw(one / "p.png")
    assert caption(one, "--output", out) == 1


def test_an_output_in_the_folder_itself(caption, pictures, engine):
    folder = pictures("a.png")
    assert caption(folder, "--prompt", "One?") == 0
    assert caption(folder, "--prompt", "Two?", "--output", folder / "more") == 0
    assert caption(folder, "--prompt", "Two?", "--existing", "append") == 0
    assert caption(folder, "--prompt", "Two?", "--existing", "append") == 0
    assert engine.answered == 3
    assert sorted(captions(folder)) == ["a.txt", "more/a.txt"]


def test_a_field_whose_file_is_the_caption_of_another_picture(caption, pictures):
    folder = pictures("a.tags.png")
    assert caption(folder) == 0
    text = captions(folder)["a.tags.txt"]
    draw(folder / "a.png")
    options = ("--field", "caption=What?", "--field", "tags=Tags?")
    assert caption(folder, "--glob", "a.png", *options, "--existing", "overwrite") == 1
    (row,) = failures(folder)
    assert row["path"] == "a.png"
    assert row["reason"].endswith("a.tags.txt is the caption of a.tags.png")
    assert captions(folder) == {"a.tags.txt": text}


def test_a_twin_that_comes_later_does_not_take_the_caption(caption, pictures, engine):
    folder = pictures("a.png")
    assert caption(folder) == 0
    draw(folder / "a.jpg")  # listed before the other
    assert caption(folder) == 1
    assert [row["path"] for row in failures(folder)] == ["a.jpg"]
    assert engine.answered == 1


@pytest.mark.parametrize("statement", ["CREATE TABLE runs (x)", "PRAGMA user_version = 2"])
def test_a_database_of_something_else_is_one_line(caption, pictures, capsys, statement):
    folder = pictures("a.png")
    path = folder / STATE_FOLDER / "manifest.sqlite"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)
    before = path.read_bytes()
    assert caption(folder) == 1
    said = capsys.readouterr().err
    assert f"{path} is a database of something else" in said and "move it away" in said
    assert path.read_bytes()[100:] == before[100:]


def test_a_file_in_the_place_of_the_manifests_folder(caption, pictures, capsys):
    folder = pictures("a.png")
    (folder / STATE_FOLDER).touch()
    assert caption(folder) == 1
    assert f"{folder / STATE_FOLDER} is a file" in capsys.readouterr().err


def test_failures_of_two_outputs_stand_beside_each_other(caption, pictures):
    folder = pictures("a.png")
    (folder / "bad.png").write_bytes(b"no picture")
    outputs = [(), ("--output", folder / "m.jsonl"), ("--caption-extension", ".cap")]
    for options in outputs:
        assert caption(folder, *options) == 1
    assert {row["output"] for row in failures(folder)} == {".txt", "m.jsonl", ".cap"}
    draw(folder / "bad.png")
    assert caption(folder) == 0
    assert {row["output"] for row in failures(folder)} == {"m.jsonl", ".cap"}


def test_failures_of_pictures_that_are_gone_are_forgotten(caption, pictures):
    folder = pictures("a.png")
    (folder / "bad.png").write_bytes(b"no picture")
    assert caption(folder, folder / "never.png") == 1
    assert {row["path"] for row in failures(folder)} == {"bad.png", "never.png"}
    (folder / "bad.png").unlink()
    assert caption(folder) == 0
    assert not failures(folder)


def test_a_failure_is_none_where_there_is_a_caption_since(caption, pictures):
    folder = pictures("a.png")
    (folder / "bad.png").write_bytes(b"no picture")
    assert caption(folder) == 1
    (folder / "bad.txt").write_text("mine")
    assert caption(folder) == 0
    assert not failures(folder)


def test_a_linked_folder_keeps_the_set_of_its_own(caption, pictures, engine, tmp_path):
    folder, real = pictures("a.png"), pictures("b.png", folder="real")
    (real / "b.txt").write_text("mine", encoding="utf-8")
    try:
        (folder / "door").symlink_to(real, target_is_directory=True)
    except OSError:
        pytest.skip("this system has no symbolic links")
    assert caption(real, *APPEND, "--prompt", "One?") == 0
    for _ in range(2):
        assert caption(folder, "-r", *APPEND, "--prompt", "One?") == 0
    assert engine.answered == 2
    for _ in range(2):  # what is known here is newer than there
        assert caption(folder, "-r", *APPEND, "--prompt", "Two?") == 0
    assert engine.answered == 4
    lock = held(real)
    try:
        assert caption(folder, "-r", *APPEND) == 1
    finally:
        lock.release()
    assert manifests(real) == [".qwencli/manifest.sqlite"]
    with closing(sqlite3.connect(folder / STATE_FOLDER / "manifest.sqlite")) as db:
        assert db.execute("SELECT count(*) FROM runs").fetchone()[0] == 3


def test_a_linked_folder_is_told_what_was_captioned_through_the_link(caption, pictures, engine):
    folder, real = pictures("a.png"), pictures("b.png", "sub/c.png", folder="real")
    (real / "b.txt").write_text("mine", encoding="utf-8")
    try:
        (folder / "door").symlink_to(real, target_is_directory=True)
    except OSError:
        pytest.skip("this system has no symbolic links")
    assert caption(folder, "-r", *APPEND, "--prompt", "One?") == 0
    assert engine.answered == 3
    texts = [(real / name).read_text() for name in ("b.txt", "sub/c.txt")]
    assert caption(real, "-r", *APPEND, "--prompt", "One?") == 0
    assert caption(real / "sub", *APPEND, "--prompt", "One?") == 0
    assert caption(folder, "-r", *APPEND, "--prompt", "One?") == 0
    assert engine.answered == 3
    assert [(real / name).read_text() for name in ("b.txt", "sub/c.txt")] == texts
    assert manifests(real) == [".qwencli/manifest.sqlite"]


@pytest.mark.parametrize("key", ["../evil.png", "x/../../evil.png", "{}/evil.png"])
def test_a_manifest_that_came_with_a_set_writes_nothing_outside(caption, pictures, tmp_path, key):
    folder = pictures("a.png")
    assert caption(folder) == 0
    key = key.format(tmp_path)
    with closing(sqlite3.connect(folder / STATE_FOLDER / "manifest.sqlite")) as db, db:
        db.execute(
            "UPDATE captions SET status = 'writing', key = ?, place = ?",
            (key, key.replace(".png", ".txt")),
        )
    assert caption(folder) == 0
    assert not list(tmp_path.rglob("evil*"))
