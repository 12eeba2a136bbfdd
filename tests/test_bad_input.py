"""Every bad input a person can give: one clear line, a hint, an exit code, no traceback."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from qwencli.cli import run
from qwencli.models.builtin import bundled_folder

EXAMPLES = Path(__file__).parents[1] / "examples"
GOOD = str(EXAMPLES / "scene.png")


def caption(*arguments):
    return run(["caption", *arguments, "--device", "cpu", "--quiet", "--max-new-tokens", "40"])


def picture(mode="RGB", size=(64, 64)):
    return Image.radial_gradient("L").resize(size).convert(mode)


def write_bomb(path):
    """A PNG header that promises 100,000 x 100,000 pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def write_truncated(path):
    picture(size=(300, 300)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-2000])


BAD_PICTURES = {
    "missing.png": lambda path: None,
    "empty.png": lambda path: path.write_bytes(b""),
    "truncated.jpg": write_truncated,
    "text.png": lambda path: path.write_text("hello", encoding="utf-8"),
    "bomb.png": write_bomb,
    "thread.png": lambda path: picture(size=(1, 20000)).save(path),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_one_line_and_the_others_are_done(tmp_path, capsys, name):
    path = tmp_path / name
    BAD_PICTURES[name](path)
    assert caption(str(path), GOOD) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "A large red circle" in out
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert name in err
    assert err.rstrip().endswith(")"), "a hint follows in parentheses"


def gif(path):
    frames = [picture(), picture().rotate(90)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(path, exif=exif)


UNUSUAL_PICTURES = {
    "dot.png": lambda path: picture(size=(1, 1)).save(path),
    "animated.gif": gif,
    "deep.png": lambda path: Image.new("I;16", (64, 64), 40000).save(path),
    "print.jpg": lambda path: picture("CMYK").save(path),
    "rotated.jpg": rotated,
    "alpha.png": lambda path: picture("RGBA").save(path),
    "palette.png": lambda path: picture("P").save(path),
    "bit.png": lambda path: picture("1").save(path),
}


@pytest.mark.parametrize("name", UNUSUAL_PICTURES)
def test_an_unusual_picture_is_captioned(tmp_path, capsys, name):
    path = tmp_path / name
    UNUSUAL_PICTURES[name](path)
    assert caption(str(path)) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert err == ""


@pytest.fixture
def model_copy(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bundled_folder(), folder)
    return folder


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def wrong_shape(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["intermediate_size"] = 640
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder):
    (folder / "config.json").unlink()


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def other_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (no_weights, "no weights"),
        (truncated_weights, "model.safetensors"),
        (wrong_shape, "640"),
        (pickle_weights, "--allow-pickle"),
        (no_config, "config.json"),
        (no_tokenizer, "tokenizer.json"),
        (other_architecture, "llama"),
    ],
)
def test_a_spoiled_model_folder_is_one_line(model_copy, capsys, spoil, part, engine):
    spoil(model_copy)
    assert caption(GOOD, "--model", str(model_copy), "--engine", engine) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.rstrip().endswith(")")


def test_pickle_weights_load_when_asked_for(model_copy, capsys):
    import torch
    from safetensors.torch import load_file

    weights = load_file(model_copy / "model.safetensors")
    torch.save(weights, model_copy / "pytorch_model.bin")
    (model_copy / "model.safetensors").unlink()
    assert caption(GOOD, "--model", str(model_copy), "--allow-pickle") == 0
    assert "A large red circle" in capsys.readouterr().out


def test_no_network_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert caption(GOOD, "--model", "Somebody/Some-Model") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_full_disk_behind_stdout_is_one_line():
    import subprocess
    import sys

    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qwencli", "caption", GOOD, "--device", "cpu", "--quiet"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "cannot write the answer: No space left" in done.stderr
