"""`qwencli chat`: one-shot, piped and interactive, on a small random checkpoint."""

from __future__ import annotations

import io
import json
import platform
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qwencli.cli import run
from qwencli.commands.chat_session import ChatSession
from qwencli.commands.saved_chat import read_chat
from qwencli.commands.typed_paths import dropped_files, split_paths
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
        self.can_think, self.model_type = True, engine.model_type

    def stream(self, request):
        self.requests.append(request)
        # The model has no thoughts, whatever it says of them here.
        return self.engine.stream(replace(request, thinking=False, thinking_budget=None))


@pytest.fixture(scope="module")
def engine(checkpoint):
    with TransformersEngine(engine_config(checkpoint("qwen3_vl"))) as loaded:
        yield loaded


@pytest.fixture
def talk(engine):
    listening = Listening(engine)
    sampling = SamplingOptions(do_sample=False, max_new_tokens=4)
    conversation = ChatSession(
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


def test_system_says_what_is_set_and_what_becomes_of_the_conversation(talk, capsys, picture_path):
    def said(*lines):
        capsys.readouterr()
        converse(talk, *lines)
        return capsys.readouterr().err.splitlines()

    assert said("/system")[0] == "system prompt: none"
    converse(talk, "one", "two", f"/image {picture_path}")
    assert "/system TEXT sets one" in said("/system")[1]
    assert len(talk._turns) == 2 and talk._attached, "asking what is set changes nothing"
    assert said("/system Be brief.") == [
        "system prompt: Be brief.",
        "the conversation starts over (forgotten: 2 turns, 1 attached picture)",
    ]
    assert said("/system")[0] == "system prompt: Be brief."
    assert said("/clear") == ["cleared; the system prompt stays"]
    assert said("/system default") == ["system prompt: none", "the conversation starts over"]
    converse(talk, "three")
    assert roles(talk.heard[-1]) == ["user"]


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


def stop_after(talk, monkeypatch, chunks):
    """Ctrl-C comes once so many chunks have."""
    original = talk._engine.engine.stream

    def interrupted(request):
        stream = original(request)
        for _ in range(chunks):
            yield next(stream)
        stream.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(talk._engine.engine, "stream", interrupted)


def questions(request):
    return [m.parts[-1].text for m in request.messages if m.role == "user"]


def test_ctrl_c_stops_the_answer_and_what_came_is_kept(talk, capsys, monkeypatch):
    converse(talk, "one")
    with monkeypatch.context() as patch:
        stop_after(talk, patch, 3)
        converse(talk, "two")
    came = capsys.readouterr()
    assert "stopped; what came is kept" in came.err
    converse(talk, "three")
    assert questions(talk.heard[-1]) == ["one", "two", "three"]
    assert talk.heard[-1].messages[3].parts[0].text in came.out.splitlines()[-1]


class Typed:
    """Lines of a person who presses Ctrl-C in between."""

    can_edit = has_keyboard = True

    def __init__(self, *said):
        self._said = iter(said)

    def next_line(self, draft=""):
        line = next(self._said)
        if line is KeyboardInterrupt:
            raise line
        return line


def test_ctrl_c_as_an_answer_ends_does_not_end_the_conversation(talk):
    assert talk.converse(Typed("one", KeyboardInterrupt, "two", None)) == 0
    assert questions(talk.heard[-1]) == ["one", "two"]


def test_a_second_ctrl_c_leaves_whenever_it_comes(talk, monkeypatch):
    assert talk.converse(Typed("one", KeyboardInterrupt, KeyboardInterrupt)) == 0

    def interrupted(text):
        raise KeyboardInterrupt

    # While the first one is answered; a key that is lost there would leave the person waiting.
    monkeypatch.setattr(talk._output, "notice", interrupted)
    assert talk.converse(Typed(KeyboardInterrupt)) == 0


def test_ctrl_c_before_anything_came_leaves_all_as_it_was(talk, picture_path, capsys, monkeypatch):
    converse(talk, f"/image {picture_path}")
    with monkeypatch.context() as patch:
        stop_after(talk, patch, 0)
        converse(talk, "one")
    assert "stopped; the conversation goes on" in capsys.readouterr().err
    converse(talk, "/retry", "two")
    assert questions(talk.heard[-1]) == ["one", "two"]
    assert [type(part) for part in talk.heard[-1].messages[0].parts] == [ImagePart, TextPart]


def test_a_message_typed_again_after_it_was_stopped_shows_its_picture_once(
    talk, picture_path, monkeypatch
):
    message = f"@'{picture_path}' one"
    with monkeypatch.context() as patch:
        stop_after(talk, patch, 0)
        converse(talk, message)
    converse(talk, message)
    assert [type(part) for part in talk.heard[-1].messages[0].parts] == [ImagePart, TextPart]


def test_retry_edit_and_undo(talk, picture_path, capsys):
    converse(talk, "/retry", "/undo", "/edit x", f"/image {picture_path}", "one", "two")
    assert capsys.readouterr().err.count("nothing was asked yet") == 3
    converse(talk, "/retry")
    assert questions(talk.heard[-1]) == ["one", "two"]
    converse(talk, "/edit three")
    assert questions(talk.heard[-1]) == ["one", "three"]
    converse(talk, "/undo", "/edit four")
    assert questions(talk.heard[-1]) == ["four"]
    assert [type(part) for part in talk.heard[-1].messages[0].parts] == [ImagePart, TextPart]
    converse(talk, "/edit", "/undo", "five")
    assert "/edit needs the new text" in capsys.readouterr().err
    assert questions(talk.heard[-1]) == ["five"]


def test_a_retry_that_fails_leaves_the_answer(talk, monkeypatch):
    converse(talk, "one")
    with monkeypatch.context() as patch:
        stop_after(talk, patch, 0)
        converse(talk, "/retry", "/edit two")
    converse(talk, "/retry")
    assert questions(talk.heard[-1]) == ["one"]
    converse(talk, "three")
    assert questions(talk.heard[-1]) == ["one", "three"]


def test_sampling_changes_midway(talk, capsys):
    converse(talk, "one", "/set temperature=0.5", "/set top-k 7", "two", "/set greedy=on", "three")
    converse(talk, "/set stop=.", "/set temperature=default", "/set thinking=on", "/set", "four")
    assert [request.thinking for request in talk.heard] == [False, False, False, True]
    one, two, three, four = (request.sampling for request in talk.heard)
    assert (one.do_sample, one.temperature) == (False, None)
    assert (two.do_sample, two.temperature, two.top_k, two.max_new_tokens) == (None, 0.5, 7, 4)
    assert three.do_sample is False
    assert (four.temperature, four.stop) == (None, (".",))
    assert "max_new_tokens=4, seed=default, greedy=on, stop='.'" in capsys.readouterr().err


def test_thoughts_are_bounded_midway(talk):
    converse(talk, "/set thinking_budget=30", "one", "/set thinking=off", "two")
    converse(talk, "/set thinking_budget=0", "three", "/set thinking=on", "four")
    heard = [(request.thinking, request.thinking_budget) for request in talk.heard]
    assert heard == [(True, 30), (False, 0), (False, 0), (True, None)]


@pytest.mark.parametrize("name", ["thinking", "greedy"])
def test_switches_take_every_word_for_on_and_off(talk, name):
    for word, is_on in (
        ("on", True), ("off", False), ("Yes", True), ("no", False), ("true", True),
        ("FALSE", False), ("1", True), ("0", False), ("on", True), ("default", False),
    ):  # fmt: skip
        assert talk.converse(io.StringIO(f"/set {name}={word}\nhello\n")) == 0
        request = talk.heard[-1]
        assert (
            request.thinking if name == "thinking" else request.sampling.do_sample is False
        ) is is_on


def test_a_note_that_holds_for_all_answers_is_said_once(talk, capsys, monkeypatch):
    noted = "qwencli.engine.frontend.prompt.PromptBuilder._notes"
    monkeypatch.setattr(noted, lambda *_: ("a picture is smaller",))
    converse(talk, "one", "two")
    assert capsys.readouterr().err.count("a picture is smaller") == 1


def test_a_model_without_thoughts_is_not_switched_to_them(talk, capsys):
    talk._engine.can_think = False
    converse(talk, "/set thinking=on", "/set thinking_budget=9", "/set thinking_budget=0", "one")
    assert capsys.readouterr().err.count("tiny cannot think before it answers") == 2
    assert [request.thinking for request in talk.heard] == [False]


def test_a_text_model_is_shown_no_picture_and_the_talk_goes_on(talk, picture_path, capsys):
    file = picture_path.parent / "talk.json"
    converse(talk, f"/image {picture_path}", "one", f"/save {file}", "/clear")
    talk._engine.model_type = "qwen3"
    converse(talk, f"/image {picture_path}", f"look: @'{picture_path}'", "two")
    assert capsys.readouterr().err.count("tiny reads text only") == 2
    converse(talk, f"/load {file}", "three")
    assert capsys.readouterr().err.count("tiny reads text only") == 1
    assert [questions(request)[-1] for request in talk.heard] == ["one", "two", "three"]
    shown = [part for request in talk.heard[1:] for each in request.messages for part in each.parts]
    assert {type(part) for part in shown} == {TextPart}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("colour=red", "/set knows no colour"),
        ("temperature", "needs a value"),
        ("thinking", "needs a value (/set thinking=on, or off)"),
        ("temperature=hot", "is a number, not hot"),
        ("seed=1.5", "is a whole number"),
        ("top_p=2", "top_p 2 is out of range"),
        ("temperature=nan", "is a number, not nan"),
        ("greedy=perhaps", "greedy is on or off"),
        ("thinking=hard", "thinking is on or off"),
        ("thinking_budget=-1", "thinking_budget is a whole number"),
    ],
)
def test_settings_that_are_none(talk, said, told, capsys):
    assert talk.converse(io.StringIO(f"/set {said}\n")) == 1
    assert told in capsys.readouterr().err


