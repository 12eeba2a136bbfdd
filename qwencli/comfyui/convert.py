"""Moves saved graphs of other Qwen packs over to our nodes.

Both of ComfyUI's formats are read: the editor's (nodes with positions, values in the order of
widgets, links as a list of their own; versions 0.4 and 1.0, with subgraphs) and the API's (nodes by
id, inputs by name). A node keeps its id, place, size, colours and the links that have a place here.
Nodes that are not in `old_nodes.OLD_NODES` are not touched.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwencli.comfyui import old_nodes as old_packs
from qwencli.comfyui.old_nodes import OLD_NODES, OldNode
from qwencli.comfyui.schemas import NODES, Node
from qwencli.comfyui.translate import Translated, is_known, translated
from qwencli.errors import InputError

# What the editor keeps behind the value of a seed.
_SEED_MODES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
_SEED, _AFTER = "seed", "control_after_generate"
# The values once more, by name, in the newest editors.
_NAMED = "widgets_values_named"
# How the editor draws a socket that may stay free, and one that gives a list.
_SHAPE_OPTIONAL, _SHAPE_LIST = 7, 6
_LISTED = "docs/comfyui.md lists the nodes that can be converted"
_UNKNOWN_VERSION = "its values fit no version that is known, it is left as it is"
# What a node says of the pack that it came from, for ComfyUI's manager.
_OF_OLD_PACK = ("cnr_id", "aux_id", "ver", "models")
_SAVE = "save the workflow with ComfyUI's Workflow > Save"
# What PNG, JPEG and WebP begin with: ComfyUI puts graphs into pictures, too.
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
# Names of nodes that ask a Qwen model: not ours, those that make pictures, and group nodes.
_ALIKE = re.compile(r"(?i)^(?!workflow[>/]).*?(?<!textencode)qwen(?!cli|[ _-]?image)")
# Where a file may keep its graphs: what was posted to ComfyUI, and what pictures carry.
_WRAPPERS = ("prompt", "output", "workflow", "extra_data", "extra_pnginfo")


@dataclass
class Conversion:
    """A graph moved over.

    Attributes:
        document: the whole file, changed.
        converted: one line a node that was converted.
        notes: one line for each thing that has no equal here, or was left as it is.
        kinds: of all nodes there were.
    """

    document: Any
    converted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)

    def is_known(self, where: str, kind: str) -> bool:
        """Whether nodes of this kind can be converted; of those that only look so it is told."""
        self.kinds.add(kind)
        if kind in OLD_NODES:
            return True
        if _ALIKE.search(kind) and kind not in NODES:
            self.notes.append(f"{where}: no such node is known, it is left as it is")
        return False


def read_workflow(path: Path) -> Any:
    """The JSON of a file.

    Raises:
        InputError: it cannot be read, or is no JSON.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror or error}", "give a workflow's JSON file"
        ) from error
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        is_picture = data.startswith(_PICTURES)
        what = "is empty" if not data.strip() else "is a picture" if is_picture else "is no JSON"
        hint = f"open it in ComfyUI, and {_SAVE}" if is_picture else _SAVE
        raise InputError(f"{path}: {what}", hint) from error


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
        if _is_editor(graph):
            _convert_editor(graph, done)
        else:
            _convert_api(graph, done)
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


def _is_editor(graph: Mapping[str, Any]) -> bool:
    return isinstance(graph.get("nodes"), list)


def _is_api(graph: Mapping[str, Any]) -> bool:
    return any(isinstance(node, dict) and "class_type" in node for node in graph.values())


def _graphs(found: Any) -> Iterator[dict[str, Any]]:
    """The graphs of a document: itself, or what a request or a picture's metadata holds."""
    if not isinstance(found, dict):
        return
    if _is_editor(found) or _is_api(found):
        yield found
        return
    for key in _WRAPPERS:
        yield from _graphs(found.get(key))


# The API's format


def _convert_api(graph: dict[str, Any], done: Conversion) -> None:
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
            done.notes.append(f"{where}: {_UNKNOWN_VERSION}")
            continue
        links = {name: value for name, value in inputs.items() if _is_api_link(value)}
        values = {name: value for name, value in inputs.items() if name not in links}
        new = translated(old, values, links)
        node["inputs"] = {**new.values, **new.links}
        node["class_type"] = new.node.id
        _tell(done, where, new)


def _is_api_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def _tell(done: Conversion, where: str, new: Translated) -> None:
    done.converted.append(f"{where} is {new.node.display_name} now")
    done.notes += [f"{where}: {note}" for note in new.notes]


# The editor's format


