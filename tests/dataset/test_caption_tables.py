"""Captions of a set in one file."""

from __future__ import annotations

import csv
import json
import os
import sys

import pytest
from PIL import Image

from tests.dataset.conftest import captions, failures


def rows_of(path):
    """Rows by file name, of any kind of table."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        held = json.loads(path.read_text(encoding="utf-8"))
        rows = [{"file_name": name, "text": about["caption"]} for name, about in held.items()]
    return {row["file_name"]: row["text"] for row in rows}


NAMES = ["metadata.jsonl", "captions.csv", "captions.parquet", "kohya.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_captions(caption, pictures, engine, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    folder = pictures("a.png", "sub/b.png", "c.png")
    (folder / "bad.jpg").write_bytes(b"no picture")
    assert caption(folder, "-r", "--output", folder / name) == 1
    rows = rows_of(folder / name)
    assert list(rows) == ["a.png", "c.png", "sub/b.png"]
    assert all(text.startswith("A picture ") for text in rows.values())
    assert captions(folder) == {}
    assert [row["path"] for row in failures(folder)] == ["bad.jpg"]
    # What is there stays, and what is new is added.
    pictures("d.png")
    assert caption(folder, "-r", "--output", folder / name) == 1
    assert engine.answered == 4
    assert rows_of(folder / name).items() > rows.items()


def test_what_a_table_is_written_with_is_looked_for_before_the_model_loads(
    caption, pictures, engine, monkeypatch, capsys
):
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    folder = pictures("a.png")
    engine.load = lambda: pytest.fail("the model was loaded")
    assert caption(folder, "--output", folder / "captions.parquet") == 1
    err = capsys.readouterr().err
    assert "captions.parquet is a Parquet file: the package pyarrow is not installed" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_others_stay(caption, pictures, name, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    from qwencli.dataset.caption_tables import FORMATS

    folder = pictures("a.png", "b.png", "c.png")
    path = folder / name
    write = FORMATS[path.suffix][1]
    mine = [
        {"file_name": "x.png", "text": 'mine, "quoted"\nover\rlines', "score": "7"},
        {"file_name": "b.png", "text": "ours", "score": "8"},
        {"file_name": "c.png", "text": "", "score": "9"},
    ]
    write(path, dict.fromkeys(("file_name", "text", "score")), mine)
    assert caption(folder, "--output", path, "--existing", "append") == 0
    rows = rows_of(path)
    assert list(rows) == ["x.png", "b.png", "c.png", "a.png"]
    assert rows["x.png"] == mine[0]["text"]
    assert rows["b.png"].startswith("ours, A picture ")
    assert rows["c.png"].startswith("A picture ")
    assert "9" in path.read_text(encoding="latin-1")


def test_a_folder_for_the_files(caption, pictures, tmp_path):
    folder = pictures("a.png", "sub/b.png")
    out = tmp_path / "out"
    assert caption(folder, "-r", "--output", out) == 0
    assert sorted(captions(out)) == ["a.txt", "sub/b.txt"]
    assert captions(folder) == {} and not (folder / ".qwencli").exists()


def test_samples_are_several_captions(caption, pictures):
    folder = pictures("a.png")
    assert caption(folder, "--samples", "3", "--seed", "5") == 0
    found = captions(folder)
    assert sorted(found) == ["a.2.txt", "a.3.txt", "a.txt"]
    assert len(set(found.values())) == 3
    assert caption(folder, "--samples", "2", "--output", folder / "m.jsonl") == 0
    (row,) = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    assert sorted(row) == ["file_name", "text", "text_2"]


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("m.jsonl", "{", "cannot be read"),
        ("m.jsonl", "[]\n", "line 1"),
        ("m.csv", "a,b\n1,2\n", "no column file_name"),
        ("m.csv", "file_name,text\na,b,c,d\n", "more fields"),
        ("m.json", "[1]", "not a JSON object"),
        ("m.json", '{"a": 3}', "cannot be read"),
        ("m.parquet", "PAR1", "cannot be read"),
    ],
)
def test_a_file_that_is_something_else_is_kept(caption, pictures, capsys, name, text, part):
    folder = pictures("a.png")
    (folder / name).write_text(text, encoding="utf-8")
    assert caption(folder, "--output", folder / name) == 1
    err = capsys.readouterr().err
    assert part in err and "Traceback" not in err
    assert (folder / name).read_text(encoding="utf-8") == text


def test_an_ending_that_is_none(caption, pictures, capsys):
    assert caption(pictures("a.png"), "--output", "x.xlsx") == 2
    assert ".jsonl, .csv, .parquet, .json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "part"),
    [(["file_name=What?"], "column of paths"), (["caption=A?", "text=B?"], "go to one place")],
)
def test_fields_that_are_columns_already(caption, pictures, capsys, fields, part):
    folder = pictures("a.png")
    options = [each for field in fields for each in ("--field", field)]
    assert caption(folder, *options, "--output", folder / "m.jsonl") == 2
    assert part in capsys.readouterr().err
    assert not (folder / "m.jsonl").exists()


def test_what_a_killed_run_left_is_not_taken_for_pictures_of_another_folder(
    caption, pictures, tmp_path
):
    import sqlite3
    from contextlib import closing

    one, other = pictures("p.png", folder="a"), pictures("p.png", folder="b")
    Image.new("RGB", (32, 32), "red").save(other / "p.png")
    table = tmp_path / "o.jsonl"
    assert caption(one, "--output", table) == 0
    right = rows_of(table)["a/p.png"]
    # As a run leaves it that was killed before the table was brought up to date.
    with closing(sqlite3.connect(tmp_path / ".qwencli" / "o.jsonl.sqlite")) as db, db:
        db.execute("UPDATE captions SET status = 'writing'")
    table.unlink()
    assert caption(other, "--output", table) == 0
    assert list(rows_of(table)) == ["b/p.png"] and rows_of(table)["b/p.png"] != right
    assert caption(one, "--output", table) == 0
    assert rows_of(table)["a/p.png"] == right and len(rows_of(table)) == 2


def test_failures_of_two_folders_in_one_place(caption, pictures, tmp_path):
    for name in ("a", "b"):
        (pictures("good.png", folder=name) / "bad.png").write_bytes(b"no picture")
        assert caption(tmp_path / name, "--output", tmp_path / "o" / "m.jsonl") == 1
    assert [row["path"] for row in failures(tmp_path / "o")] == ["../a/bad.png", "bad.png"]


def test_captions_on_another_drive(caption, pictures, tmp_path, monkeypatch):
    def relpath(path, start=os.curdir):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    folder, out = pictures("a.png"), tmp_path / "out"
    monkeypatch.setattr(os.path, "relpath", relpath)
    assert caption(folder, "--output", out) == 0
    assert list(captions(out)) == ["a.txt"]
    assert caption(folder, "--output", out / "m.jsonl") == 0
    assert list(rows_of(out / "m.jsonl")) == [f"{folder.as_posix()}/a.png"]


def test_names_that_are_no_text(caption, pictures, engine):
    folder = pictures("a.png")
    try:
        (folder / "a.png").rename(folder / "\udce9.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    for name in NAMES:
        assert caption(folder, "--output", folder / name) == 0
        engine.answered = 0
        # Found again, and written to the same row.
        assert caption(folder, "--output", folder / name) == 0
        assert engine.answered == 0
        assert caption(folder, "--output", folder / name, "--existing", "overwrite") == 0
        assert len(rows_of(folder / name)) == 1
    assert list(rows_of(folder / "metadata.jsonl")) == ["\udce9.png"]


def test_columns_of_others_keep_their_types(caption, pictures):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = pictures("a.png", "b.png")
    path = folder / "m.parquet"
    columns = {
        "file_name": pyarrow.array(["a.png", "x.png"], pyarrow.large_string()),
        "score": pyarrow.array([1.5, None], pyarrow.float32()),
        "made": pyarrow.array([0, 86_400_000], pyarrow.timestamp("ms", "UTC")),
        "box": pyarrow.array([[1, 2], []], pyarrow.list_(pyarrow.int16())),
        "image": [{"bytes": b"\x00\xff", "path": None}, None],
        "text": pyarrow.nulls(2),
    }
    before = pyarrow.table(columns)
    parquet.write_table(before, path)
    assert caption(folder, "--output", path) == 0
    after = parquet.read_table(path)
    mine = ["file_name", "score", "made", "box", "image"]
    assert after.slice(0, 2).select(mine).equals(before.select(mine))
    assert [bool(text) for text in after["text"].to_pylist()] == [True, False, True]
    assert after["score"].to_pylist() == [1.5, None, None]


def test_a_broken_row_of_jsonl_is_said_with_its_line(caption, pictures, capsys):
    """It was line 1 of a file of any length."""
    folder = pictures("a.png")
    table, text = folder / "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{broken\n'
    table.write_text(text)
    assert caption(folder, "--output", table) == 1
    assert "metadata.jsonl is there and cannot be read: line 2 is not JSON" in (
        capsys.readouterr().err
    )
    assert table.read_text() == text