def test_files_are_mentioned_in_a_message(talk, picture_path, capsys, monkeypatch):
    monkeypatch.chdir(picture_path.parent)
    converse(talk, "@'a picture.png' What is in it?", "mail me@home.org about @nobody", "@no.png?")
    converse(talk, "@a\\ picture.png", "Is it like @'a picture.png'?")
    first, _, third = talk.heard
    assert [type(part) for part in first.messages[-1].parts] == [ImagePart, TextPart]
    assert questions(third) == [
        "What is in it?",
        "mail me@home.org about @nobody",
        "Is it like a picture.png?",
    ]
    assert len(third.messages[-1].parts) == 3
    assert "no.png: no such file" in capsys.readouterr().err


def test_a_conversation_is_saved_and_goes_on(talk, engine, picture_path, capsys):
    file = picture_path.parent / "talk.json"
    converse(talk, "/system Be brief.", f"/image {picture_path}", "one", "/set top_k=5", "two")
    converse(talk, f"/save {file}", "/save", "/load", "/load no.json")
    err = capsys.readouterr().err
    assert f"saved: {file}" in err and "/save needs a file" in err
    assert "/load needs one file" in err and "no.json: no such file" in err
    again = ChatSession(
        talk._engine, SamplingOptions(), Output(), system=None, json=False, stats=False, model="b"
    )
    converse(again, f"/load {file}", "three")
    assert "2 turns of tiny from" in capsys.readouterr().err
    *before, _ = again._turns
    assert [turn.answer for turn in before] == [turn.answer for turn in talk._turns]
    request = talk.heard[-1]
    assert roles(request) == ["system", *["user", "assistant"] * 2, "user"]
    assert [type(part) for part in request.messages[1].parts] == [ImagePart, TextPart]
    assert (request.sampling.top_k, request.sampling.max_new_tokens) == (5, 4)
    picture_path.unlink()
    converse(again, f"/load {file}", "four")
    assert "no such file" in capsys.readouterr().err
    assert [type(part) for part in talk.heard[-1].messages[1].parts] == [TextPart]


