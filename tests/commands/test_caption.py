"""`qwencli caption` end to end on a small random checkpoint."""

from __future__ import annotations

import io
import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
from PIL import Image

from qwencli.cli import run
from qwencli.engine.base_engine import BaseEngine
from qwencli.engine.frontend.chat_template import _CHATML as CHATML
from tests.engine.frontend.tiny_folder import tiny_tokenizer

FIELDS = {
    "image",
    "caption",
    "model",
    "engine",
    "quantization",
    "attention",
    "cache",
    "num_prompt_tokens",
    "num_image_tokens",
    "num_new_tokens",
    "finish_reason",
    "timings",
}
TIMINGS = {
    "load_s",
    "preprocess_s",
    "vision_encode_s",
    "prefill_s",
    "ttft_s",
    "decode_s",
    "e2e_s",
    "decode_tok_per_s",
}


@pytest.fixture
def caption(checkpoint):
    """Runs the command on the CPU with a small model; returns its exit code."""

    def call(*arguments, family="qwen3_vl"):
        base = ["caption", "--model", str(checkpoint(family)), "--device", "cpu"]
        return run([*base, "--engine", "transformers", "--max-new-tokens", "6", *arguments])

    return call


@pytest.fixture
def thinking(checkpoint, tmp_path):
    """Runs the command with a model whose template may open a thought; returns its exit code."""

    def call(*arguments, opens=True):
        folder = tmp_path / f"thinking-{opens}"
        if not folder.exists():
            shutil.copytree(checkpoint("qwen3_vl"), folder)
            template = CHATML
            if opens:
                template = template.replace("assistant\\n", "assistant\\n<think>\\n")
                assert template != CHATML
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return run(["caption", "--model", str(folder), "--device", "cpu", *arguments])

    return call


@pytest.fixture
def says(monkeypatch):
    """`says(text)`: whatever the weights, models choose the tokens of this text and end."""
    from qwencli.engine.response import ResponseBuilder

    def script(text):
        fast = tiny_tokenizer()
        ids = [*fast.encode(text).ids, fast.token_to_id("<|im_end|>")]
        add = ResponseBuilder.add

        def scripted(answer, token_id, mark):
            return add(answer, ids[len(answer.token_ids)], mark)

        monkeypatch.setattr(ResponseBuilder, "add", scripted)

    return script


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for name, size in [("one.png", (64, 64)), ("two words.jpg", (96, 64))]:
        Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths


def test_the_answer_alone_is_on_stdout(caption, pictures, capsys):
    assert caption(pictures[0], "--quiet") == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert out.endswith("\n")
    assert err == ""


def test_several_pictures_are_told_apart_by_name(caption, pictures, capsys):
    assert caption(*pictures) == 0
    out = capsys.readouterr().out
    for path in pictures:
        assert f"{path}: " in out


def test_json_has_the_fixed_fields(caption, pictures, capsys):
    assert caption(*pictures, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["image"] for record in records] == pictures
    for record in records:
        assert set(record) >= FIELDS
        assert set(record["timings"]) == TIMINGS
        assert record["num_image_tokens"] > 0
        assert record["num_new_tokens"] <= 6


@pytest.mark.parametrize("flag", ["--multi-image", "--together"])
def test_several_pictures_make_one_request(caption, pictures, capsys, flag):
    assert caption(*pictures, flag, "--json") == 0
    out, err = capsys.readouterr()
    assert err.count("--together is now called --multi-image") == (flag == "--together")
    (line,) = out.splitlines()
    record = json.loads(line)
    assert record["image"] == pictures
    assert record["num_image_tokens"] == 4 + 6


def test_stats_go_to_stderr(caption, pictures, capsys):
    assert caption(pictures[0], "--stats") == 0
    err = capsys.readouterr().err
    assert re.search(r"6 tokens \(cut off\) at [\d.]+ tok/s .* TTFT \d+ ms .* float32 on cpu", err)
    parts = "python, options and pictures", "torch and the model", "first request"
    spent = ", ".join(rf"{part} [\d.]+ s" for part in parts)
    assert re.search(rf"process: {spent}; first answer after [\d.]+ s", err)


