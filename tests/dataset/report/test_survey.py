"""What a set's captions and pictures are like as a whole."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from qwencli.dataset.report.contradictions import claims_of, contradictions
from qwencli.dataset.report.near_duplicates import group_alike, picture_hash
from qwencli.dataset.report.survey import Entry, prose, surveyed


def scene(seed, size=(320, 240)):
    """A picture with the structure of a photograph: smooth fields, edges, some noise."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        draw.ellipse((x, y, x + 60, y + 40), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    return picture


def jpeg(picture, quality):
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return Image.open(io.BytesIO(data.getvalue())).convert("RGB")


CHANGES = {
    "compressed": lambda p: jpeg(p, 30),
    "smaller": lambda p: p.resize((120, 90)),
    "larger": lambda p: p.resize((900, 700)),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.1),
    "blurred": lambda p: p.filter(ImageFilter.GaussianBlur(2)),
    "cropped": lambda p: p.crop((3, 2, p.width - 3, p.height - 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_look_alike(change):
    found = 0
    for seed in range(40):
        picture = scene(seed)
        found += bool(group_alike([picture_hash(picture), picture_hash(CHANGES[change](picture))]))
    assert found >= 38


def test_other_pictures_do_not():
    assert group_alike([picture_hash(scene(seed)) for seed in range(300)]) == []


def test_pictures_of_little_structure_are_told_by_their_colours():
    plain = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "white", "white")]
    assert group_alike([picture_hash(picture) for picture in plain]) == [[2, 3]]
    dots = []
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((20, 20, 40, 40), fill=colour)
        dots.append(picture)
    assert group_alike([picture_hash(picture) for picture in dots]) == []


def test_drawings_on_plain_ground_are_not_alike_by_their_ground():
    drawings = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        picture = Image.new("RGB", (96, 96), "white")
        draw = ImageDraw.Draw(picture)
        x, y, size = rng.integers(5, 60), rng.integers(5, 60), rng.integers(8, 30)
        colour = tuple(int(value) for value in rng.integers(0, 200, 3))
        draw.rectangle((x, y, x + size, y + size), fill=colour)
        drawings.append(picture_hash(picture))
    assert sum(map(len, group_alike(drawings))) <= 4


def test_groups_by_size_and_what_cannot_be_opened():
    looks = [
        picture_hash(scene(1)),
        None,
        picture_hash(scene(2)),
        picture_hash(scene(1)),
        picture_hash(scene(2)),
        picture_hash(scene(2)),
    ]
    assert group_alike(looks) == [[2, 4, 5], [0, 3]]
    assert group_alike([]) == group_alike([None, None]) == group_alike([looks[0]]) == []


def test_ten_thousand_take_seconds():
    rng = np.random.default_rng(0)
    looks = [(rng.bytes(16), rng.bytes(192)) for _ in range(9000)]
    looks += [looks[0]] * 1000
    began = time.perf_counter()
    groups = group_alike(looks)
    assert time.perf_counter() - began < 20
    assert len(groups) == 1 and len(groups[0]) == 1001


def against(first, second):
    return {
        (c.about, c.thing, c.first, c.second)
        for c in contradictions(claims_of(first), claims_of(second))
    }


@pytest.mark.parametrize(
    ("first", "second", "about"),
    [
        ("Two dogs run on grass.", "Three dogs run on grass.", {("number", "dog", "2", "3")}),
        ("A dog on a sofa.", "Two dogs on a sofa.", {("number", "dog", "1", "2")}),
        ("4 cups", "five cups", {("number", "cup", "4", "5")}),
        ("A man in a red shirt.", "A man in a blue shirt.", {("colour", "shirt", "red", "blue")}),
        ("A woman with no hat.", "A woman with a hat.", {("presence", "hat", "no hat", "hat")}),
        ("A street without cars.", "Cars on a street.", {("presence", "car", "no car", "car")}),
        ("A red and white shirt.", "A white shirt.", set()),
        ("A gray cat.", "A grey cat.", set()),
        ("A dog and two cats.", "Two cats and a dog.", set()),
        ("A red car beside a blue car.", "A blue car.", set()),
        ("A dog on a sofa.", "It is a sunny day.", set()),
        ("", "", set()),
    ],
)
def test_contradictions(first, second, about):
    found = against(first, second)
    assert {(a, t, f, s) for a, t, f, s in found if (a, t) in {x[:2] for x in about}} == about
    assert bool(found) == bool(about)
    assert len(against(second, first)) == len(found)


@given(st.text(max_size=120))
@settings(max_examples=200)
def test_no_caption_contradicts_itself(text):
    assert against(text, text) == set()


def entries(*captions, **more):
    return [Entry(f"{n}.png", caption, **more) for n, caption in enumerate(captions)]


def test_a_survey():
    picture, other = picture_hash(scene(1)), picture_hash(scene(2))
    found = surveyed(
        [
            Entry("a.png", "sks, a red car on a road", picture_hash=picture),
            Entry("b.png", "sks, a blue car on a road", picture_hash=picture),
            Entry("c.png", "Sks, a dog.", picture_hash=other),
            Entry("d.png", "sks, a dog"),
            Entry("e.png", "Sure! Here is a caption: a cat"),
            Entry("f.png", failure="refusal: I'm sorry"),
            Entry("g.png", unreadable="g.png is damaged"),
        ]
    )
    data = found.as_json()
    assert data["summary"] == {
        "pictures": 7,
        "captioned": 5,
        "missing": 1,
        "failed": 1,
        "unreadable": 1,
        "faulty": 1,
        "near_duplicates": 2,
        "near_duplicate_groups": 1,
        "repeated": 2,
        "contradictions": 1,
        "trigger_missing": 1,
    }
    assert data["near_duplicates"] == [["a.png", "b.png"]]
    assert data["repeated"] == [{"caption": "Sks, a dog.", "paths": ["c.png", "d.png"]}]
    assert data["contradictions"][0]["says"] == ["red", "blue"]
    assert data["trigger"] == {"word": "sks", "named": False, "missing": ["e.png"]}
    assert data["faulty"][0]["fault"] == "preamble"
    assert data["failed"] == [{"path": "f.png", "reason": "refusal: I'm sorry"}]
    assert {"word": "car", "captions": 2} in data["vocabulary"]["top"]
    assert data["words"]["max"] == 7


def test_a_trigger_that_is_named():
    found = surveyed(entries("a sks dog", "a dog", "SKS dog", "asks"), "sks")
    assert found.trigger.missing == [1, 3]
    assert surveyed(entries("a dog, a cat", "b, c"), None).trigger is None


def test_an_empty_set():
    data = surveyed([]).as_json()
    assert data["words"]["median"] is None
    assert not any(data["summary"].values())


def test_keys_of_captions_that_are_json_are_no_words():
    captions = ['{"caption": "a red circle", "tags": ["round", "red"], "n": 3}', "a blue square"]
    survey = surveyed([Entry(f"{n}.png", caption) for n, caption in enumerate(captions)])
    assert survey.lengths == {0: 5, 1: 3}
    assert "caption" not in survey.vocabulary
    assert prose('{"n": 3}') == '{"n": 3}'  # no texts: as it is
    assert prose("[a [b") == "[a [b"
    assert prose("[" * 100_000) == "[" * 100_000