def test_a_conversation_that_was_kept_is_resumed(talk, tmp_path):
    file = tmp_path / "chats" / "1.json"
    talk._keep = file
    converse(talk, "one", "two")
    sampling = SamplingOptions(max_new_tokens=3)
    again = ChatSession(
        talk._engine, sampling, Output(), system="Be kind.", json=False, stats=False, model="tiny"
    )
    again.resume(file)
    converse(again, "/undo", "three")
    assert roles(talk.heard[-1])[0] == "system"
    assert talk.heard[-1].sampling.max_new_tokens == 3
    assert [turn.text for turn in read_chat(file).turns] == ["one", "three"]
    assert file.stat().st_mode & 0o077 == 0 or sys.platform == "win32"


def test_a_conversation_that_cannot_be_kept_is_said_once(talk, tmp_path, capsys):
    (tmp_path / "file").touch()
    talk._keep = tmp_path / "file" / "1.json"
    converse(talk, "one", "two")
    assert capsys.readouterr().err.count("not kept") == 1
    assert talk.converse(io.StringIO(f"/save {tmp_path}/file/2.json\n")) == 1


def test_there_is_nothing_to_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("qwencli.commands.saved_chat.chats_folder", lambda: tmp_path / "none")
    assert run(["chat", "--resume", "And now?"]) == 1
    assert "no conversation to go on with" in capsys.readouterr().err


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