def test_a_bad_picture_costs_its_own_answer_only(caption, pictures, tmp_path, capsys):
    bad = tmp_path / "notes.png"
    bad.write_text("not a picture", encoding="utf-8")
    missing = str(tmp_path / "missing.png")
    assert caption(str(bad), pictures[0], missing, pictures[1], "--json") == 1
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["image"] for record in records] == [str(bad), pictures[0], missing, pictures[1]]
    assert [record["caption"] is None for record in records] == [True, False, True, False]
    assert "notes.png" in records[0]["error"] and records[0]["model"] == records[1]["model"]
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert "notes.png" in lines[0]
    assert "missing.png" in lines[1]


def test_a_picture_no_model_takes_leaves_the_others(caption, pictures, tmp_path, capsys):
    Image.new("RGB", (1, 20000)).save(tmp_path / "thread.png")
    assert caption(str(tmp_path / "thread.png"), pictures[0], "--quiet") == 1
    out, err = capsys.readouterr()
    assert pictures[0] in out
    assert "thread.png" in err
    assert err.count("\n") == 1


def test_nothing_is_loaded_when_no_picture_opens(caption, monkeypatch, capsys):
    monkeypatch.setattr("qwencli.engine.factory.create_engine", lambda config: pytest.fail("load"))
    assert caption("missing.png") == 1
    assert "missing.png" in capsys.readouterr().err


def test_presets_and_prompts_change_the_request(caption, pictures, capsys):
    def tokens(*arguments):
        assert caption(pictures[0], "--json", *arguments) == 0
        return json.loads(capsys.readouterr().out)["num_prompt_tokens"]

    plain = tokens()
    assert tokens("--preset", "tags") > plain
    assert tokens("--prompt", "x") < plain
    assert tokens("--system", "Be brief.") > plain


def test_pixels_bound_the_picture(caption, tmp_path, capsys):
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "big.png")

    def image_tokens(*arguments):
        assert caption(str(tmp_path / "big.png"), "--json", *arguments) == 0
        return json.loads(capsys.readouterr().out)["num_image_tokens"]

    assert image_tokens() == 64
    assert image_tokens("--max-pixels", "16384") == 16
    assert image_tokens("--min-pixels", "200000", "--max-pixels", "300000") > 64


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "asked",
    [
        ("--json",),
        ("--multi-image",),
        ("--schema", "boxes"),
        ("--samples", "2", "--temperature", "1"),
        ("--load-format", "dummy"),
        ("--engine", "native"),
        ("FOLDER",),
        ("FOLDER", "--device", "auto", "--devices", "cpu,cpu"),
    ],
)
def test_a_text_model_refuses_pictures_before_it_is_loaded(caption, pictures, capsys, asked):
    folder = Path(pictures[0]).parent
    inputs = [str(folder)] if "FOLDER" in asked else pictures
    assert caption(*inputs, *(each for each in asked if each != "FOLDER"), family="qwen3") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("reads text only: it cannot look at pictures") == 1
    assert err.count("error:") == 1 and "--model qwen3-vl-4b" in err
    assert not list(folder.glob("*.txt"))


