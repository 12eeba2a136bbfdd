"""Writes the node pack's example workflows, and photographs them in a running ComfyUI.

    python tools/docs/comfyui_examples.py              writes comfyui_nodes/example_workflows/*.json
    python tools/docs/comfyui_examples.py --check      fails when they are stale
    python tools/docs/comfyui_examples.py --pictures http://127.0.0.1:8188/
                                                       writes a .jpg beside each

Pictures need Chromium and a ComfyUI that has the pack; where its folder of inputs has the picture
of an example, the graph is run and the picture shows what came out.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwencli.comfyui.schemas import NODES, RunsWhere

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "comfyui_nodes" / "example_workflows"
# ComfyUI comes with a picture of this name.
PICTURE = "example.png"
# What the bundled model can answer is run for its picture.
RUN = ("1-caption-a-picture", "2-caption-a-batch", "3-resident-engine")
_TITLE, _ROW, _TEXT = 30, 24, 130
_WIDTH = 340


@dataclass
class Node:
    """One node to place.

    Args:
        at: column and row in units of 10 pixels.
        inputs: the socket names of ComfyUI's own nodes; ours are in the schemas.
        outputs: (name, type) of ComfyUI's own nodes.
        values: its widgets: of ours by name, where they are not the defaults.
        height: in pixels; None: by what it holds.
    """

    kind: str
    at: tuple[int, int]
    values: Any = None
    inputs: tuple[tuple[str, str], ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()
    height: int | None = None
    links: dict[str, tuple[int, int]] = field(default_factory=dict)


def load(at: tuple[int, int], picture: str = PICTURE) -> Node:
    outputs = (("IMAGE", "IMAGE"), ("MASK", "MASK"))
    return Node("LoadImage", at, [picture, "image"], outputs=outputs, height=320)


def show(at: tuple[int, int], node: int, slot: int, height: int = 170) -> Node:
    links = {"source": (node, slot)}
    return Node("PreviewAny", at, [], (("source", "*"),), height=height, links=links)


def ours(kind: str, at: tuple[int, int], links: dict[str, tuple[int, int]], **values: Any) -> Node:
    return Node(kind, at, values, links=links)


def examples() -> dict[str, list[Node]]:
    """Each example's nodes; a link names a node by its place in the list, from 1."""
    return {
        "1-caption-a-picture": [
            load((0, 0)),
            ours("QwencliCaption", (38, 0), {"images": (1, 0)}),
            show((76, 0), 2, 0),
            show((76, 22), 2, 2),
        ],
        "2-caption-a-batch": [
            load((0, 0)),
            Node("ImageInvert", (0, 40), [], (("image", "IMAGE"),), (("IMAGE", "IMAGE"),),
                 links={"image": (1, 0)}),
            Node("ImageBatch", (38, 0), [], (("image1", "IMAGE"), ("image2", "IMAGE")),
                 (("IMAGE", "IMAGE"),), links={"image1": (1, 0), "image2": (2, 0)}),
            ours("QwencliCaption", (76, 0), {"images": (3, 0)}, preset="short"),
            show((114, 0), 4, 0),
        ],
        "3-resident-engine": [
            load((0, 0)),
            ours("QwencliEngine", (0, 40), {}, runs=RunsWhere.RESIDENT.value),
            ours("QwencliCaption", (38, 0), {"images": (1, 0), "engine": (2, 0)}),
            show((76, 0), 3, 0),
            show((76, 22), 3, 2),
        ],
        "4-caption-a-folder": [
            ours("QwencliCaptionFolder", (0, 0), {}, path="/path/to/pictures"),
            show((38, 0), 1, 0),
        ],
        "5-boxes-and-json": [
            load((0, 0)),
            ours("QwencliBoxes", (38, 0), {"images": (1, 0)}),
            Node("PreviewImage", (76, 0), [], (("images", "IMAGE"),), height=320,
                 links={"images": (2, 0)}),
            show((76, 40), 2, 1),
            ours("QwencliStructuredCaption", (114, 0), {"images": (1, 0)}),
            show((152, 0), 5, 0),
        ],
        "6-write-a-prompt": [
            ours("QwencliChat", (0, 0), {}, prompt="a cat on a roof at night",
                 system="Turn the user's text into a prompt for an image generator. Answer with "
                 "the prompt alone."),
            show((38, 0), 1, 0),
        ],
    }  # fmt: skip


