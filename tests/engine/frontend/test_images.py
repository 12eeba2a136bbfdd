"""Pictures of every kind decode to upright 8-bit RGB; everything else is one clear InputError."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from qwencli.engine.frontend import image_decoding, images, media_files
from qwencli.engine.frontend.images import open_image
from qwencli.errors import InputError, OutOfMemoryError
from tests.media_corpus import encoded, failing_file, gif, png, png_chunk

Image.init()  # all formats, so that the tests can ask which there are
RED, BLUE = (255, 0, 0), (0, 0, 255)


def photo(width: int = 61, height: int = 43) -> Image.Image:
    """Smooth but not flat, so that a missing part cannot look right by luck."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (x * 255 // width, y * 255 // height, (x * y) % 256)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def refusal(source: Path | bytes, name: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        open_image(source, name)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


# --- pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_keep_every_pixel(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "picture.bin"
    path.write_bytes(encoded(photo(), kind, **options))
    part = open_image(path)
    assert part.name == str(path)
    assert part.image.mode == "RGB"
    assert part.image.tobytes() == photo().tobytes()


def test_bytes_and_names() -> None:
    data = encoded(photo(), "PNG")
    assert open_image(data, "upload 3").name == "upload 3"
    assert open_image(data).image.size == (61, 43)


def test_one_pixel() -> None:
    assert open_image(encoded(Image.new("RGB", (1, 1), RED), "PNG")).image.getpixel((0, 0)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = photo(20, 12)
    stored = upright
    # The inverse of each turn, independent of the table under test.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    if orientation in inverse:
        stored = upright.transpose(Image.Transpose(inverse[orientation]))
    exif = stored.getexif()
    exif[0x0112] = orientation
    assert open_image(encoded(stored, "PNG", exif=exif)).image.tobytes() == upright.tobytes()


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\xff")
    assert open_image(data).image.size == photo().size


def test_alpha_is_flattened_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)])
    pixels = np.asarray(open_image(encoded(image, "PNG")).image)[0]
    assert pixels.tolist() == [list(RED), [255, 255, 255], [204, 204, 204]]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_becomes_white(mode: str) -> None:
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else 9)
    clear = (0, 0, 0) if mode == "RGB" else 0
    opened = open_image(encoded(image, "PNG", transparency=clear)).image
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 0)) != (255, 255, 255)


def test_grey_and_alpha() -> None:
    image = Image.new("LA", (1, 1), (100, 255))
    assert open_image(encoded(image, "PNG")).image.getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    levels = np.array([[0, 128, 129, 256, 32896, 65406, 65535]], dtype=np.uint16)
    opened = np.asarray(open_image(encoded(Image.fromarray(levels), kind)).image)
    expected = np.rint(levels / 257).astype(np.uint8)
    np.testing.assert_array_equal(opened, np.repeat(expected[..., None], 3, axis=-1))


def test_sixteen_bit_colour_png() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 32768, 1000, 40000, 65535)
    opened = np.asarray(open_image(png(2, 1, row, bits=16, colour=2)).image)
    assert np.abs(opened.reshape(-1) - np.array([255, 0, 127.5, 3.9, 155.6, 255])).max() <= 1


def test_cmyk_jpeg() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = open_image(data).image.getpixel((4, 4))
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_black_and_white_and_palette(mode: str) -> None:
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    assert open_image(encoded(image, "PNG")).image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).image.getpixel((3, 3)) == RED


@pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow was built without AVIF")
def test_avif() -> None:
    data = encoded(photo(), "AVIF")
    assert open_image(data).image.size == photo().size
    assert refusal(data[:40], "cut.avif").message == "cut.avif: damaged AVIF file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX")
def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(encoded(photo(), "PNG")))
    writer.start()
    assert open_image(pipe).image.tobytes() == photo().tobytes()
    writer.join()


