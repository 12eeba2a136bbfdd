"""`qwencli caption FOLDER` end to end, on an engine that answers at once."""

from __future__ import annotations

import json
import os
import sqlite3
import sys

import pytest

from tests.dataset.conftest import captions, draw, failures


def test_a_folder_gets_a_file_beside_each_picture(caption, pictures, capsys):
    folder = pictures("a.png", "b.two.jpg", "sub/c.png")
    assert caption(folder) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(captions(folder)) == ["a.txt", "b.two.txt"]
    assert "2 to caption" in err and "2 captioned, 0 failed" in err
    assert all(
        text.startswith("A picture ") and text.endswith(".\n") for text in captions(folder).values()
    )
    assert not (folder / "failures.jsonl").exists()


def test_recursive_keeps_relative_paths(caption, pictures):
    folder = pictures("a.png", "sub/a.png", "sub/deep/a.jpg")
    assert caption(folder, "--recursive") == 0
    assert sorted(captions(folder)) == ["a.txt", "sub/a.txt", "sub/deep/a.txt"]


def test_each_picture_has_its_own_caption(caption, pictures, engine):
    """Many rows that end in another order than they began."""
    from pathlib import Path

    from qwencli.engine.frontend.images import open_image
    from qwencli.messages import GenerationRequest, user_message
    from tests.dataset.fake_engine import said

    folder = pictures(*(f"{n}.png" for n in range(40)))
    assert caption(folder, "--prompt", "Say.", "--greedy") == 0
    for path in folder.glob("*.png"):
        asked = GenerationRequest((user_message("Say.", (open_image(Path(path)),)),))
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == said(asked) + "\n"
    assert 8 < engine.most_held <= 40


def test_what_is_there_is_skipped_by_default(caption, pictures, engine, capsys):
    folder = pictures("a.png", "b.png")
    (folder / "a.txt").write_text("mine\n", encoding="utf-8")
    assert caption(folder) == 0
    assert captions(folder)["a.txt"] == "mine\n"
    assert engine.answered == 1
    assert "1 to caption, 1 with a caption" in capsys.readouterr().err
    assert caption(folder) == 0
    assert engine.answered == 1


def test_an_empty_file_is_no_caption(caption, pictures):
    folder = pictures("a.png")
    (folder / "a.txt").touch()
    assert caption(folder) == 0
    assert captions(folder)["a.txt"] != ""


@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [
        ("overwrite", "mine", "{}"),
        ("append", "cat, dog", "cat, dog, {}"),
        ("append", "A cat.", "A cat. {}"),
        ("prepend", "cat, dog", "{} cat, dog"),
    ],
)
def test_captions_that_are_there(caption, pictures, mode, before, after):
    folder = pictures("a.png", "b.png")
    assert caption(folder, "--greedy") == 0
    said = captions(folder)["a.txt"].strip()
    folder = pictures("a.png", "b.png", folder="again")
    (folder / "a.txt").write_text(before + "\n", encoding="utf-8")
    assert caption(folder, "--existing", mode, "--greedy") == 0
    assert captions(folder)["a.txt"] == after.format(said) + "\n"
    assert captions(folder)["b.txt"].startswith("A picture")


def test_the_same_caption_is_added_once(caption, pictures, engine):
    folder = pictures("a.png")
    (folder / "a.txt").write_text("mine", encoding="utf-8")
    for _ in range(2):
        assert caption(folder, "--existing", "append") == 0
    assert captions(folder)["a.txt"].count("A picture") == 1
    assert caption(folder, "--existing", "append", "--prompt", "Another") == 0
    assert captions(folder)["a.txt"].count("A picture") == 2


def test_why_nothing_is_added_is_said(caption, pictures, engine, capsys):
    folder = pictures("a.png", "b.png")
    assert caption(folder) == 0
    assert "twice" not in capsys.readouterr().err
    for mode in ("append", "prepend"):
        assert caption(folder, "--existing", mode) == 0
        said = (
            f"note: 2 of them have the answer to this same request already, and --existing {mode}"
        )
        assert said in capsys.readouterr().err
    assert caption(folder, "--existing", "prepend", "--prompt", "Another") == 0
    assert "twice" not in capsys.readouterr().err


def test_another_ending(caption, pictures):
    folder = pictures("a.png")
    assert caption(folder, "--caption-extension", "caption") == 0
    assert list(captions(folder, "*.caption")) == ["a.caption"]