@pytest.mark.usefixtures("no_weights")
def test_a_text_model_refuses_pictures_before_its_download(caption, pictures, capsys, monkeypatch):
    monkeypatch.setattr("qwencli.models.resolve.locate", lambda *_, **__: pytest.fail("a download"))
    assert run(["caption", pictures[0], "--model", "qwen3-8b", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: qwen3-8b reads text only") and err.count("\n") == 1


def test_sampling_flags_reach_the_engine(caption, pictures, capsys):
    flags = ["--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--seed"]

    def text(seed):
        assert caption(pictures[0], *flags, seed) == 0
        return capsys.readouterr().out

    assert text("1") == text("1")
    assert text("1") != text("2")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--device", "cuda"], 1, "--device cuda"),
        (["--device", "tpu"], 1, "'tpu' is not a device"),
        (["--cache", "static-compile"], 2, "transformers compiles on CUDA only"),
        (["--cache", "static-graph"], 2, "static-graph cannot run"),
        (["--attention", "flash_attention_2"], 2, "needs a CUDA GPU"),
        (["--quantization", "fp8"], 2, "fp8 cannot run"),
        (["--max-seq-len", "8"], 1, "holds 8"),
        (["--max-seq-len", "many"], 2, "--max-seq-len 'many' is not a length"),
        (["--max-seq-len", "0"], 2, "--max-seq-len '0' is not a length"),
        (["--max-seq-len", "-5"], 2, "--max-seq-len '-5' is not a length"),
        (["--max-seq-len", "9" * 30], 2, "is not a length"),
        (["--stop", ""], 2, "--stop is empty"),
        (["--max-pixels", "0"], 2, "--max-pixels 0 is out of range"),
        (["--max-pixels", str(10**12)], 2, "is out of range"),
        (["--max-pixels", "10"], 2, "(one token of this model)"),
        (["--min-pixels", "9000", "--max-pixels", "8000"], 2, "more than --max-pixels 8000"),
        (["--max-seq-len", "100000"], 2, "was made for 4096 tokens"),
    ],
)
def test_modes_that_cannot_run_say_so(caption, pictures, capsys, arguments, code, part):
    assert caption(pictures[0], *arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.count("\n") == 1


def test_stop_strings_end_the_answer(caption, pictures, capsys):
    # As JSON: random weights answer with control characters too, which plain text writes out.
    assert caption(pictures[0], "--greedy", "--json") == 0
    free = json.loads(capsys.readouterr().out)["caption"]
    stops = ("--stop", "not there", "--stop", free[2:4])
    assert caption(pictures[0], "--greedy", "--json", *stops) == 0
    assert json.loads(capsys.readouterr().out)["caption"] == free[: free.index(free[2:4])]


def test_auto_length_is_said_on_stderr(caption, pictures, capsys):
    assert caption(pictures[0], "--engine", "native", "--max-seq-len", "auto") == 0
    err = capsys.readouterr().err
    assert "--max-seq-len auto: 4096 (GiB: weights 0.0, cache for 4096 tokens" in err


def test_an_animation_is_a_picture_or_with_frames_a_video(caption, tmp_path, capsys):
    first, *rest = [Image.radial_gradient("L").rotate(15 * i).resize((64, 64)) for i in range(6)]
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=rest, duration=300)

    def tokens(*arguments):
        assert caption(str(path), "--json", "--max-pixels", "4096", *arguments) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["image"] == str(path)
        return record["num_image_tokens"]

    assert tokens("--frames", "6") == 3 * tokens()
    assert tokens("--frames", "6", "--engine", "native") == 3 * tokens()


def test_a_video_without_its_package_costs_its_own_answer_only(
    caption, pictures, tmp_path, capsys, monkeypatch
):
    import importlib.util

    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "av" else found(name, *a)
    )
    assert caption(str(tmp_path / "a.mp4"), pictures[0]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(pictures[0])
    assert "a.mp4 is a video file: the package av is not installed" in err


@pytest.mark.parametrize("kind", ["missing", "damaged", "long name", "unreadable", "memory"])
@pytest.mark.parametrize("together", [False, True])
def test_one_that_cannot_be_opened_never_costs_the_others(
    caption, pictures, tmp_path, capsys, monkeypatch, kind, together
):
    bad = tmp_path / ("b" * 300 if kind == "long name" else "bad.png")
    if kind in ("damaged", "unreadable", "memory"):
        bad.write_bytes(b"\x89PNG\r\n\x1a\n")
    if kind == "unreadable":
        monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(bad))
    if kind == "memory":

        def full(path, name):
            if path == bad:
                raise MemoryError
            return path.open("rb")

        monkeypatch.setattr("qwencli.engine.frontend.videos.open_file", full)
    arguments = [str(bad), pictures[0], str(bad), pictures[1], "--json"]
    assert caption(*arguments, *(["--multi-image"] if together else [])) == 1
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    answered = [record["image"] for record in records if record["caption"] is not None]
    assert answered == ([pictures] if together else pictures)
    assert [record["image"] for record in records if record["caption"] is None] == [str(bad)] * 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [str(bad) in line for line in errors] == [True] * 2
    assert ("note: 2 of 4 images are shown" in err) == together