def through_pipe(tmp_path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """A pipe that `write` writes to until nobody reads any more."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def writer() -> None:
        with contextlib.suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
            write(file)

    threading.Thread(target=writer, daemon=True).start()
    return pipe


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX")
def test_a_pipe_without_an_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(file: BinaryIO) -> None:
        file.write(encoded(photo(), "PNG"))
        while True:
            file.write(bytes(2**16))

    monkeypatch.setattr(media_files, "_MAX_PIPE_BYTES", 2**20)
    pipe = through_pipe(tmp_path, endless)
    assert refusal(pipe).message == f"{pipe}: more than 1 MB come through this pipe"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX")
@pytest.mark.parametrize("behaviour", ["no writer", "silent", "slow"])
def test_a_pipe_that_gives_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    done = threading.Event()

    def write(file: BinaryIO) -> None:
        file.write(encoded(photo(), "PNG"))
        while behaviour == "slow" and not done.wait(0.01):
            file.write(b"\0")
        done.wait(20)

    monkeypatch.setattr(media_files, "_PIPE_WAIT_S", 0.3)
    if behaviour == "no writer":
        os.mkfifo(tmp_path / "pipe")
    else:
        through_pipe(tmp_path, write)
    started_s = time.monotonic()
    assert "nothing more comes through this pipe" in refusal(tmp_path / "pipe").message
    assert time.monotonic() - started_s < 10
    done.set()


# --- refusals -----------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere.png")
    assert error.message == f"{tmp_path / 'nowhere.png'}: no such file"


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path).message


def test_a_path_that_cannot_exist() -> None:
    assert "cannot be read" in refusal(Path("a\0b.png")).message


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert "empty (0 bytes)" in refusal(path).message
    assert "empty" in refusal(b"").message


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="device files are POSIX")
def test_device() -> None:
    assert "is a device" in refusal(Path("/dev/zero")).message


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated: root in a container may read everything.
    path = tmp_path / "secret.png"
    path.write_bytes(b"x")

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    assert "permission denied" in refusal(path).message


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert "cannot be read: " in refusal(tmp_path / ("a" * 300 + ".png")).message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_disk_that_fails_is_no_damage_of_the_picture(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(data := encoded(photo(), kind))
    for readings in range(10**4):
        monkeypatch.setattr(Path, "open", lambda self, mode, r=readings: failing_file(data, r))
        try:
            open_image(path)
        except InputError as error:
            assert error.message == f"{path} cannot be read: Input/output error"
        else:
            break
    assert 2 < readings < 10**4 - 1


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"just some words\n", "text"),
        ("späte Wörter".encode(), "text"),
        (b"\x00\x01\x02\x03\xff\xfe" * 20, "data of an unknown kind"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"PK\x03\x04....", "an archive"),
        (b"<!DOCTYPE html><p>404", "an HTML page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(40), "a video"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 4, "a PNG with a damaged header"),
    ],
)
def test_what_was_found_is_named(content: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "holiday.png"
    path.write_bytes(content)
    error = refusal(path)
    assert str(path) in error.message
    assert found in error.message


def test_drawings_that_need_another_program_are_refused() -> None:
    error = refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert "drawing (EPS)" in error.message


def heic_header() -> bytes:
    return b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64)


def test_heic_without_its_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    error = refusal(heic_header(), "IMG_1.HEIC")
    assert error.message == "IMG_1.HEIC is HEIC, which this installation cannot decode"
    assert "pip install pillow-heif" in error.hint


def test_a_damaged_heic_is_not_blamed_on_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: None
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert refusal(heic_header(), "IMG_1.HEIC").message == "IMG_1.HEIC: damaged HEIC file"


def test_heic_is_decoded_once_its_plugin_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class HeifFile(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._mode = "RGB"
            self._size = (7, 5)
            self.tile = []

        def load(self) -> object:
            self.im = Image.core.fill("RGB", self.size, RED)
            return super().load()

    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: Image.register_open(
        "HEIF", HeifFile, lambda prefix: prefix[4:12] == b"ftypheic"
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    assert open_image(heic_header()).image.size == (7, 5)


@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
)
def test_no_cut_file_gives_a_part_of_a_picture(kind: str) -> None:
    options = {"progressive": True} if kind == "progressive" else {}
    data = encoded(photo(), "JPEG" if kind == "progressive" else kind, **options)
    whole = open_image(data).image.tobytes()
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            part = open_image(data[:length], "cut")
        except InputError as error:
            assert error.message.startswith("cut")
            refused += 1
        else:
            # Only bytes that no pixel needs were missing.
            assert part.image.tobytes() == whole, f"{kind} cut at {length} of {len(data)}"
    assert refused > 100


def test_pillows_log_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    data = encoded(photo(), "TIFF")
    samples = data.index(struct.pack("<HHIH", 277, 3, 1, 3))
    refusal(data[: samples + 8] + struct.pack("<H", 999) + data[samples + 10 :])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "jpeg", "group4"])
def test_libtiff_writes_nothing_of_its_own(
    compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    image = photo().convert("1") if compression == "group4" else photo()
    data = encoded(image, "TIFF", compression=compression)
    for place in range(8, len(data), max(1, len(data) // 60)):
        with contextlib.suppress(InputError):
            open_image(data[:place] + b"\xff\0\xff" + data[place + 3 :])
    os.write(2, b"still open")
    assert capfd.readouterr().err == "still open"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_refused_though_another_library_allowed_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(photo(), kind)
    assert f"damaged {kind}" in refusal(data[: len(data) * 2 // 3]).message
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "ICO"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    keep=st.floats(0, 1),
)
@settings(max_examples=200)
def test_damaged_bytes_raise_nothing_but_input_errors(
    kind: str, edits: list[tuple[float, int]], keep: float
) -> None:
    data = bytearray(encoded(photo(33, 21), kind))
    for place, value in edits:
        data[int(place * len(data))] = value
    try:
        part = open_image(bytes(data[: int(keep * len(data)) + 1]))
    except InputError:
        return
    assert part.image.mode == "RGB"


@pytest.mark.parametrize("size", [(20_000, 10_001), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_before_decoding(size: tuple[int, int]) -> None:
    # The pixels are not even there: only the header may be read.
    error = refusal(png(*size, b"\0"), "bomb.png")
    assert f"{size[0] * size[1] / 1e6:.0f} megapixels, the limit is 200" in error.message


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("WEBP", (8200, 8200)),
        ("JPEG2000", (7200, 7200)),
        ("AVIF", (10_100, 10_100)),
        ("PNG", (1, 90_000_000)),
    ],
)
def test_what_takes_more_memory_a_pixel_has_a_lower_limit(
    kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes are claimed once the header is read; nothing may be decoded."""
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {kind}")
    identify = image_decoding._identify

    def claimed(*args: object) -> Image.Image:
        image = identify(*args)  # type: ignore[arg-type]
        image._size = size
        return image

    monkeypatch.setattr(image_decoding, "_identify", claimed)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    message = refusal(encoded(photo(), kind), "bomb").message
    assert f"the limit for {kind} of this shape is" in message


MEASURE = """
import os, pathlib, resource, sys
from qwencli.engine.frontend.images import open_image
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
for line in sys.stdin:  # a process each, forked from one that has imported
    if process := os.fork():
        os.waitpid(process, 0)
        continue
    folder = pathlib.Path(line.strip())
    open_image(folder / "small")
    before = peak()
    open_image(folder / "large")
    print(peak() - before, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def bytes_to_decode() -> Iterator[Callable[[Path], int]]:
    """What a process that has opened `small` of a folder takes for `large`.

    None that these tests start themselves: it would begin with their own peak, which hides all.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def measured(folder: Path) -> int:
        assert process.stdin and process.stdout
        print(folder, file=process.stdin, flush=True)
        return int(process.stdout.readline())

    with process:
        yield measured


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX")
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {}),
        ("PNG", "RGB", {"orientation": 6}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("JPEG", "CMYK", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("AVIF", "RGBA", {"speed": 10}),
        ("JPEG2000", "RGBA", {}),
        ("TIFF", "RGBA", {"compression": "tiff_deflate"}),
        ("GIF", "P", {"transparency": 0}),
    ],
)
def test_decoding_takes_no_more_memory_than_the_limits_reckon_with(
    kind: str,
    mode: str,
    options: dict[str, object],
    tmp_path: Path,
    bytes_to_decode: Callable[[Path], int],
) -> None:
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {kind}")
    options = dict(options)
    if (orientation := options.pop("orientation", None)) is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    for name, side in (("small", 16), ("large", 3200)):
        (tmp_path / name).write_bytes(encoded(Image.new(mode, (side, side)), kind, **options))
    each = images._BYTES_A_PIXEL.get(kind, images._BYTES_A_PIXEL_ELSE)
    if options.get("progressive"):
        each = images._BYTES_A_PIXEL_PROGRESSIVE
    # Rows that are being converted are held beside the two pictures, and what decoders need.
    band = 12 * images._BAND_PIXELS + 2**20
    assert bytes_to_decode(tmp_path) < each * 3200 * 3200 + band


