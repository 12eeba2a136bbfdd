from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.diagnostics.redact import Owner, redact, this_owner

OWNER = Owner("annika", "annikas-box.home.example", "/home/annika")
WINDOWS = Owner("Annika", "DESKTOP-4A7", "C:\\Users\\Annika")

CASES = [
    ("/home/annika/models/x.safetensors is slow", "<path>/x.safetensors"),
    ("on annikas-box.home.example as annika", "on <host> as <user>"),
    ("ANNIKAS-BOX and annikas-box", "<host>"),
    ("HF_TOKEN=hf_abcdefghijklmnop", "<token>"),
    ("Authorization: Bearer abc.def-123456", "<"),
    ("api_key: 'xyz-123-very'", "<secret>"),
    ("https://annika:geheim@example.org/x", "<credentials>"),
    ("write to annika.m@example.org", "<address>"),
    ("GPU-3f2b1c9a-0d4e-5f6a-7b8c-9d0e1f2a3b4c", "<uuid>"),
    ("at 192.168.1.17 port 80", "<ip>"),
    ("mac 00:1a:2b:3c:4d:5e", "<mac>"),
    ("/mnt/data/annika/secret-project/run.py", "<path>/run.py"),
    ("sk-proj-0123456789abcdef", "<token>"),
]


@pytest.mark.parametrize(("text", "left"), CASES)
def test_what_is_private_goes(text, left):
    clean = redact(text, OWNER)
    assert left in clean
    for private in ("annika", "geheim", "hf_abc", "abc.def", "xyz-123", "192.168", "00:1a", "3f2b",
                    "secret-project", "0123456789"):  # fmt: skip
        assert private not in clean.lower().replace("<credentials>", "")


def test_windows_paths():
    clean = redact(r"C:\Users\Annika\AppData\x.dll and \\nas\annika\models\y.bin", WINDOWS)
    assert "nnika" not in clean
    assert "x.dll" in clean
    assert "y.bin" in clean
    assert "nas" not in clean
    assert "nnika" not in redact('{"p": "C:\\\\Users\\\\Annika\\\\x"}', WINDOWS)


@pytest.mark.parametrize(
    "text",
    [
        "driver 580.159.04; torch 2.11.0+cu130 is built for CUDA 13.0",
        "1610 GB/s (measured): 5.04 ms, at most 198 tok/s",
        "https://github.com/pytorch/pytorch/issues/174051",
        "pip install torch --index-url https://download.pytorch.org/whl/cu130",
        "results/2026-11-23-h200-transformers/cells.csv",
        "and/or 9728 x 2560: unquantized 33 us",
        "PASS cuda-device 1 CUDA device",
        '{"kernels_per_token": null, "us_per_token": 12.5, "has_token": false}',
    ],
)
def test_what_a_reader_needs_stays(text):
    assert redact(text, OWNER) == text


@given(
    before=st.text(alphabet=" ,;:()'\"\n", max_size=3),
    after=st.text(alphabet=" ,;:()'\"\n", max_size=3),
    name=st.sampled_from(["annika", "Annika", "annikas-box", "annikas-box.home.example"]),
    folder=st.sampled_from(["", "/home/annika/", "/srv/annika/models/", "/home/annika/.cache/"]),
)
def test_names_go_wherever_they_stand(before, after, name, folder):
    assert "annika" not in redact(before + folder + name + after, OWNER).lower()


def test_this_owner_is_known():
    owner = this_owner()
    assert owner.host
    assert owner.home