def _convert_editor(
    graph: dict[str, Any], done: Conversion, within: str = ""
) -> dict[str, Translated]:
    """Convert a graph and its subgraphs; returns what its own nodes became, by their ids."""
    inner: dict[str, dict[str, Translated]] = {}
    definitions = graph.get("definitions")
    subgraphs = _dicts(definitions.get("subgraphs")) if isinstance(definitions, dict) else []
    for subgraph in subgraphs:
        if _is_editor(subgraph):
            name = f" of subgraph {subgraph.get('name')!r:.60}"
            inner[str(subgraph.get("id"))] = _convert_editor(subgraph, done, name)
    _tell_group_nodes(graph, done)
    became: dict[str, Translated] = {}
    links = _LinksOf(graph)
    for node in _dicts(graph["nodes"]):
        kind = str(node.get("type"))
        where = f"node {node.get('id')}{within} ({kind})"
        if done.is_known(where, kind):
            new = _convert_editor_node(links, node, OLD_NODES[kind], where, done)
            if new is not None:
                became[str(node.get("id"))] = new
    links.remove_gone()
    # Subgraphs may hold each other.
    for node in (node for holder in [graph, *subgraphs] for node in _dicts(holder.get("nodes"))):
        if str(node.get("type")) in inner:
            _rename_promoted(node, inner[str(node.get("type"))], done)
    return became


def _dicts(found: Any) -> list[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _convert_editor_node(
    links_of: _LinksOf, node: dict[str, Any], old: OldNode, where: str, done: Conversion
) -> Translated | None:
    named = _named_values(node, old)
    if named is None:
        done.notes.append(f"{where}: {_UNKNOWN_VERSION}")
        return None
    values, seed_mode = named
    sockets = {str(each.get("name")): each for each in _dicts(node.get("inputs"))}
    links = {name: each["link"] for name, each in sockets.items() if each.get("link") is not None}
    new = translated(old, values, links)
    links_of.let_go(link for link in links.values() if link not in new.links.values())
    node["inputs"] = _editor_inputs(new.node, new.links, sockets, links)
    for slot, entry in enumerate(node["inputs"]):
        links_of.move_target(entry["link"], slot)
    node["outputs"] = _editor_outputs(new.node, node.get("outputs"))
    named_values = dict(_editor_values(new.node, new.values, seed_mode))
    node["widgets_values"] = list(named_values.values())
    if _NAMED in node:
        node[_NAMED] = named_values
    node["type"] = new.node.id
    properties = node.get("properties")
    kept_properties = properties if isinstance(properties, dict) else {}
    node["properties"] = {
        **{key: value for key, value in kept_properties.items() if key not in _OF_OLD_PACK},
        "Node name for S&R": new.node.id,
    }
    _tell(done, where, new)
    return new


def _named_values(node: Mapping[str, Any], old: OldNode) -> tuple[dict[str, Any], str] | None:
    """A node's values by the names of its widgets, and what happens to the seed after a run."""
    given, by_name = node.get("widgets_values"), node.get(_NAMED)
    # The newest editors write the values by name, too; some nodes have no others.
    for named in (by_name, given):
        if isinstance(named, dict) and named:
            mode = named.get(_AFTER)
            values = {str(name): value for name, value in named.items() if name != _AFTER}
            known = is_known(old, values)
            return (values, mode if mode in _SEED_MODES else "fixed") if known else None
    if given is None:
        given = []
    if not isinstance(given, list):
        return None
    # Newer ones write the names of all widgets among the inputs.
    written = tuple(
        str(each["widget"].get("name"))
        for each in _dicts(node.get("inputs"))
        if isinstance(each.get("widget"), dict)
    )
    for layout in ((written,) if len(written) > 1 else ()) + old.layouts:
        if (found := _by_layout(given, layout)) is not None:
            return found
    return None


def _by_layout(given: Sequence[Any], layout: Sequence[str]) -> tuple[dict[str, Any], str] | None:
    """The values by name, if they can be those of this layout; else None."""
    left, values, seed_mode = list(given), {}, "fixed"
    for name in layout:
        if not left:
            return None
        value = left.pop(0)
        if not _can_be(name, value):
            return None
        values[name] = value
        if name == _SEED and left and left[0] in _SEED_MODES:
            seed_mode = left.pop(0)
    if left:
        return None
    return {name: value for name, value in values.items() if value is not None}, seed_mode


def _can_be(name: str, value: Any) -> bool:
    if value is None:
        return True
    if name in old_packs.SWITCHES:
        return isinstance(value, bool)
    if name in old_packs.NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str):
        return False
    if name in old_packs.QUANTIZATION_INPUTS:
        return bool(re.search(r"(?i)none|[48]-?bit", value))
    if name in old_packs.ATTENTION_INPUTS:
        return bool(re.fullmatch("auto|default|sage|sdpa|eager|flash_attention_[23]", value))
    return True