def workflow(nodes: list[Node]) -> dict[str, Any]:
    """The nodes as ComfyUI's editor saves them (version 0.4)."""
    links: list[list[Any]] = []
    drawn = [_drawn(number, node) for number, node in enumerate(nodes, 1)]
    for number, node in enumerate(nodes, 1):
        for name, (origin, slot) in node.links.items():
            names = [each["name"] for each in drawn[number - 1]["inputs"]]
            output = drawn[origin - 1]["outputs"][slot]
            link = [len(links) + 1, origin, slot, number, names.index(name), output["type"]]
            links.append(link)
            drawn[number - 1]["inputs"][names.index(name)]["link"] = link[0]
            output["links"] = [*(output["links"] or []), link[0]]
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": drawn,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _drawn(number: int, node: Node) -> dict[str, Any]:
    schema = NODES.get(node.kind)
    values, inputs, outputs = node.values, list(node.inputs), list(node.outputs)
    height = node.height or _TITLE + _ROW * (max(len(inputs), len(outputs)) + 1)
    if schema is not None:
        assert set(node.values) <= {each.id for each in schema.widgets}, node.kind
        by_name = {**schema.defaults(), **node.values}
        values = []
        for each in schema.widgets:
            values += [by_name[each.id]] + (["randomize"] if each.id == "seed" else [])
        inputs = [(each.id, each.kind.value) for each in schema.inputs if not each.is_widget]
        outputs = [(each.id, each.kind.value) for each in schema.outputs]
        texts = sum(each.multiline for each in schema.widgets)
        rows = max(len(inputs), len(outputs)) + len(values) - texts
        height = _TITLE + _ROW * rows + _TEXT * texts
    return {
        "id": number,
        "type": node.kind,
        "pos": [10 * node.at[0], 10 * node.at[1]],
        "size": [_WIDTH, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [{"name": name, "type": kind, "link": None} for name, kind in inputs],
        "outputs": [{"name": name, "type": kind, "links": None} for name, kind in outputs],
        "properties": {"Node name for S&R": node.kind},
        "widgets_values": values,
    }


def texts() -> dict[Path, str]:
    return {
        TARGET / f"{name}.json": json.dumps(workflow(nodes), ensure_ascii=False, indent=1) + "\n"
        for name, nodes in examples().items()
    }


_SHOW = """(async (graph, run) => {
  await app.extensionManager.setting.set('Comfy.TutorialCompleted', true);
  await app.loadGraphData(graph);
  await new Promise(done => setTimeout(done, 1500));
  document.querySelectorAll('.p-dialog-mask').forEach(each => each.remove());
  const nodes = app.graph._nodes, pad = 20;
  const left = Math.min(...nodes.map(n => n.pos[0])) - pad;
  const top = Math.min(...nodes.map(n => n.pos[1])) - 30 - pad;
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + pad;
  const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + pad;
  const place = app.canvas.canvas.getBoundingClientRect();
  const x = 80, y = 60;  // beside the editor's own bars
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [x - left, y - top];
  app.canvas.setDirty(true, true);
  window.ran = {over: !run, failed: ''};
  if (run) {
    const ran = window.ran;
    app.api.addEventListener('execution_error', e => { ran.failed = e.detail.exception_message; });
    for (const name of ['execution_success', 'execution_error', 'execution_interrupted'])
      app.api.addEventListener(name, () => { ran.over = true; });
    await app.queuePrompt(0, 1);
  }
  return [place.x + x, place.y + y, right - left, bottom - top];
})"""


def photograph(address: str) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.browser import opened

    with opened(address, (2200, 1600)) as page:
        page.wait_for("!!(window.app && app.graph && app.extensionManager)", 120)
        time.sleep(3)
        for name, nodes in examples().items():
            graph = json.dumps(workflow(nodes))
            run = json.dumps(name in RUN)
            x, y, width, height = page.run(f"{_SHOW}({graph}, {run})")
            page.wait_for("window.ran.over", 240)
            failed = page.run("window.ran.failed")
            assert not failed, f"{name}: {failed}"
            time.sleep(2)
            clip = {"x": x, "y": y, "width": width, "height": height, "scale": 0.6}
            shot = page.ask("Page.captureScreenshot", format="jpeg", quality=82, clip=clip)
            (TARGET / f"{name}.jpg").write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    if sys.argv[1:2] == ["--pictures"]:
        photograph(sys.argv[2])
        return
    for path, text in texts().items():
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            sys.exit(f"{path} is stale: run tools/docs/comfyui_examples.py")


if __name__ == "__main__":
    main()
