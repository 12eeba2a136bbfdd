"""`qwencli chat`: one-shot, piped and interactive, on a small random checkpoint."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import select
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qwencli.cli import run
from qwencli.commands.conversation import Conversation, _dropped, _split_paths
from qwencli.config import SamplingOptions
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.errors import InputError, UsageError
from qwencli.messages import ImagePart, TextPart, VideoPart
from qwencli.output import Output
from qwencli.results import GenerationChunk
from tests.checkpoints import engine_config


@pytest.fixture
def picture_path(tmp_path):
    path = tmp_path / "a picture.png"
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return path


class Listening:
    """Passes requests to an engine and remembers them."""

    def __init__(self, engine):
        self.engine, self.requests = engine, []

    def stream(self, request):
        self.requests.append(request)
        return self.engine.stream(request)


@pytest.fixture(scope="module")
def engine(checkpoint):
    with TransformersEngine(engine_config(checkpoint("qwen3_vl"))) as loaded:
        yield loaded


@pytest.fixture
def talk(engine):
    listening = Listening(engine)
    sampling = SamplingOptions(do_sample=False, max_new_tokens=4)
    conversation = Conversation(
        listening, sampling, Output(), system=None, json=False, stats=False, model="tiny"
    )
    conversation.heard = listening.requests
    return conversation


def converse(talk, *lines):
    talk.converse(io.StringIO("".join(line + "\n" for line in lines)))


def test_videos_are_attached_and_a_still_is_refused(talk, picture_path, capsys):
    folder = picture_path.parent / "frames"
    folder.mkdir()
    for index in range(4):
        Image.radial_gradient("L").rotate(9 * index).resize((32, 32)).save(folder / f"{index}.png")
    converse(talk, f"/video {folder}", f'/video "{picture_path}"', "/video", "What happens?")
    err = capsys.readouterr().err
    assert f"attached: {folder}" in err
    assert "is a single picture" in err
    assert "/video needs a path" in err
    [request] = talk.heard
    assert [type(part) for part in request.messages[0].parts] == [VideoPart, TextPart]
    assert len(request.messages[0].parts[0].frames) == 4


def test_an_animation_shown_as_a_picture_is_said(talk, tmp_path, capsys):
    path = tmp_path / "a.gif"
    frames = [Image.new("RGB", (64, 64), (40 * i, 90, 10)) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    converse(talk, f"/image {path}")
    assert f"note: {path}: of several frames the first is shown" in capsys.readouterr().err


def test_of_several_pictures_the_good_ones_are_attached(talk, picture_path, capsys):
    converse(talk, f'/image missing.png "{picture_path}" a.gif', "What is it?")
    err = capsys.readouterr().err
    assert "missing.png: no such file" in err
    assert "a.gif: no such file" in err
    assert f"attached: {picture_path}" in err
    [request] = talk.heard
    assert [type(part) for part in request.messages[0].parts] == [ImagePart, TextPart]


def test_pictures_of_a_conversation_share_the_memory(talk, picture_path, capsys, monkeypatch):
    monkeypatch.setattr("qwencli.engine.frontend.images.MAX_DECODE_BYTES", 64 * 64 * 11)
    converse(talk, f"/image {picture_path}", "What is it?", f"/image {picture_path}", "And now?")
    assert "more than the memory for the pictures of one request" in capsys.readouterr().err
    assert len(talk.heard) == 2


@pytest.mark.parametrize("form", ["prompt", "lines"])
def test_a_bad_picture_does_not_end_a_chat(checkpoint, picture_path, capsys, monkeypatch, form):
    base = ["chat", "--model", str(checkpoint("qwen3_vl")), "--device", "cpu", "--quiet"]
    arguments = [*base, "--max-new-tokens", "4", "--json", "-i", "no.png", "-i", str(picture_path)]
    if form == "lines":
        monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    assert run(arguments + (["What is it?"] if form == "prompt" else [])) == 1
    out, err = capsys.readouterr()
    failed, answered = map(json.loads, out.splitlines())
    assert (failed["image"], failed["error"]) == ("no.png", "no.png: no such file")
    assert answered["image"] == str(picture_path)
    assert err == "error: no.png: no such file (check the path)\n"


def test_a_picture_that_does_not_open_is_an_object_too(checkpoint, capsys):
    assert chat(checkpoint, "What?", "--image", "none.png", "--json") == 1
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["image"], record["caption"]) == ("none.png", None)
    assert record["error"] in err


def test_nothing_is_asked_about_a_picture_that_does_not_open(checkpoint, capsys):
    base = ["chat", "--model", str(checkpoint("qwen3_vl")), "--device", "cpu", "--quiet"]
    assert run([*base, "-i", "no.png", "What is it?"]) == 1
    assert capsys.readouterr().out == ""


def roles(request):
    return [message.role for message in request.messages]


def test_history_grows_turn_by_turn(talk, capsys):
    converse(talk, "Describe", "", "left")
    assert [roles(request) for request in talk.heard] == [
        ["user"],
        ["user", "assistant", "user"],
    ]
    assert talk.heard[1].messages[1].parts[0].text == capsys.readouterr().out.split("\n")[0]


def test_image_is_sent_once_with_the_next_message(talk, picture_path):
    converse(talk, f"/image {picture_path}", "Describe", "again")
    first, second = talk.heard
    assert [type(part) for part in first.messages[0].parts] == [ImagePart, TextPart]
    shown = [part for message in second.messages for part in message.parts]
    assert sum(isinstance(part, ImagePart) for part in shown) == 1
    assert [type(part) for part in second.messages[-1].parts] == [TextPart]


def test_clear_and_system_start_over(talk):
    converse(talk, "one", "/clear", "two", "/system Be brief.", "three")
    assert [roles(request) for request in talk.heard] == [["user"], ["user"], ["system", "user"]]


def test_exit_leaves_and_what_follows_is_not_sent(talk):
    converse(talk, "one", "/exit", "two")
    assert len(talk.heard) == 1


def test_mistakes_are_told_and_the_talk_goes_on(talk, capsys):
    converse(talk, "/dance", "/image", "/image nowhere.png", "Describe")
    err = capsys.readouterr().err.splitlines()
    assert "/dance is not a command" in err[0]
    assert "/image needs a path" in err[1]
    assert "nowhere.png" in err[2]
    assert len(talk.heard) == 1


def test_help_lists_every_command(talk, capsys):
    converse(talk, "/help")
    err = capsys.readouterr().err
    for name in ("/image", "/system", "/clear", "/help", "/exit", "Ctrl-C"):
        assert name in err


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(talk, capsys, monkeypatch):
    converse(talk, "one")
    original = talk._engine.engine.stream

    def interrupted(request):
        stream = original(request)
        yield next(stream)
        stream.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(talk._engine.engine, "stream", interrupted)
    converse(talk, "two")
    monkeypatch.undo()
    converse(talk, "three")
    assert "the conversation goes on" in capsys.readouterr().err
    assert [m.parts[0].text for m in talk.heard[-1].messages if m.role == "user"] == [
        "one",
        "three",
    ]


def chat(checkpoint, *arguments, family="qwen3_vl"):
    base = ["--model", str(checkpoint(family)), "--device", "cpu", "--engine", "transformers"]
    return run(["chat", *arguments, *base, "--max-new-tokens", "4"])


def test_one_shot_with_a_picture(checkpoint, picture_path, capsys):
    assert chat(checkpoint, "Describe this.", "--image", str(picture_path), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["num_image_tokens"] == 4
    assert record["image"] == str(picture_path)


def test_one_shot_with_a_text_model(checkpoint, capsys):
    assert (
        chat(
            checkpoint,
            "Describe",
            "--quiet",
            family="qwen2",
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out.strip()
    assert err == ""


def test_piped_lines_are_turns(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Describe\nleft\n"))
    assert chat(checkpoint, "--json", family="qwen3") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2
    assert records[1]["num_prompt_tokens"] > records[0]["num_prompt_tokens"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("a.png b.png", 2), ("'a b.png' c.png", 2), ('"a b.png"', 1), (r"C:\pictures\a.png", 1)],
)
def test_paths_may_be_quoted(text, count):
    assert len(_split_paths(text)) == count
    assert all("'" not in str(path) and '"' not in str(path) for path in _split_paths(text))


def test_an_open_quotation_is_told():
    with pytest.raises(UsageError, match="quotation"):
        _split_paths("'a b.png")


def test_a_failed_line_of_a_script_shows_in_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/nope\n"))
    assert run(["chat", "--model", "scenes", "--device", "cpu"]) == 1
    assert "/nope is not a command" in capsys.readouterr().err


def test_a_path_longer_than_the_system_allows_does_not_end_the_talk(talk, capsys):
    converse(talk, "/image " + "x" * 300, "/help")
    error, *rest = capsys.readouterr().err.splitlines()
    assert error.startswith("error: xxx")
    assert rest


def test_home_is_expanded(picture_path, monkeypatch):
    monkeypatch.setenv("HOME", str(picture_path.parent))
    monkeypatch.setenv("USERPROFILE", str(picture_path.parent))
    assert _split_paths("~/a picture.png") == [picture_path]


class Thinking:
    """An engine that thinks before it answers."""

    def __init__(self, engine):
        self.engine = engine

    def stream(self, request):
        *_, last = self.engine.stream(request)
        result = replace(last.result, text="A circle.", thoughts="I see it.", finish_reason="stop")
        yield GenerationChunk("", (1,), thoughts="I see")
        yield GenerationChunk("", (2,), thoughts=" it.\n")
        yield GenerationChunk("A cir", (3,))
        yield GenerationChunk("cle.", (), result)


@pytest.mark.parametrize("stderr_is_terminal", [True, False])
def test_thoughts_are_shown_dimmed_and_not_remembered(
    engine, capsys, monkeypatch, stderr_is_terminal
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: stderr_is_terminal)
    talk = Conversation(
        Thinking(engine),
        SamplingOptions(),
        Output(),
        system=None,
        json=False,
        stats=False,
        model="m",
    )
    assert talk.ask("What is it?").text == "A circle."
    out, err = capsys.readouterr()
    assert out == "A circle.\n"
    if stderr_is_terminal:
        assert err.startswith("\x1b[2m") and re.sub(r"\x1b\[\d+m", "", err) == "I see it.\n\n\n"
    else:
        assert err == ""
    assert talk._history[-1].parts[0].text == "A circle."


@pytest.mark.parametrize("arguments", [["chat", "Hi"], ["caption", "examples/four_objects.png"]])
def test_statistics_that_are_asked_for_come_when_quiet_too(arguments, capsys):
    asked = [*arguments, "--model", "scenes", "--device", "cpu", "--max-new-tokens", "2"]
    assert run([*asked, "--quiet", "--stats"]) == 0
    assert capsys.readouterr().err.startswith("2 tokens (cut off) at ")


def piped(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), "utf-8", errors="surrogateescape")


def test_a_line_that_is_not_utf_8_costs_that_line_alone(talk, capsys):
    assert talk.converse(piped(b"\xef\xbb\xbfone\n\xff\xfe\x00\n/image \xff.png\nthree\n")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "not valid Unicode" in errors[0]
    assert errors[1].startswith(r"error: \xff.png: no such file")
    assert talk.heard[0].messages[-1].parts[0].text == "one"
    assert talk.heard[-1].messages[-1].parts[0].text == "three"


def test_a_line_without_end_ends_the_talk_in_bounded_memory(talk):
    class Endless(io.StringIO):
        def readline(self, size=-1):
            return "x" * size

    with pytest.raises(InputError, match="longer than"):
        talk.converse(Endless())


def test_a_stdin_that_cannot_be_read_is_named(talk):
    class Unreadable(io.StringIO):
        def readline(self, size=-1):
            raise OSError(9, "Bad file descriptor")

    with pytest.raises(InputError, match="stdin cannot be read"):
        talk.converse(Unreadable())


AT_A_TERMINAL = """
import os, sys
from qwencli.commands.conversation import Conversation
from qwencli.config import SamplingOptions
from qwencli.output import Output