class Untold(Thinking):
    """An engine that leaves thoughts in the text, as a server may."""

    def stream(self, request):
        *_, last = super().stream(request)
        text = "<think>\nI see it.\n</think>\n\nA circle."
        for at in range(0, len(text), 3):
            yield GenerationChunk(text[at : at + 3], (1,))
        yield GenerationChunk("", (), replace(last.result, text=text, thoughts=None))


def test_thoughts_in_the_text_are_no_part_of_the_answer(engine, capsys):
    sampling = SamplingOptions(max_new_tokens=2)
    talk = ChatSession(
        Untold(engine), sampling, Output(), system=None, json=False, stats=False, model="m"
    )
    converse(talk, "What is it?", "/thoughts")
    out, err = capsys.readouterr()
    assert out == "A circle.\n"
    assert err == "I see it.\n"
    assert (talk._turns[0].answer, talk._turns[0].thoughts) == ("A circle.", "I see it.")


def chat(checkpoint, *arguments, family="qwen3_vl"):
    base = ["--model", str(checkpoint(family)), "--device", "cpu", "--engine", "transformers"]
    return run(["chat", *arguments, *base, "--max-new-tokens", "4"])


def test_one_shot_with_a_picture(checkpoint, picture_path, capsys):
    assert chat(checkpoint, "Describe this.", "--image", str(picture_path), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["num_image_tokens"] == 4
    assert record["image"] == str(picture_path)


@pytest.mark.parametrize("question", [("What is it?",), ()])
def test_a_picture_for_a_text_model_is_refused_before_it_is_loaded(
    checkpoint, picture_path, capsys, monkeypatch, question
):
    loaded = "qwencli.engine.base_engine.BaseEngine.load"
    monkeypatch.setattr(loaded, lambda _: pytest.fail("weights are read"))
    assert chat(checkpoint, *question, "--image", str(picture_path), family="qwen3") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("reads text only") == 1


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


def test_through_pipes_there_is_text_alone(checkpoint, tmp_path, capfd, monkeypatch):
    """Whatever the terminal that stands around can do."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lines = [f"/image {tmp_path / 'a.png'}", "# *one*", "/set greedy=on", "/retry", "/stats"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert chat(checkpoint) == 0
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err
    assert len(out.splitlines()) >= 2
    assert not (tmp_path / "data").exists(), "a script leaves nothing behind"


@pytest.mark.parametrize(
    ("text", "count"),
    [("a.png b.png", 2), ("'a b.png' c.png", 2), ('"a b.png"', 1), (r"C:\pictures\a.png", 1)],
)
def test_paths_may_be_quoted(text, count):
    assert len(split_paths(text)) == count
    assert all("'" not in str(path) and '"' not in str(path) for path in split_paths(text))


def test_an_open_quotation_is_told():
    with pytest.raises(UsageError, match="quotation"):
        split_paths("'a b.png")


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
    assert split_paths("~/a picture.png") == [picture_path]


@pytest.mark.parametrize("stderr_is_terminal", [True, False])
def test_thoughts_are_shown_dimmed_and_not_remembered(
    engine, capsys, monkeypatch, stderr_is_terminal
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: stderr_is_terminal)
    talk = ChatSession(
        Thinking(engine),
        SamplingOptions(max_new_tokens=2),
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
    assert talk._turns[-1].answer == "A circle."


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
        assert dropped_files(written) == ([path], ""), written
        assert dropped_files(f"{written} what is it?") == ([path], "what is it?"), written
        assert dropped_files(f"{written} {written}") == ([path, path], ""), written
        assert split_paths(written) == [path], written
    for written in (str(path), f"file://{path}"):
        assert dropped_files(written) == ([path], ""), written


def test_a_text_of_many_backslashes_is_read_at_once(talk):
    text = "\\alpha\\beta" * 200 + "'s"
    started_s = time.thread_time()
    assert dropped_files(text) == ([], text)
    assert time.thread_time() - started_s < 2


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
    assert split_paths(r"a\ picture.png b.png") == [Path("a picture.png"), Path("b.png")]
    assert split_paths(r"not\ here.png") == [Path("not here.png")]


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