def test_pictures_of_one_request_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(), "PNG")
    assert open_image(data, held_bytes=images.MAX_DECODE_BYTES // 2).image.size == (61, 43)
    with pytest.raises(InputError, match="photo has 0 megapixels, more than the memory for"):
        open_image(data, "photo", held_bytes=images.MAX_DECODE_BYTES)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16", "CMYK"])
def test_rows_converted_at_a_time_give_the_same_picture(
    mode: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photo(37, 23).convert(mode) if mode != "I;16" else Image.new(mode, (37, 23), 9000)
    image.getexif()[0x0112] = turn
    whole = images.to_rgb(image, "whole")
    monkeypatch.setattr(images, "_BAND_PIXELS", 150)
    in_bands = images.to_rgb(image, "bands")
    assert in_bands.size == whole.size
    assert in_bands.tobytes() == whole.tobytes()


def test_a_large_first_frame_of_an_animation_is_a_picture_like_others() -> None:
    """Its pixels are missing, which is found before the memory is filled."""
    assert "damaged GIF" in refusal(gif((10_000, 10_000), [(10_000, 10_000)] * 8)).message


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_long_text_and_profiles_in_a_png_are_no_damage(kind: bytes) -> None:
    """Photoshop and some screenshot programs write megabytes of them."""

    def labelled(length: int) -> bytes:
        body = b"x" * length
        packed = zlib.compress(body)
        bodies = {b"tEXt": b"a\0" + body, b"zTXt": b"a\0\0" + packed,
                  b"iTXt": b"a\0\1\0\0\0" + packed, b"iCCP": b"a\0\0" + packed}  # fmt: skip
        return png(1, 1, b"\0\x80", extra=png_chunk(kind, bodies[kind]))

    assert open_image(labelled(5_000_000)).image.getpixel((0, 0)) == (128, 128, 128)
    if kind != b"iCCP":
        return
    assert "more than 64 MB of text" in refusal(labelled(70_000_000), "a.png").message


def test_a_file_is_not_read_whole_however_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "long.webp"
    path.write_bytes(encoded(photo(), "WEBP"))
    with path.open("r+b") as file:
        file.truncate(2**28 + 1)
    assert "is a file of 256 MB, the limit for its kind is 256" in refusal(path).message


@pytest.mark.parametrize("kind", ["JPEG drawn anew", "PNG in pieces"])
def test_a_picture_that_is_decoded_for_minutes_is_left(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind.startswith("JPEG"):
        data = encoded(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
        last = data.rindex(b"\xff\xda")
        data = data[:-2] + data[last:-2] * 3000 + data[-2:]
    else:
        data = png(2, 2, bytes(6), extra=png_chunk(b"tEXt", b"a\0b") * 100_000)
    monkeypatch.setattr(image_decoding, "_DECODE_S", 0.2)
    started_s = time.thread_time()
    with pytest.raises(InputError, match="takes far longer to decode"):
        open_image(data)
    assert time.thread_time() - started_s < 2
    open_image(encoded(Image.new("L", (1000, 1000)), "JPEG", progressive=True))


def test_the_limit_lets_the_largest_cameras_through() -> None:
    # 100 megapixels is above Pillow's own warning level of 89: the decoder is asked, and finds
    # that the pixels are missing.
    with pytest.raises(InputError, match="damaged PNG"):
        open_image(png(10_000, 10_000, b"\0"))


def test_pillow_is_left_as_it_was_found() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    good, bad = encoded(photo(), "PNG"), b"no picture"

    def attempt(index: int) -> bool:
        try:
            open_image(good if index % 3 else bad)
        except InputError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(attempt, range(60)))
    assert outcomes == [bool(index % 3) for index in range(60)]
    after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    assert after == before


def test_pillows_warnings_about_a_file_do_not_reach_the_user() -> None:
    # A palette with one alpha value a colour makes Pillow warn when it is converted.
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 0, 255])
    data = encoded(image, "PNG", transparency=b"\x00\xff")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        open_image(data)
    assert seen == []


def test_zero_size() -> None:
    assert "a PNG with a damaged header" in refusal(png(0, 4, b"\0")).message
    bmp = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
    bmp[18:22] = bytes(4)
    assert "a BMP with a damaged header" in refusal(bytes(bmp)).message
    assert "picture" in refusal(b"P6 0 0 255\n").message


def test_floating_point_and_wide_integers_are_refused() -> None:
    depth = Image.fromarray(np.ones((2, 2), dtype=np.float32))
    assert "floating-point" in refusal(encoded(depth, "TIFF")).message
    wide = Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32))
    assert "70000" in refusal(encoded(wide, "TIFF")).message


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_to_rgb", full)
    with pytest.raises(OutOfMemoryError, match="decode p"):
        open_image(encoded(photo(), "PNG"), "p")
