"""Every kind of video becomes evenly spaced frames with their times, or one clear error."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from qwencli.engine.frontend import image_decoding, images, videos
from qwencli.engine.frontend.containers import is_cut_off
from qwencli.engine.frontend.videos import even_indices, open_video, open_visual
from qwencli.errors import InputError, MissingDependencyError
from qwencli.messages import ImagePart, VideoPart
from tests.media_corpus import FILMS, encoded, failing_file, film, gif, psd

SIZE = (48, 32)
film = functools.cache(film)


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


@pytest.mark.parametrize("name", FILMS)
def test_every_kind_of_film_is_a_video_however_many_frames(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(film(name))
    for frames in (None, 1, 5):
        video = open_visual(tmp_path / name, frames)
        assert isinstance(video, VideoPart)
        assert len(video.frames) == (frames or 4)
        assert {shown.size for shown in video.frames} == {SIZE}


@pytest.mark.parametrize("name", FILMS)
def test_a_film_that_ends_early_is_not_a_shorter_film(tmp_path: Path, name: str) -> None:
    data = film(name)
    for end in (len(data) * 9 // 10, len(data) * 2 // 3):
        (tmp_path / name).write_bytes(data[: end | 1])
        with pytest.raises(InputError, match="damaged video file"):
            open_visual(tmp_path / name)


def test_a_film_cut_between_two_parts_shows_in_the_length_it_states(tmp_path: Path) -> None:
    data = film("film.flv", 100)
    tag = data.rindex(b"\x09", 0, len(data) * 2 // 3)
    ends = [end for end in range(tag, 13, -1) if not is_cut_off(io.BytesIO(data[:end]), "flv")]
    (tmp_path / "a.flv").write_bytes(data[: ends[0]])
    with pytest.raises(InputError, match="ends early"):
        open_visual(tmp_path / "a.flv")


@pytest.mark.parametrize("duration", [None, 80])
def test_a_gif_cut_anywhere_is_not_a_shorter_video(tmp_path: Path, duration: int | None) -> None:
    """Between two frames too; whole ones may be padded behind their end."""
    path = write_animation(tmp_path / "a.gif", 6, duration or [40, 50, 60, 70, 80, 90])
    data = path.read_bytes()
    for end in (*range(800, len(data), 37), *range(len(data) - 30, len(data))):
        path.write_bytes(data[:end])
        with pytest.raises(InputError, match="damaged GIF file"):
            open_visual(path, 16)
    for after in (b"", b"\0\0\0", b";"):
        path.write_bytes(data + after)
        video = open_visual(path, 16)
        assert isinstance(video, VideoPart)
        assert len(video.frames) == 6


@pytest.mark.parametrize(
    "name", ["a.gif", "a.webp", "a.png", "a.avif", "a.tif", "a.mpo", "one.gif"]
)
def test_a_picture_says_what_its_file_holds_more_of(tmp_path: Path, name: str) -> None:
    path = write_animation(tmp_path / name, 1 if name == "one.gif" else 3)
    expected = {".tif": "pages", ".mpo": None}.get(path.suffix, "frames")
    picture = open_visual(path)
    assert isinstance(picture, ImagePart)
    assert picture.first_of == (None if name == "one.gif" else expected)
    assert images.open_image(path).first_of == picture.first_of


def test_smaller_copies_of_a_page_are_no_pages(tmp_path: Path) -> None:
    pages = [frame(index) for index in range(2)]
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    picture = open_visual(tmp_path / "a.tif")
    assert isinstance(picture, ImagePart)
    assert picture.first_of is None


@pytest.mark.skipif(sys.platform == "win32", reason="names that Windows does not allow")
@pytest.mark.parametrize(
    "name", ["10:30.mp4", "concat:a|b", "http:x", "pipe:0", "data:,x.mp4", "-i.mp4", "a%03d.mp4"]
)
def test_a_name_is_a_name_and_no_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(film("film.ts", 3))
    (tmp_path / "b").write_bytes(film("film.ts", 3))
    with pytest.raises(InputError, match="no such file"):
        open_video(Path(name))
    Path(name).write_bytes(film("film.mp4"))
    assert len(open_video(Path(name), 5).frames) == 5


@pytest.mark.parametrize("kind", ["MPO", "TIFF", "PSD", "ICO"])
def test_pages_and_layers_are_no_moments(tmp_path: Path, kind: str) -> None:
    first, second = frame(2), frame(9)
    path = tmp_path / "many"
    if kind == "PSD":
        pytest.importorskip("PIL.PsdImagePlugin")
        path.write_bytes(psd(frame(2)))
    elif kind == "ICO":
        first.save(path, kind, sizes=[(16, 16), (32, 32)])
    else:
        first.save(path, kind, save_all=True, append_images=[second])
    assert isinstance(open_visual(path, 2), ImagePart)
    with pytest.raises(InputError, match="is a single picture, not a video"):
        open_video(path, 2)


def test_a_folder_of_frames_leaves_out_what_is_no_picture(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "frames", 3)
    for name in ("._frame1.png", ".hidden.png", "a.pdf", "a.mpg", "a.eps", "a.h5", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
    assert greys(open_video(folder, 9)) == [0, 1, 2]
    (folder / "frame3.HEIC").write_bytes(encoded(frame(3), "PNG"))
    assert greys(open_video(folder, 9)) == [0, 1, 2, 3]


def test_a_damaged_frame_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "frames", 3)
    (folder / "frame1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"frame1\.png is empty"):
        open_visual(folder, 3)


def test_a_stream_that_changes_its_size_keeps_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    path.write_bytes(film("film.ts", 8) + film("film.ts", 8, size=(96, 64)))
    video = open_video(path, 16)
    assert {shown.size for shown in video.frames} == {SIZE}


def test_huge_frames_of_a_film_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mkv").write_bytes(film("film.mkv"))
    monkeypatch.setattr(videos, "MAX_FRAME_PIXELS", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(InputError, match="has frames of 48x32, the limit is 0 megapixels"):
        open_visual(tmp_path / "a.mkv")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.mp4", "a.mkv", "a.avi"])
def test_a_disk_that_cannot_be_read_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = WRITERS[name](tmp_path / name, 4)
    data, said = path.read_bytes(), 0
    for readings in (0, 1, 2, 3, 5, 8, 13, 21, 34):
        monkeypatch.setattr(Path, "open", lambda self, mode, r=readings: failing_file(data, r))
        try:
            open_visual(path, 3)
        except InputError as error:
            assert error.message == f"{path} cannot be read: Input/output error"
            said += 1
    assert said >= 5


@pytest.mark.parametrize("name", FILMS)
def test_ffmpeg_writes_nothing_of_its_own(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """PyAV writes a traceback where a damaged film makes it read at a place that cannot be."""
    for seed in range(40):
        noise = np.random.default_rng(seed)
        data = bytearray(film(name))
        for place in noise.integers(0, 600, 6):
            data[place] = noise.integers(0, 256)
        (tmp_path / name).write_bytes(data)
        with contextlib.suppress(InputError):
            open_visual(tmp_path / name)
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match="cannot be read: permission denied"):
        open_visual(tmp_path, 3)


@pytest.mark.parametrize("frames", [None, 4])
@pytest.mark.parametrize("path", ["a" * 300 + ".png", "a\0b.png", "no/such/folder.mp4"])
def test_a_path_that_cannot_exist(path: str, frames: int | None) -> None:
    with pytest.raises(InputError):
        open_visual(Path(path), frames)


@given(
    name=st.sampled_from(sorted(FILMS)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    keep=st.floats(0.1, 1),
)
@settings(max_examples=120, deadline=None)
def test_a_damaged_film_is_a_film_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[float, int]], keep: float
) -> None:
    data = bytearray(film(name))
    for place, value in edits:
        # Mostly in the headers, which stand first.
        data[int(place**4 * len(data))] = value
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(data[: int(keep * len(data)) + 1] if keep < 0.5 else data)
    try:
        video = open_visual(path, 3)
    except InputError as error:
        assert error.hint and "\n" not in error.message
    else:
        assert {shown.mode for shown in getattr(video, "frames", ())} <= {"RGB"}


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


def test_an_animation_of_very_many_tiny_frames_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.gif"
    path.write_bytes(gif((1, 1), [(1, 1)] * 21_000))
    with pytest.raises(InputError, match=r"21000 frames, the limit is 20000"):
        open_video(path, 3)
    monkeypatch.setattr(image_decoding, "_DECODE_S", 0.05)
    with pytest.raises(InputError, match=r"takes far longer to decode"):
        open_video(path, 3)


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