told = os.fdopen(int(sys.argv[1]), "w", buffering=1)

class Told(Conversation):
    def ask(self, text):
        print(f"ASKED {text!r}", file=told)

    def _typed(self, stdin):
        print("READS", file=told)
        return super()._typed(stdin)

Told(None, SamplingOptions(), Output(), system=None, json=False, stats=False, model="m").converse(
    sys.stdin)
print("LEFT", file=told)
"""


def waits_for_a_key(pid: int) -> bool:
    """Python notices a Ctrl-C that comes a moment before it waits only when the next line ends."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        time.sleep(0.3)
        return True
    return stat.read_text().rpartition(")")[2].split()[0] == "S"


def typed(*keys: bytes, redirected: bool = False) -> list[str]:
    """What a chat at a terminal makes of keys that come in bursts, each when it waits again.

    It tells that through a pipe: when Ctrl-C is pressed, a terminal drops what has been written to
    it and not been read yet, which may be what is written because of it.
    """
    pty = pytest.importorskip("pty")
    told, tells = os.pipe()
    os.set_inheritable(tells, True)
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        if redirected:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(sys.executable, [sys.executable, "-c", AT_A_TERMINAL, str(tells)])
    os.close(tells)
    heard = {told: b"", terminal: b""}
    open_ends = set(heard)

    def wait(reads: int) -> None:
        end = time.monotonic() + 120
        while told in open_ends:
            assert time.monotonic() < end, heard
            ready = select.select(open_ends, [], [], 0.02)[0]
            for file in ready:
                try:
                    read = os.read(file, 65536)
                except OSError:  # the terminal of a child that has left
                    read = b""
                heard[file] += read
                if not read:
                    open_ends.discard(file)
            if not ready and heard[told].count(b"READS") >= reads and waits_for_a_key(child):
                return

    wait(1)
    for number, burst in enumerate(keys, 2):
        os.write(terminal, burst)
        wait(number)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(terminal)
    os.close(told)
    return [line for line in heard[told].decode().splitlines() if line != "READS"]


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize("burst", [b"\x1b[200~one\rtwo\rthree\x1b[201~\r", b"one\rtwo\rthree\r"])
def test_a_pasted_text_is_one_message(burst, redirected):
    assert typed(burst, redirected=redirected) == [r"ASKED 'one\ntwo\nthree'"]


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
@pytest.mark.parametrize("redirected", [False, True])
def test_ctrl_c_drops_what_is_typed_and_leaves_when_pressed_again(redirected):
    keys = (b"half typed\x03", b"next\r", b"\x03", b"\x03")
    assert typed(*keys, redirected=redirected) == ["ASKED 'next'", "LEFT"]


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
@pytest.mark.parametrize("redirected", [False, True])
def test_several_pastes_in_one_line_are_one_message(redirected):
    burst = b"\x1b[200~one\rtwo\x1b[201~ and \x1b[200~three\rfour\x1b[201~\r"
    assert typed(burst, redirected=redirected) == [r"ASKED 'one\ntwo and three\nfour'"]


