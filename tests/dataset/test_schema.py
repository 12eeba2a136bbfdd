"""`qwencli caption --schema`: captions that are data, and boxes in a picture's own pixels."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwencli.dataset import boxes
from qwencli.dataset.sources import CAPTION, Slot
from qwencli.models.families import FAMILIES
from tests.dataset.conftest import captions, failures

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "count": {"type": "integer"}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
GOOD = '{"kind": "cat", "count": 2}'


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    return path


@pytest.fixture
def asked(engine):
    """Requests, each answered by `answers[attempt]`, the last one for all that follow."""
    requests = []

    def give(*answers):
        def answer(request):
            requests.append(request)
            text = answers[min(len(requests), len(answers)) - 1]
            engine.finish_reason = "length" if text.endswith("...") else "stop"
            return text.removesuffix("...")

        engine.answer = answer
        return requests

    return give


def test_captions_are_json_in_files_of_their_own(caption, pictures, asked, schema):
    requests = asked(GOOD)
    folder = pictures("a.png", "b/c.png")
    assert caption(folder, "--recursive", "--schema", schema) == 0
    assert captions(folder, "**/*.json") == {"a.json": GOOD + "\n", "b/c.json": GOOD + "\n"}
    assert [json.loads(each.schema) for each in requests] == [SCHEMA, SCHEMA]
    assert "kind, count" in requests[0].messages[-1].parts[-1].text
    assert caption(folder, "--recursive", "--schema", schema) == 0
    assert len(requests) == 2


def test_other_endings_and_one_file_for_all(caption, pictures, asked, schema):
    asked(GOOD)
    folder = pictures("a.png")
    assert caption(folder, "--schema", schema, "--caption-extension", ".txt") == 0
    assert captions(folder) == {"a.txt": GOOD + "\n"}
    assert caption(folder, "--schema", schema, "--output", folder / "metadata.jsonl") == 0
    row = json.loads((folder / "metadata.jsonl").read_text())
    assert json.loads(row["text"]) == {"kind": "cat", "count": 2}


def test_one_picture_is_printed(caption, pictures, asked, schema, capsys):
    asked(GOOD)
    assert caption(pictures("a.png") / "a.png", "--schema", schema) == 0
    assert capsys.readouterr().out == GOOD + "\n"


def test_an_answer_that_is_cut_off_is_asked_for_again_with_more_tokens(
    caption, pictures, asked, schema
):
    requests = asked('{"kind": "ca...', '{"kind": "cat", "cou...', GOOD)
    folder = pictures("a.png")
    assert caption(folder, "--schema", schema, "--max-new-tokens", 10) == 0
    assert [each.sampling.max_new_tokens for each in requests] == [10, 20, 40]
    assert captions(folder, "*.json") == {"a.json": GOOD + "\n"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('{"kind": "ca...', "truncated"),
        ('{"kind": "cow", "count": 2}', "schema"),
        ("A cat.", "schema: not JSON"),
        ("", "empty"),
    ],
)
def test_what_does_not_meet_the_schema_is_never_written(
    caption, pictures, asked, schema, answer, reason
):
    asked(answer)
    folder = pictures("a.png")
    assert caption(folder, "--schema", schema, "--guards", "none", "--retries", 1) == 1
    assert captions(folder, "*.json") == {}
    assert reason in failures(folder)[0]["reason"]


def test_a_number_that_may_be_cut_off_is_no_answer(caption, pictures, asked, tmp_path):
    path = tmp_path / "number.json"
    path.write_text('{"type": "integer"}')
    requests = asked("12...", "123")
    folder = pictures("a.png")
    assert caption(folder, "--schema", path) == 0
    assert (captions(folder, "*.json"), len(requests)) == ({"a.json": "123\n"}, 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prefix", "x"], "--prefix and --schema exclude"),
        (["--starts-with", "x"], "--starts-with and --schema exclude"),
        (["--max-sentences", 1], "--max-sentences and --schema exclude"),
        (["--stop", "x"], "--stop and --schema exclude"),
        (["--existing", "append"], "--existing append and --schema exclude"),
        (["--prompt", "See {hints}"], "--caption-extension"),
        (["--overlay", "out"], "--schema boxes"),
    ],
)
def test_what_does_not_go_with_a_schema(
    caption, engine, pictures, schema, capsys, arguments, reason
):
    assert caption(pictures("a.png"), "--schema", schema, *arguments) == 2
    assert reason in capsys.readouterr().err
    assert engine.answered == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"type": "string", "uniqueItems": true}', "'uniqueItems' at #"),
        (b'{"type": "integer", "minimum": 2, "maximum": 1}', "nothing can meet it"),
        (None, "No such file"),
        (b" " * (1 << 20) + b"{}", "too large"),
    ],
)
def test_a_bad_schema_is_told_before_the_model_loads(
    caption, pictures, monkeypatch, tmp_path, capsys, content, reason
):
    monkeypatch.setattr("qwencli.engine.factory.create_engine", lambda config: pytest.fail("loads"))
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    assert caption(pictures("a.png"), "--schema", path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--schema {path}" in said and reason in said


# ---- boxes ----


def box(x1, y1, x2, y2, label="cat"):
    return {"bbox_2d": [x1, y1, x2, y2], "label": label}


@pytest.mark.parametrize(
    ("found", "size", "resized", "grid", "expected"),
    [
        (box(0, 0, 1000, 1000), (640, 480), (640, 480), 1000, [0, 0, 640, 480]),
        (box(500, 250, 750, 500), (400, 200), (1, 1), 1000, [200, 50, 300, 100]),
        (box(100, 100, 200, 150), (1000, 600), (500, 300), None, [200, 200, 400, 300]),
        (box(750, 500, 500, 250), (400, 200), (1, 1), 1000, [200, 50, 300, 100]),
        (box(900, 900, 5000, 5000), (100, 50), (1, 1), 1000, [90, 45, 100, 50]),
        (box(500, 500, 500, 500), (100, 100), (1, 1), 1000, [50, 50, 51, 51]),
        (box(1000, 1000, 1000, 1000), (100, 100), (1, 1), 1000, [99, 99, 100, 100]),
        (box(1500, 0, 1600, 100), (100, 100), (1, 1), 1000, None),
    ],
)
def test_boxes_are_in_pixels_of_the_picture(found, size, resized, grid, expected):
    written = json.loads(boxes.in_pixels(json.dumps([found]), size, resized, grid))
    assert written == ([] if expected is None else [found | {"bbox_2d": expected}])


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 99999), min_size=4, max_size=4),
    st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    st.sampled_from([None, 1000]),
)
def test_every_box_lies_in_its_picture(corners, size, resized, grid):
    answer = json.dumps([{"bbox_2d": corners, "label": "\u732b"}], ensure_ascii=False)
    for each in json.loads(boxes.in_pixels(answer, size, resized, grid)):
        x1, y1, x2, y2 = each["bbox_2d"]
        assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]


def test_families_count_as_their_models_were_trained():
    grids = {name: family.box_grid for name, family in FAMILIES.items() if family.vision}
    assert grids["qwen2_5_vl"] is None
    assert set(grids.values()) - {None} == {1000}


def test_boxes_of_a_set_and_what_is_drawn(caption, engine, pictures, capsys):
    asked = []

    def answer(request):
        asked.append(request)
        return json.dumps([box(250, 250, 750, 1000, "a long label"), box(0, 0, 10, 10, "\u732b")])

    engine.answer = answer
    folder = pictures("a.png", "b/c.jpg")
    assert caption(folder, "--recursive", "--schema", "boxes") == 0
    for name in ("a.json", "b/c.json"):
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        assert found == [box(8, 8, 24, 32, "a long label"), box(0, 0, 1, 1, "\u732b")]
    drawn = folder / ".qwencli" / "overlays"
    assert captions_of(drawn) == ["a.png", "b/c.png"]
    with Image.open(drawn / "a.png") as one, Image.open(folder / "a.png") as plain:
        assert one.size == plain.size and one.tobytes() != plain.convert("RGB").tobytes()
    assert f"pictures with their boxes: {drawn}" in capsys.readouterr().err
    assert json.loads(asked[0].schema)["items"]["properties"]["bbox_2d"]["items"]["maximum"] == 1000
    # They are no pictures of the set.
    assert caption(folder, "--recursive", "--schema", "boxes") == 0
    assert len(asked) == 2


def captions_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_where_boxes_are_drawn(caption, engine, pictures, tmp_path, capsys):
    engine.answer = lambda request: json.dumps([box(0, 0, 500, 500)])
    folder, out = pictures("a.png", "a.jpg"), tmp_path / "out"
    assert caption(folder / "a.png", "--schema", "boxes") == 0
    assert json.loads(capsys.readouterr().out) == [box(0, 0, 16, 16)]
    assert captions_of(folder) == ["a.png"]
    both = (folder / "a.png", folder / "a.jpg")
    assert caption(*both, "--schema", "boxes", "--overlay", out) == 0
    assert captions_of(out) == ["a.jpg.png", "a.png"]
    table = folder / "boxes.jsonl"
    assert caption(folder, "--schema", "boxes", "--overlay", "none", "--output", table) == 0
    assert not (folder / ".qwencli" / "overlays").exists()


def test_an_overlay_that_cannot_be_written_is_told_and_captions_stay(
    caption, engine, pictures, tmp_path, capsys
):
    engine.answer = lambda request: json.dumps([box(0, 0, 500, 500)])
    folder, place = pictures("a.png"), tmp_path / "place"
    (place / "a.png").mkdir(parents=True)
    assert caption(folder, "--schema", "boxes", "--overlay", place) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert list(captions(folder, "*.json")) == ["a.json"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_an_overlay_folder_that_is_a_file_is_refused_before_the_model_is_loaded(
    caption, engine, pictures, tmp_path, capsys, below
):
    folder, place = pictures("a.png"), tmp_path / "file"
    place.write_text("")
    for named in (folder, folder / "a.png"):
        assert caption(named, "--schema", "boxes", "--overlay", place / below) == 2
        assert "file is a file (name a folder, or none)" in capsys.readouterr().err
    assert captions(folder, "*.json") == {} and engine.answered == 0


def test_a_named_picture_whose_answers_are_cut_off_says_what_to_change(
    caption, pictures, asked, schema, capsys
):
    asked('{"kind": "ca...')
    picture = pictures("a.png") / "a.png"
    assert caption(picture, "--schema", schema, "--retries", 0) == 1
    assert "(try more --max-new-tokens or a schema with bounds)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/b.jpg", "a/b"),
        ("/home/x/b.jpg", "b"),
        ("../up/b.jpg", "up/b"),
        ("https://example.org/x/b.jpg", "b"),
    ],
)
def test_overlays_stay_in_their_folder(key, expected):
    assert boxes.overlay_name(Slot(key, CAPTION, 0)) == expected
    assert boxes.overlay_name(Slot(key, "objects", 1)) == f"{expected}.objects.2"


def test_what_asks_goes_to_other_processes(schema):
    from qwencli.commands.caption_options import CaptionOptions, build_caption_config
    from qwencli.commands.options import RunOptions

    caption_config = build_caption_config(
        CaptionOptions(schema=str(schema)), RunOptions(), None, None
    )
    again = pickle.loads(pickle.dumps(caption_config))
    assert again.schema == caption_config.schema
    assert again.guards.invalid(GOOD) is None and again.guards.invalid("{}")
