"""`qwencli dataset report FOLDER` on sets of all kinds."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from qwencli.cli import run


@pytest.fixture
def report(capsys):
    """Runs the command; (exit code, what --json says or None, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = run(["dataset", "report", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in arguments and out else None, err

    return call


def test_a_set_that_was_captioned_here(caption, pictures, engine, report):
    folder = pictures("a.png", "sub/b.png", "c.png", "d.png")
    (folder / "c.png").write_bytes(b"\x89PNG no picture")
    engine.answer = lambda request: "I'm sorry, I can't help."
    assert caption(folder, "--glob", "d.png", "--retries", 0) == 1
    engine.answer = lambda request: "sks, a cat"
    assert caption(folder, "-r", "--field", "mood=What mood?", "-p", "Say.", "--seed", 4) == 1
    (folder / "a.txt").write_text("sks, a dog\n", encoding="utf-8")
    code, found, err = report(folder, "--json", "--trigger", "sks")
    assert code == 0
    assert found["summary"]["pictures"] == 4 and found["summary"]["unreadable"] == 1
    rows = {row["path"]: row for row in found["captions"]}
    assert rows["a.png"]["caption"] == "sks, a dog"
    assert rows["a.png"]["facts"]["edited"] == "was: sks, a cat"
    assert rows["sub/b.png"]["fields"] == {"mood": "sks, a cat"}
    assert rows["sub/b.png"]["facts"]["model"] == "scenes"
    assert rows["sub/b.png"]["facts"]["prompt"] == "Say."
    assert "c.png" in found["unreadable"][0]["path"]
    assert "4 pictures" in err
    assert not (folder / "report.html").exists()


def test_a_set_that_others_have_captioned(pictures, report):
    folder = pictures("a.png", "b.png", "c.png", "d.png")
    (folder / "a.txt").write_text("a cat\n", encoding="utf-8")
    (folder / "b.txt").write_text("A cat.", encoding="utf-8")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "c.png", "text": "from a table"}\nnot json\n[1]\n', encoding="utf-8"
    )
    _, found, _ = report(folder, "--json")
    rows = {row["path"]: row["caption"] for row in found["captions"]}
    assert rows == {"a.png": "a cat", "b.png": "A cat.", "c.png": "from a table", "d.png": None}
    assert found["repeated"] == [{"caption": "a cat", "paths": ["a.png", "b.png"]}]
    assert found["missing"] == ["d.png"]


def test_pictures_without_any_caption_are_told_what_makes_them(pictures, report):
    folder = pictures("a.png")
    (folder / "a.cap").write_text("a cat\n", encoding="utf-8")
    code, _, err = report(folder)
    assert code == 0 and "1 picture, 0 with a caption" in err
    assert f"qwencli caption {folder} makes them" in err and "--caption-extension" in err
    assert "makes them" not in report(folder, "--caption-extension", ".cap")[2]


def test_captions_that_are_in_one_file(caption, pictures, engine, report):
    folder = pictures("a.png")
    engine.answer = lambda request: "a cat"
    assert caption(folder, "--output", folder / "captions.csv") == 0
    (row,) = report(folder, "--json")[1]["captions"]
    assert row["caption"] == "a cat" and row["facts"]["model"] == "scenes"


def test_failures_are_known_from_the_manifest(caption, pictures, engine, report):
    folder = pictures("a.png")
    engine.answer = lambda request: "I'm sorry, I can't help with that."
    assert caption(folder, "--retries", 0) == 1
    assert "refusal" in report(folder, "--json")[1]["failed"][0]["reason"]
    # And from failures.jsonl where that is all there is.
    for file in (folder / ".qwencli").iterdir():
        file.unlink()
    assert "refusal" in report(folder, "--json")[1]["failed"][0]["reason"]
    # A caption that somebody wrote is no failure.
    (folder / "a.txt").write_text("a cat", encoding="utf-8")
    assert report(folder, "--json")[1]["failed"] == []


def test_the_page_lies_in_the_folder(pictures, report, capsys):
    folder = pictures("a.png")
    assert run(["dataset", "report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert '"path":"a.png"' in text and '"link":"a.png"' in text
    # It is no picture of the set.
    assert report(folder, "--json")[1]["summary"]["pictures"] == 1


def test_a_page_elsewhere(pictures, report, tmp_path):
    folder = pictures("a.png")
    code, found, _ = report(folder, "--json", "--output", tmp_path / "new" / "r.html")
    assert code == 0 and found["summary"]["pictures"] == 1
    assert '"link":"../set/a.png"' in (tmp_path / "new" / "r.html").read_text(encoding="utf-8")


def test_names_and_captions_of_all_kinds(pictures, report):
    folder = pictures("ünï çode.png", "a\nb.png", "<script>.png")
    for path in list(folder.glob("*.png")):
        path.with_suffix(".txt").write_text("<b>\u2028\x07 猫", encoding="utf-8")
    if sys.platform == "linux":
        raw = os.fsencode(folder) + b"/\xff.png"
        with open(raw, "wb") as file:  # noqa: PTH123 - a path of bytes
            file.write((folder / "a\nb.png").read_bytes())
    code, found, _ = report(folder, "--json", "--output", folder / "r.html")
    assert code == 0
    assert found["summary"]["captioned"] == 3
    (folder / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: [folder / "none"], "is not a folder"),
        (lambda folder: [folder / "a.png"], "is not a folder"),
        (lambda folder: [folder, "--output", folder / "a.png" / "r.html"], "cannot be written"),
        (lambda folder: [folder, "--caption-extension", ".png"], "pictures"),
    ],
)
def test_what_cannot_be_done_is_one_line(pictures, report, prepare, says):
    folder = pictures("a.png")
    code, _, err = report(*prepare(folder))
    assert code in (1, 2)
    assert says in err and len(err.strip().splitlines()) == 1


def test_a_damaged_manifest(pictures, report):
    folder = pictures("a.png")
    (folder / ".qwencli").mkdir()
    (folder / ".qwencli/manifest.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    code, _, err = report(folder)
    assert code == 1 and "manifest.sqlite" in err


def test_a_caption_file_that_is_no_text(pictures, report):
    folder = pictures("a.png", "b.png")
    (folder / "a.txt").write_bytes(b"\xff\xfe\0")
    _, found, _ = report(folder, "--json")
    assert "a.txt" in found["failed"][0]["reason"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_regular_file_is_not_waited_for(pictures, report, monkeypatch):
    monkeypatch.setattr("qwencli.engine.frontend.media_files._PIPE_WAIT_S", 60.0)
    folder = pictures("a.png")
    os.mkfifo(folder / "b.png")
    began = time.monotonic()
    _, found, _ = report(folder, "--json")
    assert time.monotonic() - began < 50
    assert "not a regular file" in found["unreadable"][0]["reason"]


def test_nothing_is_made_of_an_empty_folder_or_of_a_file_that_is_no_page(
    tmp_path, pictures, report
):
    code, found, err = report(tmp_path, "--output", tmp_path / "r.html")
    assert (code, found) == (1, None) and "no picture or video there" in err
    assert list(tmp_path.iterdir()) == []
    folder = pictures("a.png")
    (folder / "a.txt").write_text("a cat\n", encoding="utf-8")
    code, _, err = report(folder, "--output", folder / "a.txt")
    assert code == 2 and "is no HTML page" in err
    assert (folder / "a.txt").read_text(encoding="utf-8") == "a cat\n"
    assert report(folder)[0] == 0
    assert report(folder)[0] == 0, "its own page is written anew"


def test_the_caption_of_a_twin_is_not_shown_as_the_refused_pictures(caption, pictures, report):
    folder = pictures("a.jpg", "a.png")
    assert caption(folder) == 1
    _, found, _ = report(folder, "--json")
    rows = {row["path"]: row["caption"] for row in found["captions"]}
    assert rows["a.jpg"].startswith("A picture") and rows["a.png"] is None
    (failed,) = found["failed"]
    assert failed["path"] == "a.png" and "a.jpg want the same file" in failed["reason"]
    # What nobody knows the owner of is read by trainers for both.
    (folder / "a.txt").unlink()
    assert caption(folder, "--glob", "none.*", "--existing", "skip") == 1
    (folder / "b.txt").write_text("mine", encoding="utf-8")
    pictures("b.jpg", "b.png")
    _, found, _ = report(folder, "--json")
    rows = {row["path"]: row["caption"] for row in found["captions"]}
    assert rows["b.jpg"] == rows["b.png"] == "mine"


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_folder_in_a_set_and_a_set_in_a_folder(caption, pictures, report, inner_first):
    folder = pictures("a.png", "sub/b.png")
    (folder / "sub" / "bad.png").write_bytes(b"no picture")
    captioned, looked_at = (folder / "sub", folder) if inner_first else (folder, folder / "sub")
    assert caption(captioned, "-r", "--prompt", "Say.") == 1
    _, found, _ = report(looked_at, "--json")
    rows = {row["path"].rpartition("/")[2]: row for row in found["captions"]}
    assert rows["b.png"]["facts"]["prompt"] == "Say."
    assert found["failed"][0]["path"] == ("sub/bad.png" if inner_first else "bad.png")


def test_links_of_a_page_that_lies_behind_a_link(pictures, tmp_path, report):
    folder = pictures("a.png")
    (tmp_path / "deep" / "place").mkdir(parents=True)
    try:
        (tmp_path / "door").symlink_to(tmp_path / "deep" / "place", target_is_directory=True)
    except OSError:
        pytest.skip("this system has no symbolic links")
    assert report(folder, "--output", tmp_path / "door" / "r.html")[0] == 0
    assert '"link":"../../set/a.png"' in (tmp_path / "door" / "r.html").read_text(encoding="utf-8")


def test_a_folder_of_captions_alone_shows_the_pictures_they_are_of(caption, pictures, report):
    folder = pictures("one/a.png", "two/b.png", "two/c.png")
    out = folder.parent / "captions"
    for name in ("one", "two"):
        assert caption(folder / name, "--output", out, "--prompt", f"{name}?") == 0
    (out / "b.txt").write_text("Mine.")
    (folder / "two" / "c.png").unlink()
    _, found, _ = report(out, "--json")
    rows = {row["path"]: row for row in found["captions"]}
    assert set(rows) == {f"../{folder.name}/one/a.png", f"../{folder.name}/two/b.png"}
    first, second = (rows[name] for name in sorted(rows))
    assert first["caption"].startswith("A picture") and first["facts"]["prompt"] == "one?"
    assert second["caption"] == "Mine." and "was: " in second["facts"]["edited"]
    assert report(out)[0] == 0
    assert f'"link":"../{folder.name}/one/a.png"' in (out / "report.html").read_text("utf-8")


def test_captions_that_went_elsewhere_are_not_those_of_the_folder(caption, pictures, report):
    folder = pictures("a.png", "b.png")
    assert caption(folder, "--glob", "a.png", "--prompt", "One?") == 0
    assert caption(folder, "--prompt", "Two?", "--output", folder / "more") == 0
    _, found, _ = report(folder, "--json")
    rows = {row["path"]: row for row in found["captions"]}
    assert rows["a.png"]["facts"]["prompt"] == "One?" and "edited" not in rows["a.png"]["facts"]
    assert rows["b.png"]["caption"] is None
