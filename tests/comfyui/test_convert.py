"""Saved graphs of other packs become graphs of ours; nothing else in them changes."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.comfyui import editor_graph, old_nodes
from qwencli.comfyui.convert import convert, read_workflow
from qwencli.comfyui.old_nodes import NO_EQUAL, OLD_NODES, SAME
from qwencli.comfyui.schemas import NODES, BatchMode
from qwencli.errors import InputError, QwenCliError
from qwencli.messages import PRESETS


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """The custom_models.json of this repository has names of the packs, too."""
    with contextlib.chdir(tmp_path_factory.mktemp("empty")):
        yield


LAB = ["Qwen3-VL-8B-Instruct", "4-bit (VRAM-friendly)", "auto", "🖼️ Tags", "", 300, True, 7, "fixed"]
ORIGIN = [
    "Be brief.", "What is it?", "Qwen3-VL-4B-Instruct", "8bit", "flash_attention_2", False, False,
    True, 0.5, 0.8, 40, 0.1, 1.1, 200, 42, "increment",
]  # fmt: skip


def node(kind, values, inputs=(), number=5, links=(8,)):
    return {
        "id": number,
        "type": kind,
        "pos": [10, 20],
        "size": [300, 200],
        "flags": {"collapsed": True},
        "order": 3,
        "mode": 4,
        "inputs": [dict(each) for each in inputs],
        "outputs": [{"name": "RESPONSE", "type": "STRING", "links": list(links)}],
        "properties": {"Node name for S&R": kind, "cnr_id": "old", "ver": "1.0", "mine": 1},
        "widgets_values": values,
        "color": "#123",
        "title": "my own",
    }


def socket(name, link=None, kind="IMAGE", **more):
    return {"name": name, "type": kind, "link": link, **more}


def widget(name, link=None, kind="STRING"):
    return socket(name, link, kind, widget={"name": name})


def graph(*nodes, links=()):
    """A graph of version 0.4: a LoadImage (1) and a show node (2) around the nodes given."""
    load = {"id": 1, "type": "LoadImage", "widgets_values": ["a.png"], "inputs": []}
    load["outputs"] = [{"name": "IMAGE", "type": "IMAGE", "links": [one[0] for one in links]}]
    show = {"id": 2, "type": "PreviewAny", "inputs": [socket("source", 8)], "outputs": []}
    all_links = [*([*one] for one in links), [8, 5, 0, 2, 0, "STRING"]]
    return {"nodes": [load, *nodes, show], "links": all_links, "version": 0.4, "extra": {"a": 1}}


def made(document, number=5):
    done = convert(document, "w.json")
    found = next(each for each in done.document["nodes"] if each["id"] == number)
    names = []
    for each in NODES[found["type"]].widgets:
        names += [each.id] + (["after"] if each.id == "seed" else [])
    assert len(found["widgets_values"]) == len(names)
    return done, found, dict(zip(names, found["widgets_values"], strict=True))


# The table


@pytest.mark.parametrize("name", OLD_NODES)
def test_every_name_of_ours_is_an_input_of_the_node(name):
    old = OLD_NODES[name]
    ids = {each.id for each in old.node.inputs}
    assert NODES[old.node.id] is old.node
    assert set(old.settings) <= ids
    assert {place for place in old.names.values() if place} <= ids
    places = {"images", "image_1", "image_2", "image_3", "image_4", "video"}
    assert places | {"model", "custom_model", "quantization", "attention", "keep_loaded"} <= ids
    assert old.node.outputs[0].id == "text"
    for layout in old.layouts:
        assert len(set(layout)) == len(layout)
        for each in layout:
            if old.names.get(each):
                continue
            # A value, a translation, or a reason why there is none.
            place = SAME.get(each)
            assert {place, old_nodes.TRANSLATED.get(each)} & ids or each in NO_EQUAL, each


def test_every_layout_of_a_node_differs_from_the_others():
    for name, old in OLD_NODES.items():
        assert len(set(old.layouts)) == len(old.layouts), name


def test_the_page_names_every_node():
    page = (Path(__file__).parents[2] / "docs" / "comfyui.md").read_text("utf-8")
    assert [name for name in OLD_NODES if f"`{name}`" not in page] == []
    assert [each.display_name for each in NODES.values() if each.display_name not in page] == []


def test_presets_and_their_words_are_there():
    for preset, prompt in old_nodes.OLD_PRESETS.values():
        assert (preset in PRESETS) != bool(prompt)


@pytest.mark.parametrize("name", OLD_NODES)
def test_every_layout_is_told_by_its_values(name):
    samples = {"quantization": "none", "attention_mode": "sdpa", "attention": "eager",
               "attention_type": "sdpa", "model": "Qwen3-VL-2B-Instruct"}  # fmt: skip
    for layout in OLD_NODES[name].layouts:
        values = []
        for each in layout:
            if each in old_nodes.SWITCHES:
                # Which of the switches at the end it is cannot be told.
                values.append(each in ("keep_model_loaded", "do_sample"))
            elif each in old_nodes.NUMBERS:
                values.append(1)
            else:
                values.append(samples.get(each, f"words of {each}"))
            if each == "seed":
                values.append("randomize")
        done, written, new = made(graph(node(name, values)))
        prompts = {"text", "prompt", "user_prompt", "text_prompt", "custom_prompt", "prompt_text"}
        (prompt,) = prompts & set(layout)
        assert new["prompt"] == f"words of {prompt}"
        assert new["after"] == ("randomize" if "seed" in layout else "fixed")
        assert new["custom_model"] == ("" if "model" in layout else "words of model_name")
        assert len(done.converted) == 1
        # The API's format has the same values by name, and becomes the same.
        inputs = dict(zip(layout, _without_mode(values), strict=True))
        api = convert({"5": {"class_type": name, "inputs": inputs}}, "w.json").document["5"]
        assert api == {
            "class_type": written["type"],
            "inputs": {each: value for each, value in new.items() if each != "after"},
        }


def _without_mode(values):
    return [value for value in values if value != "randomize"]


# The editor's format


def test_a_node_keeps_its_place_and_its_links():
    given = graph(
        node("AILab_QwenVL", LAB, [socket("image", 3), socket("video")]),
        links=[(3, 1, 0, 5, 0, "IMAGE")],
    )
    before = copy.deepcopy(given)
    done, new, values = made(given)
    assert given == before
    old = before["nodes"][1]
    kept = ("id", "pos", "size", "flags", "order", "mode", "color", "title")
    assert {name: new[name] for name in kept} == {name: old[name] for name in kept}
    assert new["properties"] == {"Node name for S&R": "QwencliCaption", "mine": 1}
    assert new["inputs"][0] == {"name": "images", "type": "IMAGE", "link": 3, "shape": 7}
    assert {each["link"] for each in new["inputs"][1:]} == {None}
    names = [each["widget"]["name"] for each in new["inputs"] if "widget" in each]
    assert names == [each.id for each in NODES["QwencliCaption"].widgets]
    assert new["outputs"][0]["links"] == [8] and new["outputs"][0]["name"] == "text"
    assert done.document["links"] == before["links"]
    assert [each for each in done.document["nodes"] if each["id"] != 5] == [
        before["nodes"][0],
        before["nodes"][2],
    ]
    assert done.notes == []
    expected = {"preset": "tags", "prompt": "", "model": "qwen3-vl-8b", "quantization": "4bit"}
    assert values | expected == values
    # What its code always did.
    assert (values["temperature"], values["top_p"], values["repetition_penalty"]) == (0.6, 0.9, 1.2)
    assert (values["seed"], values["after"], values["keep_loaded"]) == (7, "fixed", "10m")


def test_the_origin_keeps_all_its_parameters_and_the_order_of_its_pictures():
    sockets = [socket(f"image{n}", n + 2) for n in (1, 3)] + [socket("image2"), socket("image4")]
    done, new, values = made(
        graph(
            node("QwenVL", [*ORIGIN, "/videos/a.mp4"], sockets),
            links=[(3, 1, 0, 5, 0, "IMAGE"), (5, 1, 0, 5, 2, "IMAGE")],
        )
    )
    fields = ("system", "prompt", "model", "quantization", "attention", "keep_loaded", "do_sample",
              "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens",
              "seed", "after")  # fmt: skip
    assert tuple(values[name] for name in fields) == (
        "Be brief.", "What is it?", "qwen3-vl-4b", "8bit", "flash_attention_2", "0", True,
        0.5, 0.8, 40, 0.1, 1.1, 200, 42, "increment",
    )  # fmt: skip
    assert {each["name"]: each["link"] for each in new["inputs"] if each["link"]} == {
        "image_1": 3,
        "image_2": 5,
    }
    assert [link[4] for link in done.document["links"]] == [1, 2, 0]
    (note,) = done.notes
    assert note.startswith(
        "node 5 (QwenVL): video_path '/videos/a.mp4' has no equal: load the file"
    )


def test_a_video_as_frames_leaves_the_pictures_their_place():
    sockets = [socket("image", 3), socket("video", 4)]
    links = [(3, 1, 0, 5, 0, "IMAGE"), (4, 1, 0, 5, 1, "IMAGE")]
    done, new, values = made(graph(node("AILab_QwenVL", LAB, sockets), links=links))
    assert [(each["name"], each["link"]) for each in new["inputs"][:2]] == [
        ("images", 4),
        ("image_1", 3),
    ]
    assert values["batch_mode"] == BatchMode.VIDEO.value
    assert [link[:5] for link in done.document["links"][:2]] == [[3, 1, 0, 5, 1], [4, 1, 0, 5, 0]]


def test_a_link_into_a_widget_stays_where_it_means_the_same():
    inputs = [socket("image"), widget("custom_prompt", 3), widget("seed", 4, "INT"),
              widget("model_name", 6, "COMBO")]  # fmt: skip
    links = [(3, 1, 0, 5, 1, "STRING"), (4, 1, 0, 5, 2, "INT"), (6, 1, 0, 5, 3, "COMBO")]
    given = graph(node("AILab_QwenVL", LAB, inputs), links=links)
    given["extra"]["linkExtensions"] = [{"id": 6, "parentId": 1}, {"id": 4, "parentId": 2}]
    given["extra"]["reroutes"] = [{"id": 1, "pos": [0, 0], "linkIds": [6, 4]}]
    done, new, _ = made(given)
    assert [each for each in new["inputs"] if each["link"]] == [
        {"name": "prompt", "type": "STRING", "link": 3, "widget": {"name": "prompt"}},
        {"name": "seed", "type": "INT", "link": 4, "widget": {"name": "seed"}},
    ]
    places = [each["name"] for each in new["inputs"]]
    assert [link[:5] for link in done.document["links"]] == [
        [3, 1, 0, 5, places.index("prompt")],
        [4, 1, 0, 5, places.index("seed")],
        [8, 5, 0, 2, 0],
    ]
    assert done.document["nodes"][0]["outputs"][0]["links"] == [3, 4]
    assert done.document["extra"]["linkExtensions"] == [{"id": 4, "parentId": 2}]
    assert done.document["extra"]["reroutes"][0]["linkIds"] == [4]
    assert done.notes == [
        "node 5 (AILab_QwenVL): model_name came from another node and has no equal: choose it in "
        "the node"
    ]


def test_names_that_the_editor_wrote_win_over_the_table():
    names = ("model_name", "quantization", "preset_prompt", "custom_prompt", "max_tokens",
             "keep_model_loaded", "seed", "new_thing")  # fmt: skip
    values = ["Qwen2.5-VL-7B-Instruct", "None (FP16)", "📖 Short Story", "Say yes.", 99, False, 3,
              "randomize", "x"]  # fmt: skip
    done, _, new = made(graph(node("AILab_QwenVL", values, [widget(name) for name in names])))
    assert (new["prompt"], new["max_new_tokens"], new["after"]) == ("Say yes.", 99, "randomize")
    assert "new_thing 'x' has no equal: it is unknown" in done.notes[-1]
    by_name = dict(zip(names, values[:7] + values[8:], strict=True))
    _, _, same = made(graph(node("AILab_QwenVL", by_name)))
    assert same | {"after": "randomize"} == new
    # The newest editors write both.
    newest = node("AILab_QwenVL", ["not read"])
    newest["widgets_values_named"] = {**by_name, "control_after_generate": "randomize"}
    _, written, same = made(graph(newest))
    assert same == new
    assert written["widgets_values_named"] == {
        "control_after_generate" if name == "after" else name: value for name, value in new.items()
    }


def test_version_1_0_and_subgraphs_have_links_with_names():
    inner = {
        "id": "5f5c", "name": "Captions", "inputs": [{"name": "model_name", "linkIds": [6]}],
        "nodes": [node("AILab_QwenVL", LAB, [socket("image", 3), widget("model_name", 6, "COMBO")],
                       number=5)],
        "links": [
            {"id": 3, "origin_id": -10, "origin_slot": 1, "target_id": 5, "target_slot": 0},
            {"id": 6, "origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 1},
            {"id": 8, "origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
    }  # fmt: skip
    holder = {
        "id": 9,
        "type": "5f5c",
        "properties": {"proxyWidgets": [["5", "max_tokens"], ["5", "quantization"], ["7", "x"]]},
        "widgets_values": [300, "8-bit (Balanced)", 1],
    }
    document = {
        "version": 1,
        "nodes": [holder],
        "links": [],
        "definitions": {"subgraphs": [inner]},
    }
    done = convert(document, "w.json")
    subgraph = done.document["definitions"]["subgraphs"][0]
    assert subgraph["nodes"][0]["type"] == "QwencliCaption"
    assert [link["id"] for link in subgraph["links"]] == [3, 8]
    assert subgraph["inputs"][0]["linkIds"] == []
    new = done.document["nodes"][0]
    assert new["properties"]["proxyWidgets"] == [["5", "max_new_tokens"], ["7", "x"]]
    assert new["widgets_values"] == [300, 1]
    assert done.converted == ["node 5 of subgraph 'Captions' (AILab_QwenVL) is Qwen Caption now"]
    assert len(done.notes) == 2


def test_a_promoted_widget_without_a_value_of_its_own_follows_a_translated_one():
    inner = {"id": "5f5c", "nodes": [node("AILab_QwenVL", LAB)], "links": []}
    promoted = [["5", "model_name"], ["5", "preset_prompt"], ["5", "num_beams"]]
    holder = {"id": 9, "type": "5f5c", "properties": {"proxyWidgets": promoted}}
    document = {"nodes": [holder], "definitions": {"subgraphs": [inner]}}
    done = convert(document, "w.json")
    new = done.document["nodes"][0]["properties"]["proxyWidgets"]
    assert new == [["5", "model"], ["5", "preset"]]
    assert ["num_beams" in note for note in done.notes] == [True]


def test_values_that_fit_no_version_leave_a_node_alone():
    foreign = graph(node("QwenVL", ["a", 1, {"b": 2}]))
    with pytest.raises(InputError, match="fit no version that is known"):
        convert(foreign, "w.json")
    text = ["", "Hi", "Qwen3-4B", "none", True, False, 0.7, 64, -1, "fixed"]
    namesakes = node("QwenVL", []) | {"widgets_values_named": {"api_key": "x", "url": "y"}}
    for document in (
        graph(namesakes),
        {"5": {"class_type": "Qwen", "inputs": {"api_key": "x", "url": "y", "prompt": "z"}}},
    ):
        with pytest.raises(InputError, match="fit no version that is known"):
            convert(document, "w.json")
    both = graph(node("QwenVL", [1, 2, 3]), node("Qwen", text, number=6))
    done = convert(both, "w.json")
    assert done.document["nodes"][1] == both["nodes"][1]
    assert len(done.converted) == len(done.notes) == 1


def test_values_that_the_editor_keeps_for_buttons_are_none_of_the_nodes():
    """As in a published workflow of this pack: a null behind the last value."""
    said = ["Qwen2.5-VL-7B-Instruct", "None", "What is it?", 1216, 0.5, 0.9, 1, True]
    for more in ([None], [None, None]):
        done = convert(graph(node("QwenVisionParser", said + more)), "w.json")
        plain = convert(graph(node("QwenVisionParser", said)), "w.json")
        assert done.document == plain.document


def test_group_nodes_are_told():
    document = graph()
    document["extra"]["groupNodes"] = {"both": {"nodes": [{"type": "AILab_QwenVL"}]}}
    with pytest.raises(
        InputError, match="group node 'both' holds AILab_QwenVL: turn it into nodes"
    ):
        convert(document, "w.json")


# The API's format


def test_the_api_format_by_names():
    document = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "5": {
            "class_type": "AILab_QwenVL_Advanced",
            "inputs": {
                "model_name": "Qwen3-VL-2B-Instruct", "quantization": "None (FP16)",
                "attention_mode": "sage", "use_torch_compile": True, "device": "cuda:1",
                "preset_prompt": "🎬 Cinematic Description", "custom_prompt": ["4", 0],
                "max_tokens": 90000, "temperature": 0.3, "top_p": 0.9, "num_beams": 4,
                "repetition_penalty": 0.5, "frame_count": 8, "keep_model_loaded": True,
                "seed": 2**40, "image": ["1", 0],
            },
            "_meta": {"title": "mine"},
        },
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}},
    }  # fmt: skip
    done = convert(document, "w.json")
    new = done.document["5"]
    assert (new["class_type"], new["_meta"]) == ("QwencliCaption", {"title": "mine"})
    ids = {each.id for each in NODES["QwencliCaption"].inputs}
    assert set(new["inputs"]) <= ids
    expected = {"images": ["1", 0], "prompt": ["4", 0], "preset": "cinematic", "frames": 8}
    assert new["inputs"] | expected == new["inputs"]
    assert new["inputs"]["repetition_penalty"] == 1
    assert new["inputs"]["max_new_tokens"] == 8192
    assert new["inputs"]["seed"] == 2**40 % 2**32
    assert [done.document[key] for key in "17"] == [document[key] for key in "17"]
    told = " ".join(done.notes)
    for name in ("sage", "use_torch_compile True", "device 'cuda:1'", "num_beams 4", "seed 1099",
                 "max_new_tokens 90000", "repetition_penalty 0.5"):  # fmt: skip
        assert name in told
    assert len(done.notes) == 7


def test_a_request_and_a_pictures_metadata_hold_both_formats():
    api = {"5": {"class_type": "Qwen2.5", "inputs": {"prompt": "Hi"}}}
    saved = {"extra_pnginfo": {"workflow": graph(node("AILab_QwenVL", LAB))}}
    document = {"client_id": "x", "prompt": api, "extra_data": saved}
    done = convert(document, "w.json")
    assert done.document["prompt"]["5"]["class_type"] == "QwencliChat"
    assert done.document["client_id"] == "x"
    assert len(done.converted) == 2


# Values


@pytest.mark.parametrize(
    ("old", "model", "custom", "quantization", "told"),
    [
        ("Qwen3-VL-4B-Instruct", "qwen3-vl-4b", "", "8bit", False),
        ("Qwen/Qwen3-VL-8B-Thinking", "qwen3-vl-8b-thinking", "", "8bit", False),
        ("Qwen3-VL-4B-Instruct-FP8", "auto", "Qwen/Qwen3-VL-4B-Instruct-FP8", "8bit", False),
        ("unsloth/Qwen3.5-4B", "auto", "unsloth/Qwen3.5-4B", "8bit", False),
        ("SkyCaptioner-V1", "auto", "Skywork/SkyCaptioner-V1", "8bit", False),
        ("my own", "auto", "my own", "8bit", True),
        ("Qwen3VL-4B-Instruct-Q4_K_M.gguf", "qwen3-vl-4b", "", "4bit", True),
        ("Qwen3VL-8B-Instruct-Q8_0.gguf", "qwen3-vl-8b", "", "8bit", True),
        ("Qwen3VL-8B-Instruct-F16.gguf", "qwen3-vl-8b", "", "none", True),
        ("Qwen3-4B-abliterated-iq2_m.gguf", "auto", "", "8bit", True),
        ("", "auto", "", "8bit", False),
    ],
)
def test_models(old, model, custom, quantization, told):
    inputs = {"prompt": "Hi", "quantization": "8bit", "model": old}
    done = convert({"5": {"class_type": "Qwen", "inputs": inputs}}, "w.json")
    new = done.document["5"]["inputs"]
    assert (new["model"], new["custom_model"], new["quantization"]) == (model, custom, quantization)
    assert bool(done.notes) == told


def test_a_model_of_custom_models_json_keeps_its_name(tmp_path, monkeypatch):
    (tmp_path / "custom_models.json").write_text('{"hf_models": {"my own": {"repo_id": "a/b"}}}')
    monkeypatch.chdir(tmp_path)
    inputs = {"prompt": "Hi", "model": "my own"}
    done = convert({"5": {"class_type": "Qwen", "inputs": inputs}}, "w.json")
    new = done.document["5"]["inputs"]
    assert (new["model"], new["custom_model"], done.notes) == ("my own", "", [])


@pytest.mark.parametrize(
    ("preset", "custom", "new"),
    [
        ("🖼️ Detailed Description", "", ("detailed", "")),
        ("Prompt Style - Cinematic", "", ("cinematic", "")),
        ("🖼️ Tags", "Only the sky.", ("tags", "Only the sky.")),
        ("Describe this image in detail.", "", ("none", "Describe this image in detail.")),
        ("📹 Video Summary", "", ("none", "Summarize what happens in this video.")),
    ],
)
def test_presets(preset, custom, new):
    inputs = {"preset_prompt": preset, "custom_prompt": custom, "image": ["1", 0]}
    done = convert({"5": {"class_type": "AILab_QwenVL", "inputs": inputs}}, "w.json")
    values = done.document["5"]["inputs"]
    assert (values["preset"], values["prompt"]) == new


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("keep_model_loaded", True, "10m"),
        ("keep_model_loaded", False, "0"),
        ("unload_after_generation", True, "0"),
        ("unload_after_generation", False, "10m"),
    ],
)
def test_a_node_that_unloads_does_not_keep_the_model(name, value, kept):
    kind = "AILab_QwenVL" if name == "keep_model_loaded" else "QwenVisionParser"
    document = {"5": {"class_type": kind, "inputs": {name: value}}}
    assert convert(document, "w.json").document["5"]["inputs"]["keep_loaded"] == kept


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ({"text": "Hi", "image1": ["1", 0]}, "QwencliCaption"),
        ({"text": "Hi"}, "QwencliChat"),
        ({"text": ["1", 0]}, "QwencliChat"),
        ({"text": "Hi", "video_path": "a.mp4"}, "QwencliCaption"),
        ({"text": ""}, "QwencliCaption"),
    ],
)
def test_a_node_that_is_asked_without_a_picture_is_a_chat(inputs, kind):
    given = {"5": {"class_type": "QwenVL", "inputs": {**inputs, "system": "Be brief."}}}
    new = convert(given, "w.json").document["5"]
    assert new["class_type"] == kind
    assert set(new["inputs"]) <= {each.id for each in NODES[kind].inputs}
    assert (new["inputs"]["prompt"], new["inputs"]["system"]) == (inputs["text"], "Be brief.")


def test_a_chat_without_a_question_is_told():
    done = convert({"5": {"class_type": "Qwen", "inputs": {"prompt": ""}}}, "w.json")
    assert done.notes == ["node 5 (Qwen): prompt is empty: write what to ask"]


# What is no workflow


@pytest.mark.parametrize("document", [None, 1, "x", [], {}, {"nodes": 3}, {"a": {"b": 1}}])
def test_what_is_no_workflow_is_said(document):
    with pytest.raises(InputError, match=r"w\.json: is no ComfyUI workflow"):
        convert(document, "w.json")


def test_what_is_nested_too_deeply_is_said():
    deep = {}
    for _ in range(900):
        deep = {"extra": deep}
    with pytest.raises(InputError, match="is nested too deeply"):
        convert({"nodes": [node("QwenVL", [])], "extra": deep}, "w.json")


@pytest.mark.parametrize("subgraphs", [5, "x", True, [5], {"id": 1}])
def test_subgraphs_that_are_none_are_no_hindrance(subgraphs):
    document = graph(node("AILab_QwenVL", list(LAB)))
    document["definitions"] = {"subgraphs": subgraphs}
    assert len(convert(document, "w.json").converted) == 1


@pytest.mark.parametrize("preset", [[1], {"a": 1}, 5, None])
def test_a_preset_that_is_no_text_is_told(preset):
    inputs = {"preset_prompt": preset, "custom_prompt": "What is it?", "image": ["1", 0]}
    done = convert({"5": {"class_type": "AILab_QwenVL", "inputs": inputs}}, "w.json")
    assert done.document["5"]["inputs"]["prompt"] == "What is it?"
    assert any("preset cannot be" in note for note in done.notes)


def test_links_of_a_large_graph_are_looked_up_not_searched(monkeypatch):
    reads = []
    link_id = editor_graph._link_id
    monkeypatch.setattr(editor_graph, "_link_id", lambda link: reads.append(1) or link_id(link))
    nodes, links = [], []
    for at in range(100, 150):
        sockets = [socket("image", at), widget("source_path", -at)]
        nodes.append(node("Qwen3_VQA", {"text": "t"}, sockets, at, (at + 1, -at - 1)))
        links += [[at, at - 1, 0, at, 7, "IMAGE"], [-at, at - 1, 0, at, 7, "STRING"]]
    done = convert({"nodes": nodes, "links": links}, "w.json")
    assert len(reads) <= 3 * len(links)
    assert [link[0] for link in done.document["links"]] == list(range(100, 150))
    assert {link[4] for link in done.document["links"]} == {0}
    assert [each["outputs"][0]["links"] for each in done.document["nodes"][:-1]] == [
        [at + 1] for at in range(100, 149)
    ]


def test_a_workflow_without_old_nodes_is_said():
    with pytest.raises(InputError, match="no node of a pack that is known"):
        convert(graph(), "w.json")


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ([], "w.json: the graph has no nodes"),
        (["KSampler", "TextEncodeQwenImageEdit"], "w.json: no node of a pack that is known"),
        (["KSampler", "QwencliCaption"], "w.json: no node of a pack that is known: those of "
                                         "qwencli are there already"),
        (["AILab_QwenVL_Next"], "w.json: node 1 (AILab_QwenVL_Next): no such node is known, it is "
                                "left as it is"),
        (["Qwen9", "Qwen10"], "w.json: node 1 (Qwen9): no such node is known, it is left as it is "
                              "(and 1 more)"),
    ],
)  # fmt: skip
def test_why_nothing_is_converted_is_one_line(kinds, said):
    nodes = [{"id": n, "type": kind} for n, kind in enumerate(kinds, start=1)]
    with pytest.raises(InputError) as error:
        convert({"nodes": nodes, "links": []}, "w.json")
    assert error.value.message == said and error.value.hint
    if kinds:
        with pytest.raises(InputError) as error:
            convert({str(n): {"class_type": kind, "inputs": {}}
                     for n, kind in enumerate(kinds, start=1)}, "w.json")  # fmt: skip
        assert error.value.message == said


def test_nodes_that_look_alike_are_told_and_the_rest_converted():
    document = {
        "1": {"class_type": "QwenVL", "inputs": {"text": "x", "seed": 1, "image1": ["9", 0]}},
        "2": {"class_type": "QwenVL_New", "inputs": {"text": "x"}},
        "3": {"class_type": "QwenVL"},
        "9": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    }
    done = convert(document, "w.json")
    assert len(done.converted) == 1 and done.document["2"] == document["2"]
    assert done.notes == [
        "node 2 (QwenVL_New): no such node is known, it is left as it is",
        "node 3 (QwenVL): its inputs are missing, it is left as it is",
    ]


def test_files_that_are_no_json(tmp_path):
    path = tmp_path / "w.json"
    whats = {
        b"": "is empty",
        b" \n": "is empty",
        b"{": "is no JSON",
        b"\x89PNG\r\n": "is a picture",
    }
    for data, what in {
        **whats,
        b"[" * 100_000: "is no JSON",
        '{"é": 1}'.encode("latin-1"): "no text in UTF-8",
        "{".encode("utf-16"): "no JSON",
    }.items():
        path.write_bytes(data)
        with pytest.raises(InputError, match=what):
            read_workflow(path)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        path.write_bytes('{"é": 1}'.encode(encoding))
        assert read_workflow(path) == {"é": 1}
    for bad in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match="cannot be read"):
            read_workflow(bad)


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["AILab_QwenVL", "5f", "seed", "image"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["id", "name", "links", "link", "widget", "nodes", "inputs",
                                       "outputs", "type", "seed", "subgraphs"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def _places(found, path=()):
    yield path
    for key, each in found.items() if isinstance(found, dict) else (
        enumerate(found) if isinstance(found, list) else ()
    ):  # fmt: skip
        yield from _places(each, (*path, key))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_graph_with_anything_anywhere_is_converted_or_refused(data):
    document = graph(
        node("AILab_QwenVL", list(LAB), [socket("image", 3), widget("seed", 4, "INT")]),
        links=[(3, 1, 0, 5, 0, "IMAGE"), (4, 1, 0, 5, 1, "INT")],
    )
    document["definitions"] = {"subgraphs": [{"id": "5f", **copy.deepcopy(document)}]}
    document["nodes"].append(
        {"id": 9, "type": "5f", "properties": {"proxyWidgets": [["5", "seed"]]}}
    )
    api = {"5": {"class_type": "QwenVL", "inputs": {"image1": ["1", 0], "seed": 1, "text": ""}}}
    document["prompt"] = api
    root = data.draw(st.sampled_from([document, api]))
    for path in data.draw(st.lists(st.sampled_from(list(_places(root))[1:]), max_size=3)):
        at = root
        try:
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = data.draw(_ANY)
        except (KeyError, IndexError, TypeError):
            continue
    before = json.dumps(root)
    try:
        done = convert(root, "w.json")
    except QwenCliError:
        pass
    else:
        json.dumps(done.document)
        assert done.converted
    assert json.dumps(root) == before
