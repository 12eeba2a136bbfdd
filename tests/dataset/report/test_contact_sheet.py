"""The page: complete, closed in itself, and safe from what captions say."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from qwencli.dataset.report.contact_sheet import CHUNK, contact_sheet, write_sheet
from qwencli.dataset.report.picture_inspection import inspect_pictures, thumbnail_side
from qwencli.dataset.report.survey import Entry, surveyed
from tests.dataset.report.test_survey import scene


def page(entries, thumbnails=None, **more):
    survey = surveyed(entries)
    thumbnails = [b"x"] * len(entries) if thumbnails is None else thumbnails
    text = "".join(contact_sheet(survey, thumbnails, title="A set", lead="so much", **more))
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(data[1])


def test_every_picture_and_thumbnail_is_in_the_page():
    count = 2 * CHUNK + 7
    entries = [Entry(f"{n}.png", f"caption number {n}") for n in range(count)]
    text, data = page(entries, [str(n).encode() for n in range(count)])
    assert [picture["caption"] for picture in data["pictures"]] == [e.caption for e in entries]
    chunks = re.findall(r'id="thumbnails-(\d+)">(.*?)</script>', text, re.DOTALL)
    assert [int(number) for number, _ in chunks] == [0, 1, 2]
    lines = [line for _, chunk in chunks for line in chunk.split("\n")]
    assert [base64.b64decode(line) for line in lines] == [str(n).encode() for n in range(count)]


def test_nothing_comes_from_elsewhere():
    text, _ = page([Entry("a.png", "a cat")])
    assert "http:" not in text and "https:" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"<(link|iframe|img)\b", text)


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "\u2028 & \" ' <b>",
        "a\ud800b",
        "$title ${x}",
    ],
)
def test_captions_are_text(text):
    made, data = page([Entry(f"{text}.png", f"{text} one two three four five")] * 2)
    made.encode()
    assert (
        data["pictures"][0]["caption"]
        == f"{text} one two three four five".encode("utf-8", "replace").decode()
    )
    scripts = len(re.findall("<script", made))
    assert scripts == len(re.findall("</script>", made)) == 3
    assert "<b>one" not in made and "alert(1)</b" not in made


def test_findings_are_filters_with_their_notes():
    entries = [
        Entry("a.png", "I'm sorry, but I can't assist with that."),
        Entry("b.png", failure="loop: 'so' 9 times"),
        Entry("c.png"),
        Entry("d.png", "a dog here"),
        Entry("e.png", "A dog here."),
    ]
    text, data = page(entries)
    filters = data["filters"]
    assert filters["faulty"] == [0] and filters["failed"] == [1] and filters["missing"] == [2]
    assert filters["repeated"] == [3, 4]
    assert data["pictures"][1]["notes"] == ["Failed: loop: 'so' 9 times"]
    assert data["pictures"][0]["kinds"] & data["bad"]
    assert not data["pictures"][3]["kinds"] & data["bad"]
    assert 'data-filter="near" class="" aria-pressed="false" disabled' in text


@pytest.mark.parametrize(
    ("reason", "note"),
    [
        ("/set/sub/b.png: damaged PNG file", "damaged PNG file"),
        ("C:\\set\\sub\\b.png is empty (0 bytes)", "is empty (0 bytes)"),
        ("sub/b.png is not a picture: found C:\\", "is not a picture: found C:\\"),
        ("not of sub/b.png: all", "not of sub/b.png: all"),
        ("sub/b.png.tmp: damaged", "sub/b.png.tmp: damaged"),
        ("loop: 'so' 9 times", "loop: 'so' 9 times"),
    ],
)
def test_a_card_has_room_for_the_reason(reason, note):
    _, data = page([Entry("sub/b.png", failure=reason, unreadable=reason)])
    assert data["pictures"][0]["notes"] == [f"Failed: {note}", f"Cannot be opened: {note}"]


def test_links_lead_from_the_page_to_the_picture(tmp_path):
    _, data = page(
        [Entry("sub/a b#1.png", "x")], folder=tmp_path / "set", beside=tmp_path / "reports"
    )
    assert data["pictures"][0]["link"] == "../set/sub/a%20b%231.png"


def test_an_empty_set_has_a_page():
    text, data = page([])
    assert data["pictures"] == []
    assert "No captions." in text


def test_pictures_are_looked_at_once_and_upright(tmp_path):
    paths = []
    for n in range(3):
        paths.append(tmp_path / f"{n}.jpg")
        exif = Image.Exif()
        exif[0x0112] = 6 if n == 1 else 1
        scene(n, (1200, 800)).save(paths[-1], exif=exif)
    paths.append(tmp_path / "broken.jpg")
    paths[-1].write_bytes(paths[0].read_bytes()[:2000])
    paths.append(tmp_path / "none.png")
    seen = list(inspect_pictures(paths, 128))
    sizes = [Image.open(io.BytesIO(s.thumbnail)).size for s in seen[:3]]
    assert sizes == [(128, 85), (85, 128), (128, 85)]
    assert [bool(s.unreadable) for s in seen] == [False, False, False, True, True]
    assert "broken.jpg" in seen[3].unreadable
    assert seen[0].picture_hash == next(inspect_pictures(paths[:1], 200)).picture_hash


def test_each_of_many_pictures_has_its_own_thumbnail(tmp_path):
    paths, colours = [], []
    for n in range(150):
        paths.append(tmp_path / f"{n}.png")
        colours.append((n, 255 - n, 40))
        Image.new("RGB", (16, 16), colours[-1]).save(paths[-1])
    seen = list(inspect_pictures(paths, 16))
    assert len(seen) == 150
    for colour, each in zip(colours, seen, strict=True):
        shown = Image.open(io.BytesIO(each.thumbnail)).convert("RGB").getpixel((8, 8))
        assert max(abs(a - b) for a, b in zip(colour, shown, strict=True)) < 12


def test_sides_of_thumbnails():
    assert thumbnail_side(10) > thumbnail_side(3000) > thumbnail_side(10_000)


def test_a_page_is_whole_or_not_there(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before", encoding="utf-8")

    def pieces():
        yield "half"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_sheet(pieces(), path)
    assert path.read_text(encoding="utf-8") == "before"
    assert [each.name for each in Path(tmp_path).iterdir()] == ["report.html"]
