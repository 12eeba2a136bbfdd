"""Every kind of video becomes evenly spaced frames with their times, or one clear error."""

from __future__ import annotations

import importlib.util
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from qwencli.engine import videos
from qwencli.engine.videos import even_indices, open_video, open_visual
from qwencli.errors import InputError, MissingDependencyError
from qwencli.messages import ImagePart, VideoPart
from tests.media_corpus import gif

SIZE = (48, 32)


def frame(index: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A plain grey that tells which frame it is."""
    return Image.new("RGB", size, (index * 10, index * 10, index * 10))


def greys(video: VideoPart) -> list[int]:
    """Which frames these are, read from their pixels."""
    return [round(float(np.asarray(shown).mean()) / 10) for shown in video.frames]


def write_animation(path: Path, count: int = 12, duration: int | list[int] = 250) -> Path:
    first, *rest = [frame(index) for index in range(count)]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=duration, **lossless)
    return path


def write_film(path: Path, count: int = 12, rate: int = 4, turned: int = 0) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.bit_rate = 4_000_000
        for index in range(count):
            shown = av.VideoFrame.from_image(frame(index))
            shown.pts, shown.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    return path


def write_folder(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    for index in range(count):
        # Not zero-padded: frame10 comes after frame9.
        frame(index).save(folder / f"frame{index}.png")
    (folder / "notes.txt").write_text("not a frame", encoding="utf-8")
    return folder


WRITERS = {"a.gif": write_animation, "a.webp": write_animation, "a.png": write_animation,
           "a.mp4": write_film, "a.mkv": write_film, "a.avi": write_film,
           "frames": write_folder}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_frames_are_taken_evenly_with_both_ends(tmp_path: Path, name: str) -> None:
    video = open_video(WRITERS[name](tmp_path / name), 4)
    assert greys(video) == [0, 4, 7, 11]
    assert {shown.size for shown in video.frames} == {SIZE}
    assert {shown.mode for shown in video.frames} == {"RGB"}
    step_s = 0.5 if name == "frames" else 0.25
    assert video.times_s == pytest.approx([0, 4 * step_s, 7 * step_s, 11 * step_s])
    assert video.duration_s == pytest.approx(12 * step_s)
    assert video.name == str(tmp_path / name)


@pytest.mark.parametrize("name", WRITERS)
def test_more_frames_than_there_are_means_all(tmp_path: Path, name: str) -> None:
    assert greys(open_video(WRITERS[name](tmp_path / name, 5), 50)) == [0, 1, 2, 3, 4]


def test_two_frames_a_second_where_nobody_says(tmp_path: Path) -> None:
    assert len(open_video(write_animation(tmp_path / "a.gif", 20, 250)).frames) == 10
    assert len(open_video(write_animation(tmp_path / "b.gif", 20, 20)).frames) == 4
    assert len(open_video(write_animation(tmp_path / "c.gif", 25, 5000)).frames) == 25
    assert videos.MOST_FRAMES == 64
    assert videos._count(10_000, 5000.0, None) == 64


def test_times_of_an_uneven_animation(tmp_path: Path) -> None:
    path = write_animation(tmp_path / "a.gif", 4, [100, 300, 50, 1000])
    video = open_video(path, 4)
    assert video.times_s == pytest.approx([0, 0.1, 0.4, 0.45])
    assert video.duration_s == pytest.approx(1.45)


@pytest.mark.parametrize(("total", "count", "expected"), [
    (5, 1, [0]), (5, 2, [0, 4]), (5, 5, [0, 1, 2, 3, 4]), (1, 3, [0]), (10, 4, [0, 3, 6, 9]),
])  # fmt: skip
def test_even_indices(total: int, count: int, expected: list[int]) -> None:
    assert even_indices(total, count) == expected


def test_what_is_a_video_and_what_a_picture(tmp_path: Path) -> None:
    gif = write_animation(tmp_path / "a.gif")
    assert isinstance(open_visual(gif), ImagePart)
    assert isinstance(open_visual(gif, 4), VideoPart)
    assert isinstance(open_visual(write_film(tmp_path / "a.mp4")), VideoPart)
    assert isinstance(open_visual(write_folder(tmp_path / "frames"), 4), VideoPart)
    frame(3).save(tmp_path / "still.png")
    assert isinstance(open_visual(tmp_path / "still.png", 4), ImagePart)
    with pytest.raises(InputError, match="is a folder"):
        open_visual(tmp_path / "frames")


def cut(path: Path) -> Path:
    whole = write_film(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    return path


def soundtrack(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono"
        )
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return path


def still(path: Path) -> Path:
    frame(1).save(path)
    return path


def mixed_folder(path: Path) -> Path:
    write_folder(path)
    frame(1, (20, 20)).save(path / "frame99.png")
    return path


def empty_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (lambda path: path, "none.mp4", "no such file"),
        (cut, "cut.mp4", "damaged video file"),
        (soundtrack, "sound.mkv", "no picture track"),
        (still, "still.png", "is a single picture, not a video"),
        (mixed_folder, "mixed", "are of one size, these are 48x32 and 20x20"),
        (empty_folder, "empty", "holds no pictures"),
    ],
)
def test_bad_videos_are_named(tmp_path: Path, make, name: str, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=said) as caught:
        open_video(make(tmp_path / name))
    assert name in caught.value.message
    assert caught.value.hint


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MAX_VIDEO_PIXELS", 10 * SIZE[0] * SIZE[1])
    for name, write in WRITERS.items():
        path = write(tmp_path / name)
        with pytest.raises(InputError, match="12 frames of 48x32 are more than"):
            open_video(path, 12)
        assert len(open_video(path, 10).frames) == 10


@pytest.mark.parametrize("frames", [2, 3, 8])
@pytest.mark.parametrize("canvas", [(10_000, 10_000), (10, 10)])
def test_a_small_animation_of_huge_frames_is_refused_undecoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canvas: tuple[int, int], frames: int
) -> None:
    path = tmp_path / "bomb.gif"
    path.write_bytes(gif(canvas, [canvas, *[(10_000, 10_000)] * 8]))
    loaded = set()
    load = GifImageFile.load
    monkeypatch.setattr(GifImageFile, "load", lambda self: loaded.add(self.size) or load(self))
    with pytest.raises(InputError, match=r"9 frames of 10000x10000 is more than 400 megapixels"):
        open_visual(path, frames)
    assert (10_000, 10_000) not in loaded


def test_where_nobody_says_how_many_frames_fit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "MAX_VIDEO_PIXELS", 3 * SIZE[0] * SIZE[1])
    for name, write in WRITERS.items():
        assert len(open_video(write(tmp_path / name)).frames) == 3


def test_what_a_request_shows_already_leaves_less_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_animation(tmp_path / "a.gif")
    held = [open_video(path, 12), open_visual(path)]
    assert videos.decoded_bytes(held) == 13 * SIZE[0] * SIZE[1] * 4
    monkeypatch.setattr(videos, "MAX_DECODE_BYTES", 16 * SIZE[0] * SIZE[1] * 4)
    assert len(open_video(path, 3, held).frames) == 3
    with pytest.raises(InputError, match=r"4 frames of 48x32 are more than .* the request shows"):
        open_video(path, 4, held)


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_film(tmp_path / "a.mp4")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "av" else found(name, *a)
    )
    monkeypatch.delitem(sys.modules, "av")
    with pytest.raises(MissingDependencyError, match=r"a\.mp4 is a video file.*not installed") as e:
        open_visual(path)
    assert "qwencli[video]" in e.value.hint