def test_ctrl_c_never_leaves_while_something_is_typed(talk, monkeypatch, capsys):
    """Dropping two half-typed texts, one after the other, kept no conversation."""
    pressed = iter(["", "half typed", "another", ""])
    typed_so_far = ""

    def interrupted(stdin):
        nonlocal typed_so_far
        typed_so_far = next(pressed)
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "_typed", interrupted)
    monkeypatch.setattr("qwencli.commands.conversation._half_typed", lambda: typed_so_far)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    talk.converse(terminal)
    assert list(pressed) == []
    assert capsys.readouterr().err.count("Ctrl-C again leaves") == 3


@pytest.mark.parametrize("text", ["/* a */\nint main() {}", "// why?", "/ and \\", "//", "/?"])
def test_code_that_begins_with_a_slash_is_a_message(talk, text, capsys):
    talk._handle(text)
    assert talk.heard[0].messages[0].parts[-1].text == text
    assert "error" not in capsys.readouterr().err


def test_dropped_files_are_attached_in_every_way_they_are_written(talk, picture_path, capsys):
    path = str(picture_path)
    ways = [path, path.replace(" ", "\\ "), f"'{path}'", f'"{path}" ', picture_path.as_uri()]
    converse(talk, *ways, "/image " + picture_path.as_uri(), "Describe")
    [request] = talk.heard
    assert [type(part) for part in request.messages[0].parts] == [ImagePart] * 6 + [TextPart]
    assert capsys.readouterr().err.splitlines()[0] == f"attached: {path}"


