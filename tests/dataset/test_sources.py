"""What is found of a set, without opening it; and the pictures that are no files of their own."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import random
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwencli.dataset.named_inputs import StdinPart, named_inputs, safe_key
from qwencli.dataset.sources import Selection, glob_pattern, list_inputs, natural_key
from qwencli.errors import InputError
from tests.dataset.conftest import captions, failures
from tests.media_corpus import encoded

PNG = encoded(Image.new("RGB", (32, 32), (9, 99, 9)), "PNG")


def keys(*inputs, **selection):
    listing = list_inputs([str(each) for each in inputs], Selection(**selection))
    return [item.key for item in listing.items]


def test_pictures_and_videos_in_natural_order(pictures):
    folder = pictures("a10.png", "a2.JPG", "b/c.webp", ".hidden.png", "._a.png")
    for name in ("notes.pdf", "a2.txt", "clip.mp4"):
        (folder / name).write_bytes(b"x")
    listing = list_inputs([str(folder)], Selection())
    assert [item.key for item in listing.items] == ["a2.JPG", "a10.png", "clip.mp4"]
    assert listing.hidden == 2 and listing.others == {".pdf": 1, ".txt": 1}
    assert keys(folder, recursive=True)[-1] == "b/c.webp"


def test_pictures_that_no_glob_matches_are_no_files_of_other_kinds(pictures):
    folder = pictures("cat1.png", "cat2.png", "sub/cat1.png", "sub/dog.png")
    (folder / "notes.pdf").write_bytes(b"x")
    listing = list_inputs([str(folder)], Selection(recursive=True, globs=("cat1.*",)))
    assert [item.key for item in listing.items] == ["cat1.png", "sub/cat1.png"]
    assert (listing.unmatched, listing.others) == (2, {".pdf": 1})


def test_several_inputs_have_one_folder_in_common(pictures):
    folder = pictures("a/1.png", "b/2.png")
    assert keys(folder / "a", folder / "b" / "2.png") == ["a/1.png", "b/2.png"]
    assert keys(folder / "a", folder / "a" / "1.png") == ["1.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_each_real_folder_once(pictures):
    folder = pictures("z/1.png", "2.png")
    (folder / "a-link").symlink_to(folder / "z")
    (folder / "z" / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "same.png").symlink_to(folder / "2.png")
    assert keys(folder, recursive=True) == ["2.png", "gone.png", "same.png", "z/1.png"]


@pytest.mark.parametrize(
    ("glob", "path", "is_meant"),
    [
        ("*.png", "a.png", True),
        ("*.png", "sub/a.png", True),
        ("*.png", "a.jpg", False),
        ("sub/*.png", "sub/a.png", True),
        ("sub/*.png", "sub/deep/a.png", False),
        ("**/a?.png", "sub/deep/a1.png", True),
        ("**/a?.png", "a1.png", True),
        ("[!a]*.png", "b.png", True),
        ("[!a]*.png", "a.png", False),
        ("a[1].png", "a1.png", True),
        ("a[.png", "a[.png", True),
    ],
)
def test_globs(glob, path, is_meant):
    assert bool(glob_pattern(glob).fullmatch(path)) == is_meant


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_glob_is_a_pattern(glob, path):
    if glob:
        glob_pattern(glob).fullmatch(path)


@given(st.text(max_size=40))
def test_what_an_archive_names_stays_below_its_folder(name):
    parts = safe_key(name).split("/")
    assert parts and all(part not in ("", ".", "..") for part in parts)


@given(st.lists(st.text(max_size=6)))
def test_names_can_be_sorted(names):
    sorted(names, key=natural_key)


def test_lists_of_paths(tmp_path, pictures):
    folder = pictures("a.png", "b.png")
    listed = folder / "list.txt"
    listed.write_bytes(b"\xef\xbb\xbf%s\r\n\r\nb.png\r\n" % str(folder / "a.png").encode())
    assert named_inputs([], listed) == [str(folder / "a.png"), str(folder / "b.png")]
    assert named_inputs(["-"], None, lambda: b"x y.png\0new\nline.png\0") == [
        "x y.png",
        "new\nline.png",
    ]
    assert named_inputs(["-"], None, lambda: PNG) == [StdinPart(PNG)]
    with pytest.raises(InputError, match="one of the names given is empty"):
        named_inputs(["a.png", ""])
    with pytest.raises(InputError, match="lists no files"):
        named_inputs(["-"], None, lambda: b"\n\n")


def test_a_filelist_is_a_set(caption, pictures, capsys):
    folder = pictures("a.png", "sub/b.png", "c.png")
    listed = folder / "list.txt"
    listed.write_text("a.png\nsub/b.png\nmissing.png\n", encoding="utf-8")
    assert caption("--filelist", listed, "--dry-run") == 0
    err = capsys.readouterr().err
    assert "2 to caption, 1 that cannot be captioned" in err and "missing.png: no such file" in err
    assert caption("--filelist", listed) == 1
    assert {"a.txt", "sub/b.txt"} < set(captions(folder)) and "c.txt" not in captions(folder)
    (row,) = failures(folder)
    assert row["path"] == "missing.png" and "no such file" in row["reason"]


def test_a_stdin_that_cannot_be_read_or_has_no_end(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("wb", buffering=0) as written_only:
        reading = io.TextIOWrapper(io.BufferedReader(io.FileIO(os.dup(written_only.fileno()), "r")))
        with reading:
            monkeypatch.setattr("sys.stdin", reading)
            with pytest.raises(InputError, match="stdin cannot be read"):
                named_inputs(["-"])
    monkeypatch.setattr("qwencli.dataset.named_inputs.MAX_PART_BYTES", 1 << 20)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bytes(1 << 21))))
    with pytest.raises(InputError, match="more than 1 MB come through stdin"):
        named_inputs([], Path("-"))


@pytest.mark.skipif(sys.platform == "win32", reason="devices are POSIX's")
@pytest.mark.parametrize(
    ("name", "said"),
    [("/dev/zero", "more than 256 MB come"), (".", "cannot be read"), ("/dev/null", "no files")],
)
def test_a_list_that_is_none(name, said):
    with pytest.raises(InputError, match=said):
        named_inputs([], Path(name))


def test_a_picture_on_stdin(caption, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PNG)))
    assert caption("-") == 0
    assert capsys.readouterr().out.startswith("A picture ")


def tar_of(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_an_archive_of_pictures(caption, pictures, tmp_path, capsys):
    folder = pictures()
    files = {
        "0001.png": PNG,
        "0001.txt": b"x",
        "../../out.png": PNG,
        "bad.jpg": b"x",
        "._a.png": b"",
    }
    tar_of(folder / "shard.tar", files)
    assert caption(folder / "shard.tar") == 2
    assert "--output" in capsys.readouterr().err
    out = tmp_path / "out" / "captions.jsonl"
    assert caption(folder / "shard.tar", "--output", out) == 1
    assert f"{folder / 'shard.tar'}: 3 pictures and videos: " in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"].rpartition("shard.tar/")[2] for row in rows] == ["0001.png", "out.png"]
    assert [row["path"] for row in failures(out.parent)] == ["shard.tar/bad.jpg"]
    into = tmp_path / "files"
    assert caption(folder / "shard.tar", "--output", into) == 1
    assert sorted(captions(into)) == ["shard.tar/0001.txt", "shard.tar/out.txt"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("s.tar.gz", "w:gz"),
        ("s.tgz", "w:gz"),
        ("s.tar.bz2", "w:bz2"),
        ("s.txz", "w:xz"),
        ("misnamed.tar", "w:gz"),
    ],
)
def test_archives_may_be_compressed(caption, pictures, tmp_path, name, mode):
    folder = pictures()
    tar_of(folder / name, {f"{n:02}.png": png(n) for n in range(20)}, mode)
    into = tmp_path / "files"
    assert caption(folder / name, "--output", into) == 0
    assert len(set(captions(into).values())) == 20
    assert sorted(captions(into))[0] == f"{name}/00.txt"


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 2 * number, 3 * number)).save(file, "PNG")
    return file.getvalue()


def test_what_stands_before_the_damage_of_a_compressed_archive_is_captioned(
    caption, pictures, tmp_path, monkeypatch
):
    folder = pictures()
    noise = {f"{n}.png": png(n) for n in range(9)} | {"x": random.Random(1).randbytes(200_000)}
    tar_of(folder / "a.tar.gz", noise | {"last.png": png(99)}, "w:gz")
    whole = (folder / "a.tar.gz").read_bytes()
    (folder / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert caption(folder / "a.tar.gz", "--output", tmp_path / "files") == 1
    assert len(captions(tmp_path / "files")) == 9
    [failed] = failures(tmp_path / "files")
    assert failed["path"] == "a.tar.gz" and "damaged" in failed["reason"]
    # One that is made to fill a disk, and one that this Python may not read.
    monkeypatch.setattr("qwencli.dataset.shards._SMALL_BYTES", 1000)
    tar_of(folder / "bomb.tar.gz", {"a.png": bytes(2**22)}, "w:gz")
    (folder / "b.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    named = [folder / "bomb.tar.gz", folder / "b.tar.zst"]
    assert caption(*named, "--output", tmp_path / "more") == 1
    assert {row["path"] for row in failures(tmp_path / "more")} == {"bomb.tar.gz", "b.tar.zst"}


def test_shards_in_folders_are_found_where_no_pictures_are(caption, pictures, tmp_path, capsys):
    folder = pictures()
    (folder / "train").mkdir()
    for shard in ("train/00.tar", "train/01.tar", "02.tar"):
        tar_of(folder / shard, {"a.png": PNG})
    out = folder / "captions.jsonl"
    assert caption(folder, "--recursive", "--output", out) == 0
    assert len(out.read_text().splitlines()) == 3
    assert caption(folder, "--output", tmp_path / "o.jsonl", "--dry-run") == 0
    assert "1 picture or video: 1 to caption" in capsys.readouterr().err
    # Beside pictures a shard may be anything, as a backup of them.
    assert caption(pictures("b.png"), "--dry-run") == 0
    assert ".tar)" in capsys.readouterr().err


def test_a_table_of_captions_in_a_folder_of_shards_is_no_shard(caption, pictures):
    pytest.importorskip("pyarrow")
    folder = pictures()
    tar_of(folder / "00.tar", {"a.png": PNG})
    for _ in range(2):
        assert caption(folder, "--output", folder / "captions.parquet") == 0


def test_pictures_in_shards_have_their_hints(caption, pictures, tmp_path, engine):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = pictures()
    files = {
        "a/1.png": png(1),
        "a/1.json": b'{"subject": "a cat", "tags": ["grey", "soft"]}',
        "2.json": b'{"subject": "a dog"}',
        "2.png": png(2),
        "2.txt": b"old, sweet",
        "3.png": png(3),
        "3.json": b"{",
    }
    tar_of(folder / "s.tar.gz", files, "w:gz")
    rows = [{"bytes": png(4), "path": "4.png"}, {"bytes": png(5), "path": "5.png"}]
    table = pyarrow.table({"image": rows, "subject": ["a hen", None], "tags": [["x"], []]})
    parquet.write_table(table, folder / "t.parquet")
    asked = []

    def answer(request):
        asked.append(request.messages[-1].parts[-1].text)
        return f"A picture of {asked[-1]}."

    engine.answer = answer
    shards = [folder / "s.tar.gz", folder / "t.parquet"]
    prompt = ["--prompt", "{name}: {subject} ({tags})", "--retries", "0", "--guards", "none"]
    assert caption(*shards, *prompt, "--output", tmp_path / "files") == 1
    assert sorted(asked)[:3] == [
        "0000-000000-4: a hen (x)",
        "0000-000001-5:  ()",
        "1: a cat (grey, soft)",
    ]
    assert sorted(asked)[3] == "2: a dog (old, sweet)"
    [failed] = failures(tmp_path / "files")
    assert failed["path"] == "s.tar.gz/3.png" and "is not JSON" in failed["reason"]


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "gone.tar"])
def test_a_shard_that_is_none_is_one_row(caption, pictures, tmp_path, name):
    folder = pictures("a.png")
    if not name.startswith("gone"):
        (folder / name).write_bytes(b"PAR1 no shard" * 100)
    assert caption(folder / "a.png", folder / name, "--output", tmp_path / "o.jsonl") == 1
    assert [row["path"] for row in failures(tmp_path)] == [name]
    assert (tmp_path / "o.jsonl").exists()


def test_a_table_of_pictures(caption, pictures, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": PNG, "path": f"{n}.png"} for n in range(5)]
    images.append({"bytes": b"x", "path": None})
    table = pyarrow.table({"image": images, "label": list(range(6))})
    path = tmp_path / "train.parquet"
    parquet.write_table(table, path, row_group_size=4)
    assert caption(path, "--output", tmp_path / "o.jsonl") == 1
    rows = (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 5
    assert [row["path"] for row in failures(tmp_path)] == ["train.parquet/0001-000001.img"]
    parquet.write_table(table.select(["label"]), path)
    assert caption(path, "--output", tmp_path / "p.jsonl") == 1
    assert "no column with pictures" in failures(tmp_path)[0]["reason"]


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/to-file"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif self.path.startswith("/good"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)
        elif self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "99999")
            self.end_headers()
            self.wfile.write(PNG)
        elif self.path.startswith("/endless"):
            self.send_response(200)
            self.end_headers()
            for _ in range(64):
                self.wfile.write(bytes(2**16))
        else:
            self.send_error(404)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.handle_error = lambda *arguments: None
    threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_of_the_web(caption, address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qwencli.dataset.named_inputs.MAX_PART_BYTES", 2**20)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    names = ["good.png?size=1", "good.png?size=2", "gone.png", "to-file", "short.png", "endless"]
    addresses = [f"{address}/{name}" for name in names]
    assert caption(*addresses, "--output", tmp_path / "o.jsonl") == 1
    rows = (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2
    reasons = "\n".join(row["reason"] for row in failures(tmp_path))
    assert len(failures(tmp_path)) == 4
    assert "404" in reasons and "the limit is 1" in reasons and "ends early" in reasons
    capsys.readouterr()
    assert caption(addresses[0]) == 0
    assert capsys.readouterr().out.startswith("A picture ")


def test_offline_opens_no_address(caption, address, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert caption(f"{address}/good.png", "--offline") == 1
    assert "--offline" in capsys.readouterr().err


def test_frames_of_a_folder_of_stills_are_one_video(caption, pictures, capsys, engine):
    folder = pictures("1.png", "2.png")
    assert caption(folder, "--frames", "2") == 0
    assert capsys.readouterr().out.startswith("A picture ")
    assert engine.answered == 1 and captions(folder) == {}


def test_animations_in_a_folder_are_videos_with_frames(caption, pictures, engine):
    from qwencli.messages import VideoPart

    folder = pictures("1.png")
    frames = [Image.new("RGB", (32, 32), (n, 0, 0)) for n in range(0, 250, 50)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=200)
    shown = []
    engine.answer = lambda request: shown.append(request.messages[-1].parts[0]) or "Said."
    assert caption(folder, "--frames", "3") == 0
    assert sorted(isinstance(part, VideoPart) for part in shown) == [False, True]


def test_many_pictures_are_listed_in_little_time(tmp_path):
    """With the look for captions; on a shared machine four times what is promised of 100,000."""
    from qwencli.dataset.manifest import Manifest
    from qwencli.dataset.sinks import Sidecars
    from qwencli.dataset.worklist import WorklistOptions, plan_work

    count = 5_000
    for part in range(20):
        (tmp_path / str(part)).mkdir()
        for number in range(count // 20):
            (tmp_path / str(part) / f"{number}.jpg").touch()
            if number % 2:
                (tmp_path / str(part) / f"{number}.txt").write_bytes(b"a")
    began = time.process_time()
    listing = list_inputs([str(tmp_path)], Selection(recursive=True))
    sidecars = Sidecars(tmp_path)
    manifest = Manifest(tmp_path / "m.sqlite")
    work = plan_work(listing, WorklistOptions(), sidecars, manifest, "job")
    took_s = time.process_time() - began
    sidecars.close()
    manifest.close()
    assert len(work.tasks) == count // 2 == work.num_existing
    assert took_s < 1.0


def link(path, to, is_folder=False):
    try:
        path.symlink_to(to, target_is_directory=is_folder)
    except OSError:
        pytest.skip("this system has no symbolic links")


def test_a_path_back_out_of_a_link_is_what_the_file_system_says(caption, pictures, monkeypatch):
    folder = pictures("a.png", "b.png")
    monkeypatch.chdir(folder)
    other = pictures("deep/x.png", "a.png", "z/b.png", folder="other")
    link(folder / "link", other / "deep", is_folder=True)
    assert keys(folder / "link" / ".." / "a.png") == ["a.png"]
    assert caption("b.png", "link/../a.png", "--existing", "skip") == 0
    assert (other / "a.txt").exists() and not (folder / "a.txt").exists()
    assert caption(folder / "link" / ".." / "z") == 0
    assert (other / "z" / "b.txt").exists()
    assert caption(folder / "b.png", "--output", folder / "link" / ".." / "m.jsonl") == 0
    (row,) = (other / "m.jsonl").read_text().splitlines()
    assert json.loads(row)["file_name"] == "../set/b.png"


def test_two_names_of_one_file_are_two_and_one_name_twice_is_one(caption, pictures, engine, capsys):
    folder = pictures("a.png", "sub/c.png")
    link(folder / "soft.png", "a.png")
    os.link(folder / "a.png", folder / "hard.png")
    link(folder / "door", "sub", is_folder=True)
    assert caption(folder, "-r") == 0
    assert sorted(path.name for path in folder.rglob("*.txt")) == [
        "a.txt", "c.txt", "hard.txt", "soft.txt",
    ]  # fmt: skip
    capsys.readouterr()
    names = [
        folder / "sub" / "c.png",
        folder / "door" / "c.png",
        folder / "a.png",
        folder / "a.png",
    ]
    assert caption(*names, "--existing", "overwrite") == 0
    assert "2 that were seen already" in capsys.readouterr().err
    assert engine.answered == 6


def test_captions_of_a_linked_folder_have_paths_that_lead_to_the_pictures(
    caption, pictures, tmp_path
):
    (tmp_path / "far").mkdir()
    real = pictures("a.png", folder="far/real")
    link(tmp_path / "door", tmp_path / "deep" / "elsewhere", is_folder=True)
    (tmp_path / "deep" / "elsewhere").mkdir(parents=True)
    assert caption(real, "--output", tmp_path / "door" / "m.jsonl") == 0
    (row,) = (tmp_path / "door" / "m.jsonl").read_text().splitlines()
    assert (tmp_path / "door" / json.loads(row)["file_name"]).samefile(real / "a.png")
