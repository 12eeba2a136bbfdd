"""Moves saved graphs of other Qwen packs over to our nodes.

Both of ComfyUI's formats are read: the editor's (`editor_graph`) and the API's (nodes by id, inputs
by name). Nodes that are not in `old_nodes.OLD_NODES` are not touched.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwencli.comfyui.editor_graph import convert_editor_graph, is_editor_graph
from qwencli.comfyui.old_nodes import OLD_NODES
from qwencli.comfyui.schemas import NODES
from qwencli.comfyui.translate import UNKNOWN_VERSION, Conversion, is_known, translate_node
from qwencli.errors import InputError

_LISTED = "docs/comfyui.md lists the nodes that can be converted"
_SAVE = "save the workflow with ComfyUI's Workflow > Save"
# What PNG, JPEG and WebP begin with: ComfyUI puts graphs into pictures, too.
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
# Where a file may keep its graphs: what was posted to ComfyUI, and what pictures carry.
_WRAPPERS = ("prompt", "output", "workflow", "extra_data", "extra_pnginfo")


def read_workflow(path: Path) -> Any:
    """The JSON of a file, in UTF-8, or in UTF-16 as a shell of Windows writes it.

    Raises:
        InputError: it cannot be read, or is no JSON.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror or error}", "give a workflow's JSON file"
        ) from error
    if data.startswith(_PICTURES):
        raise InputError(f"{path}: is a picture", f"open it in ComfyUI, and {_SAVE}")
    try:
        return json.loads(data.decode(json.detect_encoding(data)))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no text in UTF-8", _SAVE) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is {'no JSON' if data.strip() else 'empty'}", _SAVE) from error


def convert(document: Any, name: str) -> Conversion:
    """The document with every old node replaced; the one given stays as it is.

    Args:
        name: of the file, for errors.

    Raises:
        InputError: it is no workflow, or has no node that is known.
    """
    try:
        done = Conversion(copy.deepcopy(document))
    except RecursionError as error:
        raise InputError(f"{name}: is nested too deeply", _SAVE) from error
    graphs = list(_graphs(done.document))
    if not graphs:
        raise InputError(f"{name}: is no ComfyUI workflow", _SAVE)
    for graph in graphs:
        if is_editor_graph(graph):
            convert_editor_graph(graph, done)
        else:
            _convert_api_graph(graph, done)
    if not done.converted:
        raise _nothing_converted(name, done)
    return done


def _nothing_converted(name: str, done: Conversion) -> InputError:
    """Why there is nothing to convert in a graph, in one line."""
    if done.notes:
        why = done.notes[0]
        more = f" (and {len(done.notes) - 1} more)" if done.notes[1:] else ""
        return InputError(f"{name}: {why}{more}", _LISTED)
    if not done.kinds:
        return InputError(f"{name}: the graph has no nodes", _SAVE)
    nothing = f"{name}: no node of a pack that is known"
    if any(kind in NODES for kind in done.kinds):
        return InputError(f"{nothing}: those of qwencli are there already", "open it as it is")
    return InputError(nothing, _LISTED)


def _is_api(graph: Mapping[str, Any]) -> bool:
    return any(isinstance(node, dict) and "class_type" in node for node in graph.values())


def _graphs(found: Any) -> Iterator[dict[str, Any]]:
    """The graphs of a document: itself, or what a request or a picture's metadata holds."""
    if not isinstance(found, dict):
        return
    if is_editor_graph(found) or _is_api(found):
        yield found
        return
    for key in _WRAPPERS:
        yield from _graphs(found.get(key))


def _convert_api_graph(graph: dict[str, Any], done: Conversion) -> None:
    for key, node in graph.items():
        if not isinstance(node, dict):
            continue
        kind, inputs = str(node.get("class_type")), node.get("inputs")
        where = f"node {key} ({kind})"
        if not done.is_known(where, kind):
            continue
        old = OLD_NODES[kind]
        if not isinstance(inputs, dict):
            done.notes.append(f"{where}: its inputs are missing, it is left as it is")
            continue
        if not is_known(old, inputs):
            done.notes.append(f"{where}: {UNKNOWN_VERSION}")
            continue
        links = {name: value for name, value in inputs.items() if _is_api_link(value)}
        values = {name: value for name, value in inputs.items() if name not in links}
        new = translate_node(old, values, links)
        node["inputs"] = {**new.values, **new.links}
        node["class_type"] = new.node.id
        done.add(where, new)


def _is_api_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)