@pytest.mark.skipif(sys.platform == "win32", reason="names that Windows does not allow")
@pytest.mark.parametrize(
    "name",
    ["a b.png", "it's.png", "a'b \"c.png", "100%25.png", "a$(b);c.png", "ü#?.png", "a\\b.png"],
)
def test_a_file_of_any_name_is_found_however_it_is_written(tmp_path, name):
    path = tmp_path / name
    path.touch()
    escaped = re.sub(r"([^\w/.])", r"\\\1", str(path), flags=re.ASCII)
    gnome = "'" + str(path).replace("'", "'\\''") + "'"
    here = path.as_uri().replace("file://", f"file://{platform.node()}")
    for written in (escaped, gnome, shlex.quote(str(path)), path.as_uri(), here):
        assert _dropped(written) == ([path], ""), written
        assert _dropped(f"{written} what is it?") == ([path], "what is it?"), written
        assert _dropped(f"{written} {written}") == ([path, path], ""), written
        assert _split_paths(written) == [path], written
    for written in (str(path), f"file://{path}"):
        assert _dropped(written) == ([path], ""), written


def test_a_text_of_many_backslashes_is_read_at_once(talk):
    text = "\\alpha\\beta" * 200 + "'s"
    started_s = time.monotonic()
    assert _dropped(text) == ([], text)
    assert time.monotonic() - started_s < 2