def test_nothing_is_asked_together_where_nothing_opens(caption, capsys):
    assert caption("a.png", "b.png", "--multi-image") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("no such file") == err.count("\n") == 2


@pytest.mark.parametrize(
    ("encoding", "name"), [("cp1252", "\U0001f600.png"), ("utf-8", "\udce9.png")]
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_name_that_stdout_cannot_encode(
    caption, pictures, tmp_path, monkeypatch, encoding, name, form
):
    try:
        Path(pictures[0]).rename(tmp_path / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    arguments = [str(tmp_path / name), pictures[1]] + (["--json"] if form == "json" else [])
    assert caption(*arguments) == 0
    first, second = stdout.buffer.getvalue().decode(encoding).splitlines()
    if form == "json":
        assert json.loads(first)["image"] == str(tmp_path / name)
        assert json.loads(second)["image"] == pictures[1]
    else:
        escaped = "\\xe9.png" if encoding == "utf-8" else "\\U0001f600.png"
        assert first.startswith(f"{tmp_path / escaped}: ")


def test_a_large_picture_is_not_held_while_the_next_is_opened(caption, pictures, monkeypatch):
    from qwencli.engine.frontend import videos

    opened = []
    open_visual = videos.open_visual

    def watched(*arguments, **settings):
        assert all(shown() is None for shown in opened)
        part = open_visual(*arguments, **settings)
        opened.append(weakref.ref(part.image))
        return part

    monkeypatch.setattr(videos, "open_visual", watched)
    for engine in ("native", "transformers"):
        opened.clear()
        assert caption(*pictures, *pictures, "--engine", engine) == 0
        assert len(opened) == 4


def test_unknown_model_names_close_ones(pictures, capsys):
    assert run(["caption", pictures[0], "--model", "qwen3-vl-4"]) == 1
    assert "qwen3-vl-4b" in capsys.readouterr().err


def test_dummy_weights_of_a_built_in_family(pictures, checkpoint, capsys, tmp_path):
    folder = tmp_path / "shape"
    folder.mkdir()
    shape = (checkpoint("qwen2_5_vl") / "config.json").read_text(encoding="utf-8")
    shape = shape.replace('"vocab_size": 432', '"vocab_size": 5000')
    (folder / "config.json").write_text(shape, encoding="utf-8")
    arguments = ["--load-format", "dummy", "--max-new-tokens", "4", "--device", "cpu", "--json"]
    code = run(["caption", pictures[0], "--model", str(folder), *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out)["num_image_tokens"] > 0


def test_offline_never_asks_the_hub(pictures, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert run(["caption", pictures[0], "--model", "Qwen/No-Such-Model", "--offline"]) == 1
    assert "--offline" in capsys.readouterr().err


def test_json_says_what_drafted_tokens_did(caption, pictures, capsys):
    arguments = ("--engine", "native", "--greedy", "--max-new-tokens", "40", "--json")
    records = []
    for speculate in ("off", "3"):
        assert caption(pictures[0], *arguments, "--speculate", speculate) == 0
        records.append(json.loads(capsys.readouterr().out))
    plain, drafted = records
    assert drafted["caption"] == plain["caption"]
    assert (plain["speculate"], plain["speculation"]) == ("off", None)
    assert drafted["speculate"] == "3"
    found = drafted["speculation"]
    assert set(found) == {"num_drafted", "num_accepted", "net_gain", "accept_percent"}
    assert found["num_drafted"] > 0 and found["net_gain"] > 0


def test_the_statistics_line_says_what_drafted_tokens_did(caption, pictures, capsys):
    arguments = ("--engine", "native", "--greedy", "--max-new-tokens", "40", "--stats")
    assert caption(pictures[0], *arguments, "--speculate", "auto") == 0
    assert re.search(r"\d+ of \d+ drafts accepted, gain [\d.]+", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--speculate", "auto"),
            "drafted tokens need the native engine",
        ),
        (("--engine", "native", "--speculate", "2", "--cache", "dynamic"), "--cache dynamic"),
        (("--speculate", "9"), "--speculate"),
    ],
)
def test_where_nothing_can_be_drafted_one_line_says_why(
    caption, pictures, capsys, arguments, message
):
    assert caption(pictures[0], *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_picture_that_fails_in_the_engine_is_an_object_too(caption, pictures, tmp_path, capsys):
    thread = str(tmp_path / "thread.png")
    Image.new("RGB", (1, 20000)).save(thread)
    assert caption(thread, pictures[0], "--multi-image", "--json") == 1
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert record["image"] == [thread, pictures[0]]
    assert record["caption"] is None and "thread.png" in record["error"]


def test_json_has_the_sizes_that_map_boxes_back(caption, tmp_path, capsys):
    path = str(tmp_path / "wide.png")
    Image.radial_gradient("L").resize((100, 70)).convert("RGB").save(path)
    assert caption(path, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["image_size"] == [100, 70]
    assert record["resized_size"] == [96, 64]
    assert record["num_image_tokens"] == 96 * 64 // 32**2
    assert caption(path, path, "--multi-image", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["image_size"] == [[100, 70]] * 2
    assert record["resized_size"] == [[96, 64]] * 2


def test_a_caption_that_is_cut_off_says_so(caption, pictures, says, capsys):
    says("A red circle on the left")
    assert caption(pictures[0], "--stats") == 0
    err = capsys.readouterr().err
    assert f"note: {pictures[0]}: the answer is cut off after 6 new tokens" in err
    assert "--max-new-tokens" in err and "6 tokens (cut off) at" in err
    assert caption(pictures[0], "--stats", "--max-new-tokens", "99") == 0
    err = capsys.readouterr().err
    assert "note: " not in err and "cut off" not in err


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize(
    ("opens", "said"),
    [
        (True, "Hm, I see it.\n</think>\n\nA circle."),
        (False, "<think>\nHm, I see it.\n</think>\n\nA circle."),
        (False, "Hm, I see it.\n</think>\n\nA circle."),
    ],
)
def test_thoughts_are_no_part_of_a_caption(thinking, pictures, says, capsys, engine, opens, said):
    says(said)
    arguments = (pictures[0], "--engine", engine, "--max-new-tokens", "99")
    assert thinking(*arguments, opens=opens) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("A circle.\n", "")
    assert thinking(*arguments, "--json", opens=opens) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["caption"], record["thoughts"]) == ("A circle.", "Hm, I see it.")


def test_think_is_what_the_template_is_told(checkpoint, tmp_path, pictures, says, capsys):
    folder = tmp_path / "switched"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    begins = "{%- if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
    template = CHATML + "{%- if add_generation_prompt %}" + begins + "{%- endif %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    says("I see it.</think>A circle.")
    arguments = ["caption", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "99"]
    thoughts = []
    for switch in ("--think", "--no-think"):
        assert run([*arguments, pictures[0], "--json", switch]) == 0
        said = capsys.readouterr()
        record = json.loads(said.out)
        thoughts.append((record["caption"], record["thoughts"], record["num_prompt_tokens"]))
        assert "thinking was asked for" not in said.err
    assert thoughts[0][:2] == ("A circle.", "I see it.")
    assert thoughts[1][2] > thoughts[0][2], "an empty thought is closed in the prompt"
    assert run([*arguments, str(Path(pictures[0]).parent), "--think"]) == 2
    assert "--think without a bound is for a few pictures" in capsys.readouterr().err


def test_what_is_wrong_with_an_answer_names_its_picture(caption, pictures, tmp_path, capsys):
    """Once, in whatever way pictures were named."""
    assert caption(*pictures, "--max-seq-len", "8") == 1
    for picture, line in zip(pictures, capsys.readouterr().err.splitlines(), strict=True):
        assert line.startswith(f"error: {picture}: the prompt has")
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(pictures[0], folder / "long.png")
    (folder / "none.png").write_text("none")
    assert caption(str(folder), "--max-seq-len", "8") == 1
    (long, none) = (each for each in capsys.readouterr().err.splitlines() if "error:" in each)
    assert long.startswith("error: long.png: the prompt has")
    assert none.startswith(f"error: {folder / 'none.png'} is not a picture")


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_what_nobody_foresaw_costs_one_picture(caption, pictures, monkeypatch, capsys, engine):
    building = BaseEngine._built

    def built(self, request, matcher):
        (named,) = [part.name for part in request.messages[-1].parts if hasattr(part, "name")]
        if "one.png" in named:
            raise ValueError("simulated")
        return building(self, request, matcher)

    monkeypatch.setattr(BaseEngine, "_built", built)
    for inputs in (pictures, [str(Path(pictures[0]).parent)]):
        assert caption(*inputs, "--engine", engine, "--guards", "none") == 1
        out, err = capsys.readouterr()
        (line,) = [each for each in err.splitlines() if "error:" in each]
        assert "one.png: a request failed" in line and "ValueError: simulated" in line
        assert inputs != pictures or out.startswith(f"{pictures[1]}: ")
    assert len(list(Path(pictures[0]).parent.glob("*.txt"))) == 1


CANNOT_THINK = "cannot think before it answers"


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing is loaded."""

    def load(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr("qwencli.engine.base_engine.BaseEngine.load", load)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "asked", [("--think",), ("--thinking-budget", "9"), ("--think", "--engine", "transformers")]
)
def test_thoughts_of_a_model_that_has_none_are_refused_once(thinking, pictures, capsys, asked):
    assert thinking(*pictures, *asked, "--json", opens=False) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"thinking-False {CANNOT_THINK}" in err and "leave out --think" in err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("shape", [(), ("--schema", "boxes"), ("--load-format", "dummy")])
def test_a_set_is_not_begun_with_thoughts_that_cannot_be(thinking, pictures, capsys, shape):
    folder = Path(pictures[0]).parent
    inputs = pictures if shape else [str(folder)]
    assert thinking(*inputs, "--thinking-budget", "9", *shape, opens=False) == 2
    err = capsys.readouterr().err
    assert err.count(CANNOT_THINK) == 1 and err.count("error") == 1
    assert not list(folder.glob("*.txt"))


def test_a_model_without_thoughts_may_be_told_to_have_none(thinking, pictures, says, capsys):
    says("A circle.")
    for none in ("--no-think", "--thinking-budget=0"):
        assert thinking(pictures[0], none, opens=False) == 0
    assert capsys.readouterr() == ("A circle.\nA circle.\n", "")


def test_a_thought_that_takes_all_tokens_leaves_no_caption(thinking, pictures, says, capsys):
    says("Hm, I see it, and I see it, and I see it.")
    assert thinking(pictures[0], "--max-new-tokens", "4", "--json") == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["caption"] == "" and record["thoughts"].startswith("Hm, ")
    assert "thinking took all 4 new tokens" in err and "--max-new-tokens" in err


def test_thoughts_end_after_their_budget(thinking, pictures, capsys, monkeypatch):
    monkeypatch.setattr("qwencli.engine.frontend.prompt.OUT_OF_THOUGHTS", "\n\nEnough.\n")
    arguments = ("--thinking-budget", "5", "--max-new-tokens", "40", "--greedy")
    assert thinking(*pictures, *arguments, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2
    for record in records:
        assert 5 < record["num_thinking_tokens"] < record["num_new_tokens"] <= 40
        assert record["thoughts"].endswith("Enough.")
        assert record["caption"] and "Enough" not in record["caption"]
    folder = Path(pictures[0]).parent
    assert thinking(str(folder), *arguments, "--guards", "none") == 0
    for picture in pictures:
        caption = Path(picture).with_suffix(".txt").read_text(encoding="utf-8")
        assert caption.strip() and "Enough" not in caption
    # The template opens a thought in any case; it is closed at once.
    for none in ("--thinking-budget=0", "--no-think"):
        assert thinking(pictures[0], "--max-new-tokens", "9", none, "--json") == 0
        record = json.loads(capsys.readouterr().out)
        assert record["thoughts"] is None and record["num_thinking_tokens"] == 0


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (("--thinking-budget", "-1"), "--thinking-budget -1 is out of range"),
        (("--thinking-budget", "many"), "--thinking-budget is a whole number"),
        (("--thinking-budget", "9", "--no-think"), "--no-think exclude each other"),
        (("--thinking-budget", "9", "--max-new-tokens", "9"), "leaves nothing of --max-new-tokens"),
        (("--thinking-budget", "9", "--max-new-tokens", "9"), "raise --max-new-tokens to 521"),
        (
            ("--thinking-budget", "8000", "--max-new-tokens", "9"),
            "give a smaller --thinking-budget",
        ),
        (("--thinking-budget", "9", "--starts-with", "A"), "exclude each other"),
    ],
    ids=str,
)
def test_a_budget_that_means_nothing_is_one_line(thinking, pictures, capsys, said, told):
    assert thinking(pictures[0], *said) == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err


def test_a_stop_string_looks_at_the_answer_alone(thinking, pictures, says, capsys):
    says("one. two.</think>three. four.")
    assert thinking(pictures[0], "--max-new-tokens", "99", "--stop", ".") == 0
    assert capsys.readouterr().out == "three\n"


def test_help_has_the_defaults_of_sampling(capsys):
    from qwencli.config import SamplingParams

    assert run(["caption", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    base = SamplingParams()
    assert f"Default: {base.max_new_tokens}." in text
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert f"Default: the model's, else {getattr(base, name):g}." in text


@pytest.mark.parametrize("least", [2, 99])
def test_one_notice_says_that_the_first_frame_alone_is_shown(
    caption, tmp_path, capsys, monkeypatch, least
):
    monkeypatch.setattr("qwencli.engine.protocol.ManyRequests.batch_from", least)
    frames = [Image.new("RGB", (64, 64), (40 * i, 90, 10)) for i in range(3)]
    paths = [str(tmp_path / name) for name in ("a.gif", "b.webp", "c.png", "d.gif", "e.tif")]
    for path in paths:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    assert caption(*paths, "--engine", "native") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "is shown" in line]
    assert lines == [
        f"note: {', '.join(paths[:3])} and 1 more: of several frames the first is shown "
        "(--frames N shows N of them)",
        f"note: {paths[4]}: of several pages the first is shown "
        "(--frames N takes animations, no pages: make a file of each)",
    ]
    assert caption(*paths[:4], "--engine", "native", "--frames", "2") == 0
    assert "is shown" not in capsys.readouterr().err


def test_many_pictures_are_answered_together_in_their_order(
    checkpoint, tmp_path, capsys, monkeypatch
):
    """The same lines as one at a time, an unusable file among them at its place."""
    paths = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64 + 32 * (number % 3), 64), (number * 30, 90, 10)).save(path)
        paths.append(str(path))
    (tmp_path / "3.png").write_bytes(b"no picture")
    base = ["caption", "--model", str(checkpoint("qwen3_vl")), "--device", "cpu", "--greedy"]
    said = []
    for least in (99, 2):
        monkeypatch.setattr("qwencli.engine.protocol.ManyRequests.batch_from", least)
        assert run([*base, "--max-new-tokens", "6", "--json", *paths]) == 1
        out, err = capsys.readouterr()
        said.append([json.loads(line) for line in out.splitlines()])
        assert "3.png" in err
    one_by_one, together = said
    assert [each["image"] for each in together] == [each["image"] for each in one_by_one] == paths
    for field in ("caption", "num_prompt_tokens", "num_new_tokens", "finish_reason"):
        assert [each.get(field) for each in together] == [each.get(field) for each in one_by_one]
    assert together[0]["attention"] == "sdpa"
