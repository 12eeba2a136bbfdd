"""The node pack's example workflows are fresh, whole, and of nodes that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qwencli.comfyui.schemas import NODES, Kind

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "comfyui_nodes" / "example_workflows").glob("*.json"))


def test_files_are_what_the_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "docs")
    import comfyui_examples

    assert {path: path.read_text("utf-8") for path in FILES} == comfyui_examples.texts()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_whole(path):
    graph = json.loads(path.read_text("utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert any(node["type"] in NODES for node in nodes.values())
    for link, origin, slot, target, place, kind in graph["links"]:
        assert link in nodes[origin]["outputs"][slot]["links"]
        assert nodes[origin]["outputs"][slot]["type"] == kind
        entry = nodes[target]["inputs"][place]
        assert entry["link"] == link and entry["type"] in (kind, "*")
    for node in nodes.values():
        if node["type"] in NODES:
            schema = NODES[node["type"]]
            required = {each.id for each in schema.inputs if not each.optional}
            assert required <= {each["name"] for each in node["inputs"] if each["link"]}
            values = list(node["widgets_values"])
            for each in schema.widgets:
                value = values.pop(0)
                if each.kind is Kind.COMBO and each.options:
                    assert value in each.options
                if each.kind in (Kind.INT, Kind.FLOAT):
                    assert each.low <= value <= each.high
                if each.id == "seed":
                    assert values.pop(0) == "randomize"
            assert not values
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and min(picture.size) > 200
    assert path.with_suffix(".jpg").stat().st_size < 80_000


def test_every_node_is_in_an_example():
    text = "".join(path.read_text("utf-8") for path in FILES)
    assert [name for name in NODES if f'"{name}"' not in text] == []
