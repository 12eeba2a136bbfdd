"""Graphs of the nodes on the CPU: with the bundled model, and with engines that fail on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwencli.comfyui import engine_use
from qwencli.comfyui.convert import convert
from qwencli.comfyui.engine_keeper import KEEPER, EngineKeeper
from qwencli.comfyui.nodes import NodeError
from qwencli.comfyui.schemas import NODES
from qwencli.errors import OutOfMemoryError
from qwencli.messages import GenerationRequest, ImagePart, TextPart, VideoPart
from tests.comfyui.comfy_stub import (
    Graph,
    InterruptProcessingException,
    Management,
    ProgressBar,
    RefusedGraph,
)
from tests.comfyui.conftest import EXAMPLES
from tests.dataset.fake_engine import FakeEngine

SCENE = "A large red circle on the left and a small blue star on the right, on a white background."
BASE = {"model": "scenes", "temperature": 0.0, "max_new_tokens": 48}


@pytest.fixture(scope="module")
def graph(pictures: dict[str, Any]) -> Iterator[Graph]:
    yield Graph(**pictures)
    KEEPER.close()


Answers = Callable[[GenerationRequest], str]


@pytest.fixture
def engine_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answers], FakeEngine]:
    """Have the nodes ask an engine that answers so."""

    def made(answer: Answers) -> FakeEngine:
        engine = FakeEngine(answer=answer)

        def create(wanted: Any, keep_s: float, abilities: Any) -> Any:
            engine.config = wanted.config
            return engine

        monkeypatch.setattr(engine_use, "KEEPER", EngineKeeper(create))
        return engine

    return made


def test_a_single_picture(graph: Graph, management: Management) -> None:
    text, texts, statistics = graph.one("QwencliCaption", images=["scene"], **BASE)
    assert text == SCENE and texts == [SCENE]
    assert "tok/s" in statistics and "TTFT" in statistics and "native, none" in statistics
    assert "bundled model" in statistics


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (
            "QwenVL",
            {"text": "Describe this image in detail.", "model": "scenes", "image1": ["p", 0]},
        ),
        (
            "AILab_QwenVL_Advanced",
            {"preset_prompt": "Detailed Description", "model_name": "scenes", "image": ["p", 0]},
        ),
    ],
)
def test_a_converted_graph(
    graph: Graph, management: Management, kind: str, values: dict[str, Any]
) -> None:
    old = {"1": {"class_type": kind, "inputs": {**values, "do_sample": False, "seed": 1}}}
    converted = convert(old, "old.json").document
    converted["1"]["inputs"] |= {"images": ["scene"], "do_sample": False}
    text, _, _ = graph.run(converted, "1")
    assert text == SCENE


def example_workflow(name: str, **sources: str) -> dict[str, dict[str, Any]]:
    """An example as the editor sends it to be run, with our nodes alone.

    Args:
        sources: what stands for the pictures that come from a node of ComfyUI's own.
    """
    folder = EXAMPLES.parent / "comfyui_nodes" / "example_workflows"
    drawn = json.loads((folder / f"{name}.json").read_text("utf-8"))
    kinds = {each["id"]: each["type"] for each in drawn["nodes"]}
    links = {link[0]: (str(link[1]), link[2]) for link in drawn["links"]}
    made: dict[str, dict[str, Any]] = {}
    for each in drawn["nodes"]:
        node = NODES.get(each["type"])
        if node is None:
            continue
        values = [value for value in each["widgets_values"] if value != "randomize"]
        inputs = dict(zip((widget.id for widget in node.widgets), values, strict=True))
        for socket in each["inputs"]:
            if socket["link"] is not None:
                origin, slot = links[socket["link"]]
                own = kinds[int(origin)] in NODES
                inputs[socket["name"]] = [origin, slot] if own else [sources[socket["name"]]]
        made[str(each["id"])] = {"class_type": each["type"], "inputs": inputs}
    return made


def run_example(graph: Graph, name: str, kind: str, **said: Any) -> tuple[Any, ...]:
    """The outputs of the node of this kind, with the bundled model and little randomness."""
    example = example_workflow(name, images=said.pop("images", "scene"))
    for node in example.values():
        if node["class_type"] != "QwencliEngine":
            node["inputs"] |= BASE
    (number,) = [n for n, node in example.items() if node["class_type"] == kind]
    example[number]["inputs"] |= said
    return graph.run(example, number)


def test_the_examples_of_captions(graph: Graph, management: Management) -> None:
    text, _, _ = run_example(graph, "1-caption-a-picture", "QwencliCaption")
    assert text == SCENE
    _, texts, statistics = run_example(graph, "2-caption-a-batch", "QwencliCaption", images="batch")
    assert len(texts) == 3 and statistics.startswith("3 answers, ")


def test_the_example_of_a_folder(graph: Graph, management: Management, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "scene.png", tmp_path)
    (tmp_path / "broken.png").write_text("no picture")
    summary, captioned, failed, _ = run_example(
        graph, "4-caption-a-folder", "QwencliCaptionFolder", path=str(tmp_path)
    )
    assert (captioned, failed) == (1, 1) and "broken.png is not a picture" in summary
    assert (tmp_path / "scene.txt").read_text("utf-8").strip() == SCENE


def test_the_example_of_boxes_and_json(graph: Graph, management: Management) -> None:
    drawn, boxes, mask, _ = run_example(graph, "5-boxes-and-json", "QwencliBoxes")
    assert drawn.shape == graph.sources["scene"].shape and mask.shape == drawn.shape[:3]
    assert [type(json.loads(each)) for each in boxes] == [list]
    # The default schema has bounds: a model that knows no JSON comes to an end of it too.
    one, _, _ = run_example(
        graph, "5-boxes-and-json", "QwencliStructuredCaption", max_new_tokens=256
    )
    assert set(json.loads(one)) == {"subject", "colours"}


def test_the_example_of_a_chat(graph: Graph, management: Management) -> None:
    text, texts, statistics = run_example(graph, "6-write-a-prompt", "QwencliChat")
    assert text and texts == [text] and "0 of images" in statistics


def test_example_workflows_have_a_value_for_each_widget() -> None:
    for path in (EXAMPLES.parent / "comfyui_nodes" / "example_workflows").glob("*.json"):
        for each in json.loads(path.read_text("utf-8"))["nodes"]:
            if (node := NODES.get(each["type"])) is not None:
                has_seed = any(widget.id == "seed" for widget in node.widgets)
                assert len(each["widgets_values"]) == len(node.widgets) + has_seed, path


def test_a_batch_of_pictures(graph: Graph, management: Management) -> None:
    text, texts, statistics = graph.one("QwencliCaption", images=["batch"], **BASE)
    assert len(texts) == 3 and texts[0] == texts[2] == SCENE != texts[1]
    assert text.splitlines() == texts
    assert statistics.startswith("3 answers, ")
    assert ProgressBar.shown == [(1, 3), (2, 3), (3, 3)]


def test_text_only(graph: Graph, management: Management) -> None:
    text, texts, statistics = graph.one("QwencliChat", prompt="Say something.", **BASE)
    assert text and texts == [text] and "0 of images" in statistics


def test_outputs_of_one_node_go_into_another(graph: Graph, management: Management) -> None:
    linked = {
        "engine": {"class_type": "QwencliEngine", "inputs": {"device": "auto"}},
        "caption": {
            "class_type": "QwencliCaption",
            "inputs": {"images": ["scene"], "engine": ["engine", 0], **BASE},
        },
        "chat": {
            "class_type": "QwencliChat",
            "inputs": {"prompt": ["caption", 0], "engine": ["engine", 0], **BASE},
        },
    }
    assert graph.run(linked, "chat")[0]


def test_a_schema_is_kept_to(graph: Graph, management: Management) -> None:
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["n"],
            "additionalProperties": False,
        }
    )
    one, all_of_them, _ = graph.one(
        "QwencliStructuredCaption", images=["scene"], schema=schema, **BASE
    )
    assert 0 <= json.loads(one)["n"] <= 9 and all_of_them == [one]


def test_interrupted_between_two_steps(graph: Graph, management: Management) -> None:
    """A schema forces a long answer; the engine is as good as new afterwards."""
    schema = '{"type": "array", "items": {"type": "integer"}, "minItems": 400}'
    management.interrupt_at = 12
    with pytest.raises(InterruptProcessingException):
        graph.one(
            "QwencliStructuredCaption",
            images=["scene"],
            schema=schema,
            **(BASE | {"max_new_tokens": 2000}),
        )
    assert management.polls == 12
    assert graph.one("QwencliCaption", images=["scene"], **BASE)[0] == SCENE


def test_no_step_runs_after_an_interrupt(
    graph: Graph, management: Management, engine_that: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_that(lambda request: "never")
    monkeypatch.setattr(engine, "effective", _on_gpu())
    management.interrupt_at = 3  # the executor's own poll, then two of ours
    with pytest.raises(InterruptProcessingException):
        graph.one("QwencliCaption", images=["batch"], **BASE)
    assert engine.answered <= 2 and not engine.has_unfinished


def _on_gpu() -> Any:
    from dataclasses import replace

    from tests.dataset.fake_engine import RAN

    return replace(RAN, device="cuda:0")


def test_batches_run_together_on_a_gpu(
    graph: Graph, management: Management, engine_that: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_that(lambda request: "x")
    monkeypatch.setattr(engine, "effective", _on_gpu())
    graph.one("QwencliCaption", images=["batch"], **BASE)
    assert engine.most_held == 3


@pytest.mark.parametrize("source", ["scene", "batch"])
def test_out_of_memory_asks_comfyui_once(
    graph: Graph, management: Management, engine_that: Any, source: str
) -> None:
    def answer(request: GenerationRequest) -> str:
        if not management.unloaded:
            raise OutOfMemoryError("out of memory on cuda:0", "lower --max-pixels")
        return "fits now"

    engine_that(answer)
    assert set(graph.one("QwencliCaption", images=[source], **BASE)[1]) == {"fits now"}
    assert management.unloaded == 1


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("QwencliCaption", {"images": ["scene"]}),
        ("QwencliCaption", {"images": ["batch"]}),
        ("QwencliStructuredCaption", {"images": ["scene"]}),
        ("QwencliBoxes", {"images": ["batch"]}),
        ("QwencliChat", {"prompt": "x"}),
    ],
)
def test_out_of_memory_for_good_is_one_line(
    graph: Graph, management: Management, engine_that: Any, node: str, inputs: dict[str, Any]
) -> None:
    def answer(request: GenerationRequest) -> str:
        raise OutOfMemoryError("out of memory on cuda:0", "lower --max-pixels")

    engine_that(answer)
    with pytest.raises(NodeError, match=r"^out of memory on cuda:0; lower max_pixels$"):
        graph.one(node, **inputs, **BASE)
    assert management.unloaded == 1


SAID = '[{"bbox_2d": [250, 0, 500, 500], "label": "cup"}]'


def test_boxes_are_drawn_told_and_masked(
    graph: Graph, management: Management, engine_that: Any
) -> None:
    engine_that(lambda request: SAID)
    drawn, boxes, mask, _ = graph.one("QwencliBoxes", images=["batch"], **BASE)
    assert drawn.shape == (3, 288, 288, 3) and mask.shape == (3, 288, 288)
    assert drawn.dtype is mask.dtype is torch.float32 and 0 <= drawn.min() <= drawn.max() <= 1
    assert [json.loads(each) for each in boxes] == [
        [{"bbox_2d": [72, 0, 144, 144], "label": "cup"}]
    ] * 3
    assert mask[0].sum() == 72 * 144 and mask[0, 0, 72] == 1 and mask[0, 0, 71] == 0
    assert not torch.equal(drawn, graph.sources["batch"])


def test_what_a_request_shows(graph: Graph, management: Management, engine_that: Any) -> None:
    shown: list[tuple[Any, ...]] = []

    def answer(request: GenerationRequest) -> str:
        shown.append(tuple(p for p in request.messages[-1].parts if not isinstance(p, TextPart)))
        return "x"

    engine_that(answer)
    graph.one("QwencliCaption", images=["batch"], image_2=["other"], **BASE)
    assert [len(each) for each in shown] == [2, 2, 2]
    names = [[part.name for part in each] for each in shown]
    assert names[1] == ["image_2", "picture 2 of images"]
    shown.clear()
    graph.one("QwencliCaption", images=["batch"], batch_mode="all in one request", **BASE)
    assert [len(each) for each in shown] == [3] and isinstance(shown[0][0], ImagePart)
    shown.clear()
    video = {"batch_mode": "frames of one video", "fps": 1.0, "frames": 2}
    graph.one("QwencliCaption", images=["batch"], **video, **BASE)
    ((seen,),) = shown
    assert isinstance(seen, VideoPart) and seen.times_s == (0.0, 2.0) and seen.duration_s == 3.0


def test_what_is_not_said_is_left_to_the_model(
    graph: Graph, management: Management, engine_that: Any
) -> None:
    asked: list[GenerationRequest] = []

    def answer(request: GenerationRequest) -> str:
        asked.append(request)
        return "x"

    engine_that(answer)
    graph.one("QwencliChat", prompt="x", system="Be short.", think=True, model="scenes")
    graph.one("QwencliChat", prompt="x", model="scenes", do_sample=False, top_p=0.5, seed=7)
    plain, said = (each.sampling for each in asked)
    assert plain.temperature is plain.top_p is plain.top_k is plain.do_sample is None
    assert asked[0].thinking and asked[0].messages[0].role == "system"
    assert (said.do_sample, said.top_p, said.seed) == (False, 0.5, 7)


def test_a_folder(graph: Graph, management: Management, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "scene.png", tmp_path)
    (tmp_path / "broken.png").write_text("x")
    inputs = {"path": str(tmp_path), "prefix": "trig,", **BASE}
    summary, captioned, failed, statistics = graph.one("QwencliCaptionFolder", **inputs)
    assert (captioned, failed) == (1, 1) and "broken.png is not a picture" in summary
    assert (tmp_path / "scene.txt").read_text().strip() == f"trig, {SCENE}"
    assert "captions/s" in statistics and ProgressBar.shown[-1] == (2, 2)
    summary, captioned, failed, _ = graph.one("QwencliCaptionFolder", **inputs)
    assert (captioned, failed) == (0, 0) and "1 had a caption already" in summary


def test_a_folder_that_is_interrupted_keeps_what_is_done(
    graph: Graph, management: Management, engine_that: Any, tmp_path: Path
) -> None:
    for number in range(6):
        shutil.copy(EXAMPLES / "scene.png", tmp_path / f"{number}.png")

    def answer(request: GenerationRequest) -> str:
        if engine.answered == 3:
            management.interrupt_at = 0
        return "A red circle on the left."

    engine = engine_that(answer)
    with pytest.raises(InterruptProcessingException):
        graph.one("QwencliCaptionFolder", path=str(tmp_path), **BASE)
    done = len(list(tmp_path.glob("*.txt")))
    assert 0 < done < 6
    assert graph.one("QwencliCaptionFolder", path=str(tmp_path), **BASE)[1] == 6 - done


NAN = torch.full((2, 32, 32, 3), 0.5)
NAN[1, 3, 3, 1] = float("nan")


@pytest.mark.parametrize(
    ("node", "inputs", "line"),
    [
        ("QwencliCaption", {}, "^no picture is connected; connect images"),
        ("QwencliCaption", {"images": ["scene"], "preset": "none"}, "^prompt is empty and preset"),
        ("QwencliChat", {}, "^prompt is empty; write what to ask$"),
        ("QwencliCaption", {"images": torch.zeros(0, 8, 8, 3)}, "^images is empty: its shape is"),
        ("QwencliCaption", {"images": NAN}, r"^picture 2 of images has pixels that are no numbers"),
        ("QwencliBoxes", {"images": NAN}, r"^picture 2 of images has pixels that are no numbers"),
        ("QwencliCaption", {"image_3": torch.zeros(1, 8, 8, 5)}, "^image_3 has 5 channels"),
        ("QwencliCaption", {"images": torch.zeros(8, 8)}, "^images is no batch of pictures"),
        ("QwencliCaption", {"images": ["scene"], "custom_model": "/no/where"}, "^no folder '/no/"),
        ("QwencliStructuredCaption", {"images": ["scene"], "schema": "{"}, "^schema is not JSON"),
        ("QwencliCaptionFolder", {}, "^path is empty; give the folder"),
        ("QwencliCaptionFolder", {"path": "/no/where"}, "/no/where"),
        ("QwencliCaptionFolder", {"path": str(EXAMPLES), "output": "\0"}, "^output has a null"),
        ("QwencliEngine", {"runs": "remote"}, "^endpoint is empty; give the server"),
        ("QwencliChat", {"prompt": "x", "think": True}, "^scenes cannot think before it answers"),
        ("QwencliBoxes", {"images": ["scene"], "thinking_budget": 9}, "^scenes cannot think"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    graph: Graph, management: Management, engine_that: Any, node: str, inputs: Any, line: str
) -> None:
    engine_that(lambda request: "x").can_think = False
    known = {each.id for each in graph.classes[node].GET_SCHEMA().inputs}
    inputs = {name: value for name, value in (BASE | inputs).items() if name in known}
    with pytest.raises(NodeError, match=line) as found:
        graph.one(node, **inputs)
    assert "\n" not in str(found.value) and "--" not in str(found.value)


PICTURE, FOLDER = {"images": ["scene"]}, {"path": str(EXAMPLES)}
THOUGHTS = {"thinking_budget": 9}


@pytest.mark.parametrize(
    ("node", "family", "inputs", "line"),
    [
        ("QwencliCaption", "qwen3", PICTURE, "qwen3 reads text only"),
        ("QwencliChat", "qwen3", {"prompt": "x", **PICTURE}, "qwen3 reads text only"),
        ("QwencliCaptionFolder", "qwen3", FOLDER, "qwen3 reads text only"),
        ("QwencliStructuredCaption", "qwen3", {**PICTURE, "schema": "{}"}, "qwen3 reads text"),
        ("QwencliBoxes", "qwen3", PICTURE, "qwen3 reads text only"),
        ("QwencliCaption", "qwen3_vl", {**PICTURE, "think": True}, "qwen3_vl cannot think"),
        ("QwencliChat", "qwen3", {"prompt": "x", **THOUGHTS}, "qwen3 cannot think"),
        ("QwencliCaptionFolder", "qwen3_vl", FOLDER | THOUGHTS, "qwen3_vl cannot think"),
        ("QwencliBoxes", "qwen3_vl", PICTURE | THOUGHTS, "qwen3_vl cannot think"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_it_is_loaded(
    graph: Graph, management: Management, checkpoint: Any, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, node: str, family: str, inputs: Any, line: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "qwencli.engine.base_engine.BaseEngine.load", lambda _: pytest.fail("weights are read")
    )
    folder = tmp_path / family
    folder.symlink_to(checkpoint(family))
    named = BASE | {"custom_model": str(folder)} | inputs
    known = {each.id for each in graph.classes[node].GET_SCHEMA().inputs}
    if node == "QwencliCaptionFolder":
        named["output"] = str(tmp_path / "out.jsonl")
    with pytest.raises(NodeError, match=line) as found:
        graph.one(node, **{name: value for name, value in named.items() if name in known})
    assert "\n" not in str(found.value)


def test_a_wrong_model_is_refused_before_anything_runs(
    graph: Graph, management: Management
) -> None:
    with pytest.raises(RefusedGraph, match="no model is called 'qwen3-vl-4x'; did you mean"):
        graph.one("QwencliChat", prompt="x", model="qwen3-vl-4x")


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({"keep_loaded": "x"}, "^keep_loaded 'x' is not a time"),
        ({"thinking_budget": 48}, "^thinking_budget 48 leaves nothing of max_new_tokens 48"),
        ({"thinking_budget": 9000}, "^thinking_budget 9000 is out of range"),
        ({"max_new_tokens": 0}, "^max_new_tokens 0 is out of range"),
        ({"max_new_tokens": "48"}, "^max_new_tokens is '48', not a whole number"),
        ({"custom_model": 3}, "^custom_model is 3, not text"),
    ],
)
def test_widgets_that_cannot_be_are_refused_before_anything_runs(
    graph: Graph, management: Management, inputs: Any, line: str
) -> None:
    with pytest.raises(RefusedGraph, match=line):
        graph.one("QwencliChat", prompt="x", **(BASE | inputs))


def test_widgets_may_come_over_links(
    graph: Graph, management: Management, engine_that: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked before a graph runs is not known then; it is checked when it is."""
    engine_that(lambda request: "x")
    linked = {"custom_model": "", "model": "scenes", "keep_loaded": "5m", "thinking_budget": 9,
              "max_new_tokens": 48}  # fmt: skip
    monkeypatch.setattr(graph, "sources", {**graph.sources, **linked, "wrong": 0.5, "far": 9000})
    assert graph.one("QwencliChat", prompt="x", **{name: [name] for name in linked})[0] == "x"
    with pytest.raises(NodeError, match=r"^thinking_budget 9000 is out of range"):
        graph.one("QwencliChat", prompt="x", model="scenes", thinking_budget=["far"])
    for name in ("max_new_tokens", "prompt", "preset", "do_sample", "seed"):
        with pytest.raises(NodeError, match=f"^{name} is 0.5, not"):
            graph.one("QwencliCaption", **(BASE | {"images": ["scene"], name: ["wrong"]}))
    with pytest.raises(NodeError, match=r"^engine is 0.5, no engine; connect the output of a Qwen"):
        graph.one("QwencliChat", prompt="x", engine=["wrong"], **BASE)
    with pytest.raises(NodeError, match=r"^video is no video; connect a VIDEO"):
        graph.one("QwencliCaption", video=["wrong"], **BASE)