def test_a_dropped_file_may_be_followed_by_the_question(talk, picture_path):
    converse(talk, str(picture_path).replace(" ", "\\ ") + " What's in it?")
    [request] = talk.heard
    assert [type(part) for part in request.messages[0].parts] == [ImagePart, TextPart]
    assert request.messages[0].parts[1].text == "What's in it?"


def test_a_word_that_is_the_name_of_a_file_here_is_a_word(talk, picture_path, monkeypatch):
    monkeypatch.chdir(picture_path.parent)
    converse(talk, picture_path.name)
    assert [type(part) for part in talk.heard[0].messages[0].parts] == [TextPart]


def test_spaces_of_a_path_may_have_backslashes(picture_path, monkeypatch):
    monkeypatch.chdir(picture_path.parent)
    (picture_path.parent / "b.png").write_bytes(b"")
    assert _split_paths(r"a\ picture.png b.png") == [Path("a picture.png"), Path("b.png")]
    assert _split_paths(r"not\ here.png") == [Path("not here.png")]


@pytest.mark.parametrize("command", ["/image", "/video"])
def test_an_address_of_the_web_is_shown_as_it_was_given(talk, command, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # put back afterwards: --offline sets it
    converse(talk, f"{command} https://example.org/a.png")
    assert "error: https://example.org/a.png: an address of the web" in capsys.readouterr().err
    assert run(["caption", "https://example.org/a.png", "--model", "scenes", "--offline"]) == 1
    assert "error: https://example.org/a.png is not opened: --offline" in capsys.readouterr().err


def test_an_address_of_the_web_that_is_longer_than_any_path(talk, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # put back afterwards: --offline sets it
    address = "https://example.org/" + "a/" * 3000 + "b.png"
    converse(talk, f"/image {address}")
    assert f"error: {address}: an address of the web" in capsys.readouterr().err
    assert run(["caption", address, "--model", "scenes", "--offline"]) == 1
    err = capsys.readouterr().err
    assert "is not opened: --offline" in err and "fault" not in err
