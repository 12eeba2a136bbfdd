"""Conversations in files: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.commands.saved_chat import (
    KEPT,
    SavedChat,
    SavedFile,
    SavedTurn,
    forget_oldest,
    latest_chat,
    read_chat,
    write_chat,
)
from qwencli.config import SamplingOptions
from qwencli.errors import InputError, OutputError

CHAT = SavedChat(
    "a model",
    "Be brief.",
    SamplingOptions(do_sample=True, temperature=0.5, top_k=7, stop=("x", "\n")),
    (
        SavedTurn("What?", "漢字 \ud800 \x00", (SavedFile("video", "/a b/ü.mp4"),), "Hm.", True),
        SavedTurn("", "", (SavedFile("image", "a\udcff.png"),)),
    ),
)


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "talk.json"
    write_chat(path, CHAT)
    assert read_chat(path) == CHAT
    write_chat(path, SavedChat("b"))
    assert read_chat(path) == SavedChat("b")
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_chat(tmp_path / "file" / "talk.json", CHAT)
    with pytest.raises(OutputError, match="cannot be written"):
        write_chat(tmp_path / "a\0b", CHAT)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "talk.json"
    write_chat(path, CHAT)
    return path.read_bytes().decode("utf-8", "surrogatepass")


def changed(written, folder, where, value):
    record = json.loads(written)
    place = record
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    path = folder / "changed.json"
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["format"], "another", 'it has no "format"'),
        (["version"], 2, "its version is 2"),
        (["model"], None, "model is None"),
        (["system"], 3, "system is 3"),
        (["sampling"], [], "sampling is"),
        (["sampling", "temperature"], "hot", "'temperature' is 'hot'"),
        (["sampling", "temperature"], True, "temperature is True"),
        (["sampling", "temperature"], 9, "out of range"),
        (["sampling", "top_k"], 1.5, "'top_k' is 1.5"),
        (["sampling", "stop"], [1], "'stop' is"),
        (["sampling", "colour"], 1, "'colour' is 1"),
        (["messages"], {}, "messages is"),
        (["messages"], [{"role": "user", "content": "a"}], "has no answer"),
        (["messages", 0], [], "in turns"),
        (["messages", 0, "role"], "assistant", "in turns"),
        (["messages", 0, "content"], None, "content is None"),
        (["messages", 0, "files"], "a.png", "files is"),
        (["messages", 0, "files", 0], "a.png", "expected objects"),
        (["messages", 0, "files", 0, "kind"], "film", "kind is 'film'"),
        (["messages", 0, "files", 0, "path"], "\0", "a null"),
        (["messages", 1, "thoughts"], 1, "thoughts is 1"),
        (["messages", 1, "stopped"], "yes", "stopped is 'yes'"),
    ],
)
def test_what_no_conversation_says_is_named(written, tmp_path, where, value, said):
    with pytest.raises(InputError, match="is not a conversation") as error:
        read_chat(changed(written, tmp_path, where, value))
    assert said in error.value.message


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"[1]", b'{"format": 1e999}'])
def test_a_file_that_is_none_is_named(tmp_path, data):
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is not a conversation"):
        read_chat(path)
    with pytest.raises(InputError, match=r"cannot be read|no such file"):
        read_chat(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=40)
@given(key=st.sampled_from(["model", "system", "sampling", "messages", "version"]), value=_JSON)
def test_any_value_is_read_or_named(written, tmp_path_factory, key, value):
    path = changed(written, tmp_path_factory.getbasetemp(), [key], value)
    try:
        read_chat(path)
    except InputError as error:
        assert "is not a conversation" in error.message


def test_the_newest_are_kept(tmp_path):
    import os

    with pytest.raises(InputError, match="no conversation to go on with") as none:
        latest_chat(tmp_path / "none")
    assert "then /save" not in (none.value.hint or ""), "/save writes elsewhere"
    for number in range(KEPT + 3):
        path = tmp_path / f"{number}.json"
        path.touch()
        os.utime(path, (number, number))
    forget_oldest(tmp_path)
    assert len(list(tmp_path.iterdir())) == KEPT
    assert latest_chat(tmp_path).name == f"{KEPT + 2}.json"


def test_a_conversation_of_which_nothing_is_left_is_not_gone_on_with(tmp_path):
    import os

    for number, chat in enumerate([CHAT, SavedChat("a model")]):
        write_chat(tmp_path / f"{number}.json", chat)
        os.utime(tmp_path / f"{number}.json", (number, number))
    assert latest_chat(tmp_path).name == "0.json"
    (tmp_path / "0.json").unlink()
    with pytest.raises(InputError, match="no conversation to go on with"):
        latest_chat(tmp_path)