def _editor_inputs(
    node: Node,
    links: Mapping[str, Any],
    old_sockets: Mapping[str, Mapping[str, Any]],
    old_links: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """All inputs in the order in which the editor draws them: links go by their places."""
    labels = {
        str(old_links[name]): entry["label"]
        for name, entry in old_sockets.items()
        if name in old_links and isinstance(entry.get("label"), str)
    }
    entries = []
    for each in sorted(node.inputs, key=lambda each: each.is_widget):
        link = links.get(each.id)
        entry: dict[str, Any] = {"name": each.id, "type": each.kind.value, "link": link}
        if each.is_widget:
            entry["widget"] = {"name": each.id}
        elif each.optional:
            entry["shape"] = _SHAPE_OPTIONAL
        if link is not None and str(link) in labels:
            entry["label"] = labels[str(link)]
        entries.append(entry)
    return entries


def _editor_outputs(node: Node, old_outputs: Any) -> list[dict[str, Any]]:
    first = next(iter(_dicts(old_outputs)), {})
    entries = []
    for slot, each in enumerate(node.outputs):
        entry: dict[str, Any] = {"name": each.id, "type": each.kind.value}
        entry["links"] = first.get("links") if slot == 0 else None
        entry["slot_index"] = slot
        if each.is_list:
            entry["shape"] = _SHAPE_LIST
        entries.append(entry)
    return entries


def _editor_values(
    node: Node, values: Mapping[str, Any], seed_mode: str
) -> Iterable[tuple[str, Any]]:
    for each in node.widgets:
        yield each.id, values[each.id]
        if each.id == _SEED:
            yield _AFTER, seed_mode


def _link_id(link: Any) -> Any:
    if isinstance(link, dict):
        return link.get("id")
    return link[0] if isinstance(link, list) and link else None


class _LinksOf:
    """The links of one graph by their ids, for graphs of thousands of nodes."""

    def __init__(self, graph: dict[str, Any]) -> None:
        self._graph = graph
        self._gone: set[str] = set()
        self._by_id: dict[str, list[Any]] = {}
        links = graph.get("links")
        for link in links if isinstance(links, list) else []:
            self._by_id.setdefault(str(_link_id(link)), []).append(link)

    def move_target(self, link_id: Any, slot: int) -> None:
        for link in self._by_id.get(str(link_id), []) if link_id is not None else []:
            if isinstance(link, dict):
                link["target_slot"] = slot
            elif len(link) > 4:
                link[4] = slot

    def let_go(self, link_ids: Iterable[Any]) -> None:
        """Have `remove_gone` remove these."""
        self._gone.update(str(each) for each in link_ids)

    def remove_gone(self) -> None:
        """Take links out of the graph: out of its list, the nodes they come from, and reroutes."""
        if not self._gone:
            return
        graph = self._graph
        extra = graph.get("extra") if isinstance(graph.get("extra"), dict) else {}
        assert isinstance(extra, dict)
        for holder, key in ((graph, "links"), (extra, "linkExtensions")):
            if isinstance(holder.get(key), list):
                holder[key] = [each for each in holder[key] if not self._is_gone(_link_id(each))]
        origins = [
            (output, "links")
            for node in _dicts(graph["nodes"])
            for output in _dicts(node.get("outputs"))
        ]
        reroutes = _dicts(graph.get("reroutes")) + _dicts(extra.get("reroutes"))
        # A subgraph's own inputs are where links from outside begin.
        for entry, key in [
            *origins,
            *((each, "linkIds") for each in reroutes + _dicts(graph.get("inputs"))),
        ]:
            if isinstance(entry.get(key), list):
                entry[key] = [link for link in entry[key] if not self._is_gone(link)]

    def _is_gone(self, link_id: Any) -> bool:
        return link_id is not None and str(link_id) in self._gone


def _rename_promoted(
    node: dict[str, Any], inner: Mapping[str, Translated], done: Conversion
) -> None:
    """Widgets of a subgraph's nodes that its own node shows, by the names they have now."""
    properties = node.get("properties")
    promoted = properties.get("proxyWidgets") if isinstance(properties, dict) else None
    if not isinstance(promoted, list):
        return
    kept, values = [], node.get("widgets_values")
    parallel = isinstance(values, list) and len(values) == len(promoted)
    kept_values = []
    for at, entry in enumerate(promoted):
        new = inner.get(str(entry[0])) if isinstance(entry, list) and len(entry) > 1 else None
        if new is not None:
            # Values that the subgraph's own node keeps would be of the old words.
            place = new.moved.get(str(entry[1]))
            if place is None and not parallel:
                place = new.reworded.get(str(entry[1]))
            if place is None:
                done.notes.append(
                    f"node {node.get('id')}: its widget {entry[1]!r:.60} shows an input that has "
                    "no equal and is left out; choose it in the subgraph"
                )
                continue
            entry = [entry[0], place, *entry[2:]]
        kept.append(entry)
        if parallel:
            kept_values.append(values[at])  # type: ignore[index]
    properties["proxyWidgets"] = kept  # type: ignore[index]
    if parallel:
        node["widgets_values"] = kept_values


def _tell_group_nodes(graph: Mapping[str, Any], done: Conversion) -> None:
    """Group nodes, which subgraphs replaced, hold nodes in a form of their own."""
    extra = graph.get("extra")
    groups = extra.get("groupNodes") if isinstance(extra, dict) else None
    for name, group in groups.items() if isinstance(groups, dict) else ():
        nodes = _dicts(group.get("nodes")) if isinstance(group, dict) else []
        found = [str(node.get("type")) for node in nodes if str(node.get("type")) in OLD_NODES]
        if found:
            done.notes.append(
                f"group node {name!r:.60} holds {', '.join(found)}: turn it into nodes in ComfyUI, "
                "save, and convert again"
            )
