"""Prompts, guards and format of `qwencli caption FOLDER`, on an engine that says what is asked."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter

import pytest

from qwencli.messages import TextPart
from tests.dataset.conftest import captions, failures

GOOD = "A cat sits on a mat."


def prompt_of(request):
    return "\n".join(p.text for p in request.messages[-1].parts if isinstance(p, TextPart))


@pytest.fixture
def answers(engine):
    """`answers(first, second, ...)`: what a picture is told at each attempt; the last stays."""
    requests = []

    def give(*texts, by=None):
        seen = Counter()

        def answer(request):
            requests.append(request)
            picture = request.messages[-1].parts[0].image.tobytes()
            text = texts[min(seen[picture], len(texts) - 1)]
            seen[picture] += 1
            return text(request) if callable(text) else text

        engine.answer = answer
        return requests

    return give


BAD = {
    "refusal": "I'm sorry, but I can't assist with that.",
    "loop": "A cat on a mat on a mat on a mat on a mat on a mat on a mat on a mat.",
    "preamble": "Sure! Here is a caption for the image: A cat.",
    "closing": "A cat. Let me know if you'd like more!",
    "empty": "  \n",
    "language": "一只猫坐在垫子上。",
    "thinking": "<think>The user wants a caption",
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_answer_is_asked_again_and_never_written(caption, pictures, answers, fault):
    folder = pictures("a.png", "b.png")
    requests = answers(BAD[fault], GOOD)
    assert caption(folder) == 0
    assert captions(folder) == {"a.txt": GOOD + "\n", "b.txt": GOOD + "\n"}
    assert len(requests) == 4
    first, again = requests[0], requests[-1]
    assert again.sampling != first.sampling


@pytest.mark.parametrize("fault", BAD)
def test_what_stays_bad_is_listed_as_failed(caption, pictures, answers, capsys, fault):
    folder = pictures("a.png")
    requests = answers(BAD[fault])
    assert caption(folder, "--retries", 1) == 1
    assert captions(folder) == {}
    assert len(requests) == 2
    (row,) = failures(folder)
    assert row["path"] == "a.png" and fault in row["reason"] and row["attempts"] == 2
    assert fault in capsys.readouterr().err
    # With the same options it would fail again; asked for it is tried.
    assert caption(folder, "--retries", 1) == 1
    assert len(requests) == 2
    answers(GOOD)
    assert caption(folder, "--retries", 1, "--retry-failed") == 0
    assert failures(folder) == []


def test_what_is_cut_off_gets_more_room(caption, pictures, engine):
    folder = pictures("a.png")
    asked = []

    def answer(request):
        asked.append(request.sampling.max_new_tokens)
        engine.finish_reason = "length" if asked[-1] < 40 else "stop"
        return "A cat sits on the" if asked[-1] < 40 else GOOD

    engine.answer = answer
    assert caption(folder, "--max-new-tokens", 10, "--retries", 2) == 0
    assert asked == [10, 20, 40]
    assert captions(folder)["a.txt"] == GOOD + "\n"


def test_no_retry_asks_for_more_than_a_request_may_have(caption, pictures, engine):
    folder = pictures("a.png")
    engine.max_seq_len, engine.finish_reason = 200, "length"
    asked = []

    def answer(request):
        asked.append(request.sampling.max_new_tokens)
        return "A cat sits on the"

    engine.answer = answer
    assert caption(folder, "--max-new-tokens", 80) == 1
    assert asked == [80, 129, 129]
    assert "truncated" in failures(folder)[0]["reason"]


def test_a_cut_at_a_sentences_end_is_no_loss(caption, pictures, engine):
    folder = pictures("a.png")
    engine.answer, engine.finish_reason = lambda request: "A cat sits. It wears a", "length"
    assert caption(folder, "--max-sentences", 1) == 0
    assert captions(folder)["a.txt"] == "A cat sits.\n"


def test_guards_may_be_left_out(caption, pictures, answers):
    folder = pictures("a.png")
    requests = answers(BAD["preamble"])
    assert caption(folder, "--guards", "-preamble") == 0
    assert len(requests) == 1
    answers("")
    assert caption(folder, "--existing", "overwrite", "--guards", "none") == 1


def test_one_bad_picture_of_many(caption, pictures, engine):
    folder = pictures(*(f"{n}.png" for n in range(40)))
    bad = (folder / "7.png").read_bytes()
    from PIL import Image

    colour = Image.open(folder / "7.png").getpixel((0, 0))

    def answer(request):
        same = request.messages[-1].parts[0].image.getpixel((0, 0)) == colour
        return BAD["loop"] if same else GOOD

    engine.answer = answer
    assert bad
    assert caption(folder) == 1
    written = captions(folder)
    assert len(written) == 40 - len(failures(folder)) and "7.txt" not in written
    assert set(written.values()) == {GOOD + "\n"}


def test_shape(caption, pictures, answers):
    folder = pictures("10_sks/a.png")
    answers("A cat.\n\nIt has a red hat. It sleeps.")
    assert (
        caption(
            folder, "-r", "--prefix", "{dir}, ", "--suffix", " ({name})", "--max-sentences", 2,
            "--replace", "cat=sks cat", "--replace", "red hat=cap",
        )
        == 0
    )  # fmt: skip
    assert captions(folder) == {"10_sks/a.txt": "10_sks, A sks cat. It has a cap. (a)\n"}


def test_banned_words(caption, pictures, answers):
    folder = pictures("a.png", "b.png")
    requests = answers("A cat with a watermark.", "cat, watermark, hat")
    assert caption(folder, "--ban", "watermark") == 0
    assert captions(folder) == {"a.txt": "cat, hat\n", "b.txt": "cat, hat\n"}
    assert "watermark" in prompt_of(requests[-1])


def test_an_answer_may_be_given_its_beginning(caption, pictures, answers):
    folder = pictures("a.png")
    requests = answers(" cat on a mat.")
    assert caption(folder, "--starts-with", "A photo of a ", "--prefix", "sks,") == 0
    assert requests[0].starts_with == "A photo of a "
    assert captions(folder) == {"a.txt": "sks, A photo of a cat on a mat.\n"}


def test_prompts_with_what_is_known_of_each_picture(caption, pictures, answers):
    folder = pictures("dogs/rex.png", "cats/tom.png")
    (folder / "dogs/rex.json").write_text(
        json.dumps({"breed": "collie", "tags": ["dog", "grass"]}), encoding="utf-8"
    )
    requests = answers(GOOD)
    prompt = "{name} in {dir}; {breed|unknown}; {tags|none}; {caption|-}"
    assert caption(folder, "-r", "--prompt", prompt) == 0
    assert {prompt_of(request) for request in requests} == {
        "rex in dogs; collie; dog, grass; -",
        "tom in cats; unknown; none; -",
    }


def test_the_caption_that_is_there_may_be_shown(caption, pictures, answers):
    folder = pictures("a.png")
    (folder / "a.txt").write_text("cat, mat\n", encoding="utf-8")
    requests = answers(GOOD)
    assert caption(folder, "--prompt", "Use {tags}.", "--existing", "overwrite") == 0
    assert prompt_of(requests[0]) == "Use cat, mat."


def test_hints_that_are_broken_cost_their_picture(caption, pictures, answers):
    folder = pictures("a.png", "b.png")
    (folder / "a.json").write_text("{", encoding="utf-8")
    (folder / "b.json").write_text('{"who": "Tom"}', encoding="utf-8")
    requests = answers(GOOD)
    assert caption(folder, "--prompt", "Who is {who}?") == 1
    assert [prompt_of(request) for request in requests] == ["Who is Tom?"]
    assert "a.json is not JSON" in failures(folder)[0]["reason"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "{tgas}"], "{tgas} is not a field"),
        (["--prefix", "{trigger}"], "--prefix: {trigger}"),
        (["--prompt-file", "none.txt"], "none.txt"),
        (["--prompt", "a", "--preset", "tags"], "exclude"),
        (["--preset", "nope"], "unknown"),
        (["--replace", "x"], "A=B"),
        (["--language", "xx"], "--language"),
        (["--guards", "nope"], "--guards"),
        (["--field", "nope"], "--field"),
        (["--retries", "-1"], "retries"),
    ],
)
def test_wrong_options_are_one_line_before_a_model_loads(
    caption, pictures, engine, capsys, options, says
):
    folder = pictures("a.png")
    engine.load = lambda: pytest.fail("the model was loaded")
    assert caption(folder, *options) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.strip().splitlines()) == 1
    assert captions(folder) == {} and not (folder / ".qwencli").exists()


def test_weighted_prompts_are_the_same_when_a_run_goes_on(caption, pictures, answers, tmp_path):
    names = [f"{n}.png" for n in range(60)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("3: Say much.\n1: Say little.\n", encoding="utf-8")
    asked = []
    for run in range(2):
        folder = pictures(*names, folder=f"set{run}")
        if run:
            for name in names[:30]:
                (folder / name).with_suffix(".txt").write_text("x", encoding="utf-8")
        requests = answers(GOOD)
        requests.clear()
        assert caption(folder, "--prompt-file", prompts, "--seed", 3) == 0
        with sqlite3.connect(folder / ".qwencli/manifest.sqlite") as db:
            asked.append(dict(db.execute("SELECT path, prompt FROM entries")))
    assert len(asked[0]) == 60 and len(asked[1]) == 30
    assert asked[1].items() <= asked[0].items()
    counts = Counter(asked[0].values())
    assert counts["Say much."] > counts["Say little."] > 3


def test_several_questions_a_picture(caption, pictures, answers):
    folder = pictures("a.png")
    answers(lambda request: f"Answer to {prompt_of(request)}")
    assert caption(folder, "-p", "Say.", "--field", "mood=What mood?", "--field", "short") == 0
    written = captions(folder)
    assert written["a.txt"] == "Answer to Say.\n"
    assert written["a.mood.txt"] == "Answer to What mood?\n"
    assert written["a.short.txt"] == "Answer to Write a short caption.\n"


def test_a_dry_run_shows_what_the_first_pictures_are_asked(caption, pictures, engine, capsys):
    folder = pictures(*(f"{n}.png" for n in range(9)))
    (folder / "1.json").write_text("{", encoding="utf-8")
    assert caption(folder, "--prompt", "Is {name} {tags|blue}?", "--dry-run") == 0
    err = capsys.readouterr().err
    assert "0.png: caption: Is 0 blue?" in err
    assert "1.json is not JSON" in err
    assert "3.png" not in err
    assert engine.answered == 0


def test_pictures_that_are_named_are_printed_in_their_shape(caption, pictures, answers, capsys):
    folder = pictures(*(f"{n}.png" for n in range(20)), "bad.png")
    (folder / "bad.png").write_bytes(b"no picture")
    requests = answers(BAD["preamble"], GOOD)
    assert caption(folder / "3.png", "--prefix", "{name}:", "-p", "Is {name} {dir}?") == 0
    assert capsys.readouterr().out == f"3: {GOOD}\n"
    assert prompt_of(requests[0]) == "Is 3 set?"
    names = [folder / f"{n}.png" for n in (*range(19, -1, -1), 3)]
    assert caption(*names, folder / "bad.png", "--suffix", "!", "--field", "short") == 1
    out = capsys.readouterr().out.splitlines()
    assert out == [f"{name}: short: {GOOD}!" for name in names[:-1]]
    assert captions(folder) == {}
    assert caption(folder / "3.png", "--ban", "cat", "--json", "--retries", 0) == 1
    assert json.loads(capsys.readouterr().out)["caption"] is None
    assert caption(folder / "3.png", "--ban", "dog", "--json") == 0
    assert json.loads(capsys.readouterr().out)["caption"] == GOOD
    assert caption(folder / "3.png", "--prefix", "x", "--multi-image") == 2


def test_fields_of_a_prompt_are_filled_for_named_pictures_too(caption, pictures, answers, capsys):
    path = pictures("3.png") / "3.png"
    requests = answers(GOOD)
    assert caption(path, "--prompt", "Is {name} {dir}?") == 0
    assert caption(path, "--prompt", 'As {"a": 1}, {{name}}.') == 0
    assert [prompt_of(request) for request in requests] == ["Is 3 set?", 'As {"a": 1}, {name}.']
    assert capsys.readouterr().out == f"{GOOD}\n" * 2
    for options in (["--prompt", "{tgas}"], ["--prompt", "{name}", "--multi-image"]):
        assert caption(path, *options) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.strip().splitlines()) == 1
    assert len(requests) == 2


@pytest.mark.parametrize("named", [False, True])
def test_a_picture_that_does_not_open_is_told_of_once(caption, pictures, answers, capsys, named):
    folder = pictures("a.png")
    (folder / "bad.png").write_bytes(b"no picture")
    answers(GOOD)
    what = [folder / "a.png", folder / "bad.png"] if named else [folder]
    asked = ["--samples", "2", "--field", "mood=Which mood?", "--field", "short"]
    assert caption(*what, *asked, "--json") == 1
    out, err = capsys.readouterr()
    assert err.count("bad.png is not a picture") == 1
    events = [json.loads(line) for line in out.splitlines()]
    assert sum("error" in event for event in events) == 4


def test_quiet_says_why_the_exit_code_is_1(caption, pictures, capsys):
    folder = pictures("a.png")
    (folder / "bad.png").write_bytes(b"no picture")
    assert caption(folder) == 1
    capsys.readouterr()
    assert caption(folder, "-q") == 1
    err = capsys.readouterr().err
    assert err.startswith("exit code 1: 1 caption that failed before") and err.count("\n") == 1


def test_tokens_are_the_models(caption, pictures, answers):
    from qwencli.engine.frontend.tokenizer import Tokenizer
    from qwencli.models.builtin import bundled_folder

    folder = pictures("a.png")
    answers("Unfathomableness. Two red words follow here now. The end.")
    most = len(Tokenizer.from_folder(bundled_folder()).encode("Unfathomableness.")) + 2
    assert most > 4
    assert caption(folder, "--max-caption-tokens", most) == 0
    assert captions(folder)["a.txt"] == "Unfathomableness.\n"
