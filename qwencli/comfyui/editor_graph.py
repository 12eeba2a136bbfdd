"""Conversion of graphs in the editor's format: nodes with places, sockets and lists of values.

Versions 0.4 and 1.0, with subgraphs. A node keeps its id, place, size, colours, and the links that
have a place here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwencli.comfyui import old_nodes as old_packs
from qwencli.comfyui.old_nodes import OLD_NODES, OldNode
from qwencli.comfyui.schemas import Node
from qwencli.comfyui.translate import (
    UNKNOWN_VERSION,
    Conversion,
    TranslatedNode,
    is_known,
    translate_node,
)

# What the editor keeps behind the value of a seed.
_SEED_MODES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
_SEED, _AFTER = "seed", "control_after_generate"
# The values once more, by name, in the newest editors.
_NAMED = "widgets_values_named"
# How the editor draws a socket that may stay free, and one that gives a list.
_SHAPE_OPTIONAL, _SHAPE_LIST = 7, 6
# What a node says of the pack that it came from, for ComfyUI's manager.
_OF_OLD_PACK = ("cnr_id", "aux_id", "ver", "models")


def is_editor_graph(graph: Mapping[str, Any]) -> bool:
    return isinstance(graph.get("nodes"), list)


def convert_editor_graph(
    graph: dict[str, Any], done: Conversion, within: str = ""
) -> dict[str, TranslatedNode]:
    """Convert a graph and its subgraphs; returns what its own nodes became, by their ids."""
    inner: dict[str, dict[str, TranslatedNode]] = {}
    definitions = graph.get("definitions")
    subgraphs = _dicts(definitions.get("subgraphs")) if isinstance(definitions, dict) else []
    for subgraph in subgraphs:
        if is_editor_graph(subgraph):
            name = f" of subgraph {subgraph.get('name')!r:.60}"
            inner[str(subgraph.get("id"))] = convert_editor_graph(subgraph, done, name)
    _tell_group_nodes(graph, done)
    became: dict[str, TranslatedNode] = {}
    links = _GraphLinks(graph)
    for node in _dicts(graph["nodes"]):
        kind = str(node.get("type"))
        where = f"node {node.get('id')}{within} ({kind})"
        if done.is_known(where, kind):
            new = _convert_node(links, node, OLD_NODES[kind], where, done)
            if new is not None:
                became[str(node.get("id"))] = new
    links.remove_dropped()
    # Subgraphs may hold each other.
    for node in (node for holder in [graph, *subgraphs] for node in _dicts(holder.get("nodes"))):
        if str(node.get("type")) in inner:
            _rename_promoted(node, inner[str(node.get("type"))], done)
    return became


def _dicts(found: Any) -> list[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _convert_node(
    links_of: _GraphLinks, node: dict[str, Any], old: OldNode, where: str, done: Conversion
) -> TranslatedNode | None:
    named = _named_values(node, old)
    if named is None:
        done.notes.append(f"{where}: {UNKNOWN_VERSION}")
        return None
    values, seed_mode = named
    sockets = {str(each.get("name")): each for each in _dicts(node.get("inputs"))}
    links = {name: each["link"] for name, each in sockets.items() if each.get("link") is not None}
    new = translate_node(old, values, links)
    links_of.drop_later(link for link in links.values() if link not in new.links.values())
    node["inputs"] = _inputs(new.node, new.links, sockets, links)
    for slot, entry in enumerate(node["inputs"]):
        links_of.move_target(entry["link"], slot)
    node["outputs"] = _outputs(new.node, node.get("outputs"))
    named_values = dict(_values(new.node, new.values, seed_mode))
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
    done.add(where, new)
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
    # Widgets of the editor's own, such as buttons, are saved behind the node's, without a value.
    if any(value is not None for value in left):
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


def _inputs(
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


def _outputs(node: Node, old_outputs: Any) -> list[dict[str, Any]]:
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


def _values(node: Node, values: Mapping[str, Any], seed_mode: str) -> Iterable[tuple[str, Any]]:
    for each in node.widgets:
        yield each.id, values[each.id]
        if each.id == _SEED:
            yield _AFTER, seed_mode


def _link_id(link: Any) -> Any:
    if isinstance(link, dict):
        return link.get("id")
    return link[0] if isinstance(link, list) and link else None


class _GraphLinks:
    """The links of one graph by their ids, for graphs of thousands of nodes."""

    def __init__(self, graph: dict[str, Any]) -> None:
        self._graph = graph
        self._dropped: set[str] = set()
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

    def drop_later(self, link_ids: Iterable[Any]) -> None:
        """Have `remove_dropped` remove these."""
        self._dropped.update(str(each) for each in link_ids)

    def remove_dropped(self) -> None:
        """Take links out of the graph: out of its list, the nodes they come from, and reroutes."""
        if not self._dropped:
            return
        graph = self._graph
        extra = graph.get("extra") if isinstance(graph.get("extra"), dict) else {}
        assert isinstance(extra, dict)
        for holder, key in ((graph, "links"), (extra, "linkExtensions")):
            if isinstance(holder.get(key), list):
                holder[key] = [each for each in holder[key] if not self._is_dropped(_link_id(each))]
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
                entry[key] = [link for link in entry[key] if not self._is_dropped(link)]

    def _is_dropped(self, link_id: Any) -> bool:
        return link_id is not None and str(link_id) in self._dropped


def _rename_promoted(
    node: dict[str, Any], inner: Mapping[str, TranslatedNode], done: Conversion
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