def test_a_seed_of_64_bits_may_come_over_a_link(
    graph: Graph, management: Management, engine_that: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nodes for seeds give it; the same one gives the same answer."""
    asked: list[Any] = []

    def answer(request: GenerationRequest) -> str:
        asked.append(request.sampling.seed)
        return "x"

    engine_that(answer)
    monkeypatch.setattr(graph, "sources", {"seed": 2**64 - 2, "random": -1})
    for name in ("seed", "seed", "random"):
        graph.one("QwencliChat", prompt="x", seed=[name], **BASE)
    assert asked == [2**32 - 2, 2**32 - 2, -1]


def test_thoughts_are_asked_for_as_on_the_command_line(
    graph: Graph, management: Management, engine_that: Any
) -> None:
    asked: list[GenerationRequest] = []

    def answer(request: GenerationRequest) -> str:
        asked.append(request)
        return "[]"

    engine_that(answer)
    for said in ({"think": True}, {"thinking_budget": 9}, {"think": True, "thinking_budget": 0}):
        graph.one("QwencliChat", prompt="x", **BASE, **said)
    graph.one("QwencliStructuredCaption", images=["scene"], schema='{"type": "array"}',
              thinking_budget=9, **BASE)  # fmt: skip
    heard = [(each.thinking, each.thinking_budget) for each in asked]
    assert heard == [(True, None), (True, 9), (False, 0), (True, 9)]


# What a preview shows without breaking a line; titles of modes are the longest.
WIDTH = 110


def test_statistics_are_short_lines_whatever_ran(
    graph: Graph, management: Management, engine_that: Any, tmp_path: Path
) -> None:
    engine_that(lambda request: "A circle.")
    said = [graph.one("QwencliCaption", images=[each], **BASE)[2] for each in ("scene", "batch")]
    shutil.copy(EXAMPLES / "scene.png", tmp_path)
    folder = {"path": str(tmp_path), **BASE}
    said += [graph.one("QwencliCaptionFolder", **folder)[3] for _ in range(2)]
    for each in said:
        assert each and all(0 < len(line) <= WIDTH for line in each.splitlines())
    one, batch, made, nothing = said
    assert one.startswith("scenes: ") and " on cpu" in one
    assert [line.partition(":")[0] for line in batch.splitlines()[1:4]] == ["1", "2", "3"]
    assert "captions/s" in made and "no caption was made" in nothing


def test_a_batch_of_many_is_not_told_line_by_line(
    graph: Graph, management: Management, engine_that: Any
) -> None:
    engine_that(lambda request: "x")
    pictures = torch.zeros(60, 32, 32, 3)
    said = graph.one("QwencliCaption", images=pictures, **BASE)[2].splitlines()
    assert "and 40 more" in said and len(said) < 32


def test_a_node_that_runs_alone_says_what_it_did(
    graph: Graph, management: Management, engine_that: Any, tmp_path: Path
) -> None:
    engine_that(lambda request: "A circle.")
    shutil.copy(EXAMPLES / "scene.png", tmp_path)
    found = graph.classes["QwencliCaptionFolder"].execute(path=str(tmp_path), **BASE)
    assert found.ui == {"text": (found.args[0],)} and "1 captioned" in found.args[0]


def test_a_server_runs_its_own_modes(graph: Graph, management: Management) -> None:
    linked = {
        "engine": {
            "class_type": "QwencliEngine",
            "inputs": {"runs": "remote", "endpoint": "http://127.0.0.1:9/v1"},
        },
        "chat": {
            "class_type": "QwencliChat",
            "inputs": {
                "prompt": "x",
                "engine": ["engine", 0],
                "quantization": "4bit",
                "custom_model": "theirs",
            },
        },
    }
    with pytest.raises(NodeError, match=r"quantization|4bit"):
        graph.run(linked, "chat")


def test_when_a_node_runs_again(graph: Graph) -> None:
    changes = graph.classes["QwencliChat"].fingerprint_inputs
    assert changes(seed=3, temperature=0.7) == changes(seed=3, temperature=0.7)
    assert changes(seed=-1) != changes(seed=-1)
    assert changes(seed=-1, do_sample=False) == changes(seed=-1, do_sample=False)
    assert changes(seed=-1, do_sample=None) != changes(seed=-1, do_sample=None)  # of a link
    folder = graph.classes["QwencliCaptionFolder"].fingerprint_inputs
    assert folder(seed=3) != folder(seed=3)