@pytest.mark.parametrize("ending", [".png", ".mp4", "/x", ".", ""])
def test_endings_that_are_none(caption, pictures, capsys, ending):
    folder = pictures("a.png")
    assert caption(folder, "--caption-extension", ending) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bad_picture_is_one_row_and_the_rest_is_done(caption, pictures, engine, capsys):
    folder = pictures("a.png", "c.png")
    (folder / "b.jpg").write_bytes(b"no picture")
    assert caption(folder) == 1
    assert sorted(captions(folder)) == ["a.txt", "c.txt"]
    (row,) = failures(folder)
    assert row["path"] == "b.jpg" and "is not a picture" in row["reason"]
    assert "failures.jsonl" in capsys.readouterr().err
    # It would fail again, so it is asked for.
    assert caption(folder) == 1
    assert "1 that failed before" in capsys.readouterr().err
    assert engine.answered == 2
    draw(folder / "b.jpg")
    assert caption(folder, "--retry-failed") == 0
    assert sorted(captions(folder)) == ["a.txt", "b.txt", "c.txt"]
    assert failures(folder) == [] and not (folder / "failures.jsonl").exists()


def test_a_picture_that_was_mended_is_tried_again(caption, pictures):
    folder = pictures()
    (folder / "b.jpg").write_bytes(b"no picture")
    assert caption(folder) == 1
    draw(folder / "b.jpg")
    assert caption(folder) == 0


def test_two_pictures_that_want_one_file(caption, pictures):
    folder = pictures("a.jpg", "a.png", "b.png")
    assert caption(folder) == 1
    assert sorted(captions(folder)) == ["a.txt", "b.txt"]
    (row,) = failures(folder)
    assert row["path"] == "a.png" and "want the same file, a.txt" in row["reason"]
    assert caption(folder) == 1
    # Once the other is gone, nothing stands in its way.
    (folder / "a.jpg").unlink()
    (folder / "a.txt").unlink()
    assert caption(folder) == 0
    assert sorted(captions(folder)) == ["a.txt", "b.txt"] and not failures(folder)


def test_a_pattern_that_nothing_matches_is_named(caption, pictures, capsys):
    assert caption(pictures("a.png"), "--glob", "*.bmp") == 1
    assert "no picture or video there matches *.bmp" in capsys.readouterr().err


def test_the_manifest_knows_where_a_caption_came_from(caption, pictures):
    folder = pictures("a.png")
    assert caption(folder, "--seed", "7", "--prompt", "What?") == 0
    database = sqlite3.connect(folder / ".qwencli" / "manifest.sqlite")
    database.row_factory = sqlite3.Row
    (row,) = map(dict, database.execute("SELECT * FROM entries"))
    database.close()
    text = captions(folder)["a.txt"].strip()
    expected = {
        "path": "a.png", "status": "done", "caption": text, "model": "scenes", "seed": 7,
        "prompt": "What?", "quantization": "none", "finish_reason": "stop", "tokens": 3,
    }  # fmt: skip
    assert expected.items() <= row.items()
    assert row["revision"] and row["version"] and row["time"] and row["prompt_hash"]
    assert row["size"] == (folder / "a.png").stat().st_size
    assert json.loads(row["settings"])["sampling"]["seed"] == 7


def test_dry_run_changes_nothing(caption, pictures, engine, capsys):
    folder = pictures("a.png", "b.png")
    (folder / "b.txt").write_text("mine", encoding="utf-8")
    assert caption(folder, "--dry-run") == 0
    assert engine.answered == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png", "b.txt"]
    assert "1 to caption, 1 with a caption" in capsys.readouterr().err


