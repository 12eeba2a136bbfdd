"""The shipped model on the shipped pictures, through the command line and both engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwencli.cli import run
from qwencli.models.builtin import bundled_folder
from qwencli.models.folder import check_folder

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPECTED = json.loads((EXAMPLES / "expected.json").read_text(encoding="utf-8"))
MAX_BYTES = 14_000_000


def ask(capsys, *arguments):
    assert run([*arguments, "--model", "scenes", "--device", "cpu", "--quiet"]) == 0
    return capsys.readouterr().out


def test_the_folder_is_complete_and_small():
    check_folder(bundled_folder())
    assert sum(path.stat().st_size for path in bundled_folder().iterdir()) <= MAX_BYTES


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_every_example_gets_its_exact_caption(capsys, engine):
    names = list(EXPECTED["captions"])
    paths = [str(EXAMPLES / name) for name in names]
    out = ask(capsys, "caption", *paths, "--engine", engine, "--json")
    captions = [json.loads(line)["caption"] for line in out.splitlines()]
    assert dict(zip(names, captions, strict=True)) == EXPECTED["captions"]


@pytest.mark.parametrize("answer", EXPECTED["answers"], ids=lambda answer: answer["prompt"])
def test_questions_and_several_pictures(capsys, answer):
    paths = [str(EXAMPLES / name) for name in answer["images"]]
    out = ask(capsys, "caption", *paths, "--multi-image", "--prompt", answer["prompt"])
    assert out.strip() == answer["answer"]


def test_presets_give_short_captions_and_tags(capsys):
    scene = str(EXAMPLES / "scene.png")
    answers = {item["prompt"]: item["answer"] for item in EXPECTED["answers"]}
    assert (
        ask(capsys, "caption", scene, "--preset", "short").strip()
        == answers["Write a short caption."]
    )
    tags = answers["List tags for this image, separated by commas."]
    assert ask(capsys, "caption", scene, "--preset", "tags").strip() == tags


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_an_answer_goes_on_from_the_beginning_that_it_is_given(engine):
    from qwencli.config import EngineConfig, EngineName, SamplingOptions
    from qwencli.engine.client import generate_many
    from qwencli.engine.factory import create_engine
    from qwencli.engine.frontend.images import open_image
    from qwencli.messages import GenerationRequest, user_message
    from qwencli.models.resolve import SearchPaths, bundled_spec

    config = EngineConfig(bundled_spec(SearchPaths()), engine=EngineName(engine), device="cpu")
    messages = (user_message("Describe this image.", (open_image(EXAMPLES / "scene.png"),)),)
    greedy = SamplingOptions(do_sample=False)
    with create_engine(config) as loaded:
        loaded.load()
        whole = loaded.generate(GenerationRequest(messages, greedy)).text
        start, rest = whole[:23].rpartition(" ")[0], whole[whole[:23].rindex(" ") :]
        begun = GenerationRequest(messages, greedy, starts_with=start + " ")
        assert loaded.generate(begun).text == rest
        assert [result.text for result in generate_many(loaded, [begun, begun])] == [rest] * 2
        # A beginning of another kind is kept to.
        other = GenerationRequest(messages, greedy, starts_with="Two green")
        assert loaded.generate(other).text != whole


@pytest.mark.parametrize(
    ("engine", "quantization", "scheme"),
    [
        ("native", "8bit", "int8"),
        ("native", "4bit", "int4-g128"),
        ("native", "fp8", "fp8-e4m3"),
        ("transformers", "8bit", "bnb-int8"),
        ("transformers", "4bit", "bnb-nf4"),
    ],
)
def test_quantized_weights_still_see_the_picture(capsys, engine, quantization, scheme):
    named = () if engine == "native" else ("--engine", engine)
    scene = str(EXAMPLES / "scene.png")
    out = ask(capsys, "caption", scene, *named, "--quantization", quantization, "--json")
    record = json.loads(out)
    assert (record["engine"], record["quantization"]) == (engine, scheme)
    assert "red circle" in record["caption"]


def test_the_native_engine_is_the_default_where_it_can_run(capsys):
    record = json.loads(ask(capsys, "caption", str(EXAMPLES / "scene.png"), "--json"))
    assert (record["engine"], record["cache"]) == ("native", "static")


def test_a_two_turn_chat(capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("What color is the circle?\nAnd the star?\n"))
    scene = str(EXAMPLES / "scene.png")
    first, second = ask(capsys, "chat", "--image", scene).splitlines()
    assert "red" in first
    assert "blue" in second
