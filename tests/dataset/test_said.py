"""What a run over a set says of itself: estimates, notes, counts, and where Ctrl-C left it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qwencli.answer_report import shortfall, stats_line
from qwencli.cli import run
from qwencli.dataset.progress import Rate
from qwencli.messages import GenerationRequest, user_message
from tests.dataset.conftest import failures


def test_little_time_is_said_as_such(caption, pictures, capsys):
    """It was "about 0 s"."""
    rate = Rate(10.0, 600, "cpu", "2026-11-29")
    assert rate.estimate(3).startswith("less than a second, at the 10.00 captions/s")
    assert caption(pictures(*(f"{n}.png" for n in range(9)))) == 0
    assert caption(pictures("a.png", folder="more")) == 0
    err = capsys.readouterr().err
    assert " 0 s" not in err and "1 picture or video: 1 to caption" in err


def test_failures_of_another_folder_are_not_said_to_be_this_runs(caption, pictures, capsys):
    """A run without a failure ended in "what failed, and why"."""
    folder = pictures("good/a.png", "bad/b.png")
    (folder / "bad" / "c.png").write_bytes(b"no picture")
    assert caption(folder, "-r") == 1
    assert "what failed, and why: " in capsys.readouterr().err
    pictures("good/d.png")
    assert caption(folder / "good") == 0
    err = capsys.readouterr().err
    assert f"what failed in other runs, and why: {folder / 'failures.jsonl'}\n" in err
    assert "what failed, and why" not in err
    assert caption(folder / "bad") == 1
    assert "what failed, and why: " in capsys.readouterr().err


def test_what_we_write_ourselves_is_not_said_to_be_left_out(caption, pictures, capsys):
    folder = pictures("a.png")
    assert run(["dataset", "report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    (folder / "b.png").write_bytes(b"no picture")
    assert caption(folder) == 1 and (folder / "failures.jsonl").is_file()
    assert caption(folder) == 1
    assert "left out" not in capsys.readouterr().err


def test_a_condition_that_nothing_meets_is_said(caption, pictures, capsys):
    """Paths are from the folder of the manifest, whatever folder is named."""
    folder = pictures("cats/a.png", "b.png")
    assert caption(folder, "-r") == 0
    capsys.readouterr()
    said = "note: --redo: no record of these captions meets the condition\n"
    assert caption(folder / "cats", "--redo", "path = 'a.png'", "--dry-run") == 0
    assert said in capsys.readouterr().err
    assert caption(folder / "cats", "--redo", "path = 'cats/a.png'", "--dry-run") == 0
    err = capsys.readouterr().err
    assert "1 to caption" in err and said not in err


def test_a_schema_has_a_rate_of_its_own(caption, pictures, tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object"}))
    assert caption(pictures(*(f"{n}.png" for n in range(9)))) == 0
    assert caption(pictures("a.png", folder="more"), "--schema", schema, "--dry-run") == 0
    assert "estimate: none yet" in capsys.readouterr().err


def test_notes_of_pictures_shown_smaller_are_in_the_summary(caption, pictures, engine, capsys):
    original = engine._chunk
    notes = iter(
        [("a picture of 90x80 is shown as 32x32",), ("a picture of 7x8 is shown as 3x4",), ()]
    )

    def chunk(request):
        made = original(request)
        return replace(made, result=replace(made.result, notes=next(notes)))

    engine._chunk = chunk
    assert caption(pictures("a.png", "b.png", "c.png")) == 0
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("note: a.png")
    ]
    assert lines == ["note: a.png and 1 more: a picture of 90x80 is shown as 32x32"]


def test_counts_of_one(engine, caption, pictures, capsys):
    [result] = [chunk.result for chunk in engine.stream(GenerationRequest((user_message("a"),)))]
    one = replace(result, token_ids=(1,), finish_reason="length")
    for speed, said in ((5.0, " at 5.0 tok/s"), (None, "")):
        timed = replace(one, timings=replace(one.timings, decode_tok_per_s=speed))
        assert stats_line(timed).startswith(f"1 token (cut off){said} | prompt")
    assert "after 1 new token (raise" in shortfall(one)
    folder = pictures("a.png")
    assert caption(folder) == 0
    (folder / "a.png").write_bytes((pictures("b.png", folder="other") / "b.png").read_bytes())
    assert caption(folder) == 0
    assert "note: 1 picture has changed since its caption" in capsys.readouterr().err


def test_ctrl_c_among_several_pictures_says_how_many_are_done(
    caption, pictures, engine, monkeypatch, capsys
):
    folder = pictures("a.png", "b.png", "c.png")
    answers = iter(["A.", "B."])

    def answer(request):
        if (said := next(answers, None)) is None:
            raise KeyboardInterrupt
        return said

    engine.answer = answer
    assert caption(*(folder / name for name in ("a.png", "b.png", "c.png"))) == 130
    out, err = capsys.readouterr()
    assert "B." in out and err.splitlines()[-1].startswith("stopped: 2 of 3 pictures have their")


def test_ctrl_c_while_a_model_loads_says_how_to_go_on(
    caption, pictures, engine, monkeypatch, capsys
):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "load", interrupted)
    assert caption(pictures("a.png", "b.png")) == 130
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "stopped: 0 of 2 captioned (the same command goes on where this one ended)"


def test_reasons_say_which_file_of_which_folder(caption, pictures, engine, capsys):
    folder = pictures("a.png")
    engine.answer = lambda request: "I'm sorry, I can't help."
    assert caption(folder, "--retries", "0") == 1
    (row,) = failures(folder)
    assert row["reason"].startswith(f"{folder / 'a.png'}: refusal")


@pytest.mark.parametrize("name", ["empty.tar", "notes.tar"])
def test_an_archive_without_pictures_is_said(caption, pictures, tmp_path, capsys, name):
    import tarfile

    folder = pictures("a.png")
    (tmp_path / "notes.md").write_text("x")
    with tarfile.open(tmp_path / name, "w") as archive:
        if name != "empty.tar":
            archive.add(tmp_path / "notes.md", "notes.md")
    assert caption(tmp_path / name, folder, "--output", tmp_path / "m.jsonl") == 1
    err = capsys.readouterr().err
    assert f"{tmp_path / name} holds no picture or video" in err and "1 captioned, 1 failed" in err