def test_json_events_are_on_stdout(caption, pictures, capsys):
    folder = pictures("a.png")
    (folder / "b.jpg").write_bytes(b"no picture")
    assert caption(folder, "--json") == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_kind = {event["event"]: event for event in events}
    assert by_kind["caption"]["image"] == str(folder / "a.png")
    assert by_kind["caption"]["caption"] == captions(folder)["a.txt"].strip()
    assert "b.jpg" in by_kind["failure"]["error"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_a_folder_that_takes_no_files(caption, pictures, capsys, monkeypatch):
    from qwencli.dataset import sinks

    folder = pictures("a.png", "sub/b.png")
    write = sinks.write_whole

    def refusing(path, data):
        if path.parent.name == "sub":
            raise PermissionError(13, "Permission denied")
        write(path, data)

    monkeypatch.setattr(sinks, "write_whole", refusing)
    assert caption(folder, "-r") == 1
    assert list(captions(folder)) == ["a.txt"]
    (row,) = failures(folder)
    assert row["path"] == "sub/b.png" and "cannot be written: Permission denied" in row["reason"]


def test_a_folder_in_the_place_of_a_caption_is_no_caption(caption, pictures):
    folder = pictures("a.png", "b.png")
    (folder / "a.txt").mkdir()
    assert caption(folder) == 1
    (row,) = failures(folder)
    assert row["path"] == "a.png" and "cannot be written" in row["reason"]
    assert (folder / "b.txt").is_file()


def test_where_nothing_can_be_written_the_engine_is_left_with_no_request(
    caption, pictures, engine, capsys
):
    folder = pictures(*(f"{number}.png" for number in range(120)))
    for number in range(120):
        (folder / f"{number}.txt").mkdir()
    left, engine.step_s = [], 0.02
    engine.close = lambda: left.append(engine.has_unfinished)
    assert caption(folder, "--existing", "overwrite") == 1
    assert left == [False]
    assert "Traceback" not in capsys.readouterr().err


def test_nothing_named_is_one_line(caption, capsys):
    assert caption() == 2
    assert "Missing argument 'IMAGE...'" in capsys.readouterr().err


def test_a_folder_without_pictures_is_one_line(caption, tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    draw(tmp_path / "inner" / "a.png")
    assert caption(str(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "no picture or video there (--recursive looks into its folders too)" in said
    assert not (tmp_path / ".qwencli").exists()
    assert caption(str(tmp_path), "--recursive") == 0


def test_names_of_all_kinds(caption, pictures):
    names = ["with space.png", "new\nline.png", "übergröße.png", "日本.png", "x" * 240 + ".png"]
    folder = pictures(*names)
    try:
        (folder / "日本.png").rename(folder / os.fsdecode(b"\xe9.png"))
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    assert caption(folder) == 0
    assert len(list(folder.glob("*.txt"))) == 5
    assert caption(folder) == 0


def test_redo_makes_some_captions_again(caption, pictures, engine):
    folder = pictures("a.png", "b.png", "c.png")
    engine.finish_reason = "length"
    assert caption(folder) == 0
    first = captions(folder)
    (folder / "c.txt").write_text("mine\n", encoding="utf-8")
    assert caption(folder, "--redo", "path = 'b.png' AND finish_reason = 'length'") == 0
    assert engine.answered == 4
    again = captions(folder)
    assert again["a.txt"] == first["a.txt"] and again["c.txt"] == "mine\n"
    assert again["b.txt"] != first["b.txt"]


@pytest.mark.parametrize(
    "condition",
    [
        "",
        "no_such = 1",
        "1); DELETE FROM captions; --",
        "1) UNION SELECT name, 1, 1 FROM sqlite_master --",
        "load_extension('x')",
        "(WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT count(*) FROM n) > 1",
    ],
)
def test_conditions_that_are_none(caption, pictures, engine, capsys, monkeypatch, condition):
    monkeypatch.setattr("qwencli.dataset.manifest_schema._MOST_CONDITION_S", 0.3)
    folder = pictures("a.png")
    assert caption(folder) == 0
    capsys.readouterr()
    assert caption(folder, "--redo", condition) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --redo") and err.count("\n") == 1
    assert engine.answered == 1


def test_a_damaged_manifest_is_one_line(caption, pictures, capsys):
    folder = pictures("a.png")
    (folder / ".qwencli").mkdir()
    (folder / ".qwencli" / "manifest.sqlite").write_bytes(b"not a database" * 100)
    assert caption(folder) == 1
    assert "is damaged" in capsys.readouterr().err


def test_samples_of_a_file_that_is_named_are_printed(caption, pictures, capsys):
    folder = pictures("a.png", "b.png")
    assert caption(folder / "a.png", "--samples", "3", "--seed", "5") == 0
    out = capsys.readouterr().out.splitlines()
    assert len(set(out)) == len(out) == 3
    assert caption(folder / "a.png", folder / "b.png", "--samples", "2", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"].rpartition("/")[2] for row in rows] == ["a.png"] * 2 + ["b.png"] * 2
    assert [row.get("sample", 0) for row in rows] == [0, 1, 0, 1]
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png"]
    for option in ("--greedy", "--multi-image"):
        assert caption(folder / "a.png", "--samples", "2", option) == 2
        assert "--samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--existing", "skip"],
        ["--retry-failed"],
        ["--devices", "cpu"],
        ["--caption-extension", "txt"],
    ],
)
def test_an_option_of_files_keeps_captions_of_files_that_are_named(options):
    from qwencli.commands.caption_options import FolderOptions, is_set

    named = options[0].removeprefix("--").replace("-", "_")
    chosen = FolderOptions(**{named: options[1] if len(options) > 1 else True})
    assert is_set(["a.png"], chosen, None)
    assert not is_set(["a.png"], FolderOptions(samples=2), None)
