"""A video file is told by its first bytes, and one that was cut off by its last part."""

from __future__ import annotations

import functools
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.engine.frontend.containers import is_cut_off
from qwencli.engine.frontend.media_files import video_kind
from tests.media_corpus import FILMS, film, gif, png

KINDS = {"mp4": "mov", "mov": "mov", "webm": "matroska"}
film = functools.cache(film)


def kind_of(name: str) -> str:
    container = FILMS[name][0]
    return KINDS.get(container, container)


@pytest.mark.parametrize("name", FILMS)
def test_a_whole_film_is_told_and_whole(name: str) -> None:
    assert video_kind(film(name)[:512]) == kind_of(name)
    assert not is_cut_off(io.BytesIO(film(name)), kind_of(name))


@pytest.mark.parametrize("name", FILMS)
def test_a_cut_film_is_found_wherever_it_was_cut(name: str) -> None:
    data = film(name)
    # Between two of its parts nothing shows; there are few of those in a film of noise.
    places = range(len(data) // 10, len(data), max(1, len(data) // 400))
    missed = [end for end in places if not is_cut_off(io.BytesIO(data[:end]), kind_of(name))]
    assert len(missed) <= len(places) // 20


def test_cameras_put_a_time_before_each_packet() -> None:
    data = film("film.ts")
    packets = [bytes(4) + data[at : at + 188] for at in range(0, len(data), 188)]
    timed = b"".join(packets)
    assert video_kind(timed[:512]) == "mpegts"
    assert not is_cut_off(io.BytesIO(timed), "mpegts")
    assert is_cut_off(io.BytesIO(timed[:-100]), "mpegts")


def test_pictures_and_playlists_are_no_films() -> None:
    for data in (
        png(1, 1, b"\0\0"), gif((9, 9), [(9, 9)]), b"\0\0\0\x18ftypheic" + bytes(60),
        b"#EXTM3U\n", b"ffconcat version 1.0\nfile /etc/passwd\n", b"v=0\no=- 0 0 IN IP4 x\n", b"",
    ):  # fmt: skip
        assert video_kind(data[:512]) is None


@given(
    name=st.sampled_from(sorted(FILMS)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    start=st.integers(0, 64),
    keep=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_the_check_fail(
    name: str, edits: list[tuple[float, int]], start: int, keep: float
) -> None:
    data = bytearray(film(name))
    for place, value in edits:
        data[start + int(place**4 * (len(data) - start))] = value
    cut = bytes(data[: int(keep * len(data)) + 1])
    for kind in {kind_of(name), video_kind(cut[:512]) or "mov"}:
        is_cut_off(io.BytesIO(cut), kind)
