"""What one node of another pack becomes: its values and links, by the inputs of ours; and what is
told of a whole graph.

The table is `old_nodes`; here are the values that need more than another name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwencli.comfyui import old_nodes as old_packs
from qwencli.comfyui.old_nodes import NO_EQUAL, OLD_NODES, SAME, OldNode
from qwencli.comfyui.schemas import (
    AS_MODEL,
    AUTO,
    CHAT,
    NO_PRESET,
    NODES,
    BatchMode,
    Input,
    Kind,
    Node,
    fold_seed,
    models,
)
from qwencli.config import SAMPLING_BOUNDS
from qwencli.messages import PRESETS
from qwencli.models.builtin import find_builtin

_SEED = "seed"
# "Qwen3VL-4B-Instruct-Q4_K_M.gguf": the model, and the bits of its weights unless they are floats.
_GGUF = re.compile(
    r"(?i)(?P<base>qwen[^/ ]*?)-?(?:UD-)?\b(?:I?Q(?P<bits>\d)\w*|BF16|F16|F32)(?=\.gguf|[ ()]|$)"
)
UNKNOWN_VERSION = "its values fit no version that is known, it is left as it is"
# Names of nodes that ask a Qwen model: not ours, those that make pictures, and group nodes.
_ALIKE = re.compile(r"(?i)^(?!workflow[>/]).*?(?<!textencode)qwen(?!cli|[ _-]?image)")


@dataclass
class TranslatedNode:
    """What one old node becomes: values and links by our inputs, and what is to be told."""

    node: Node
    values: dict[str, Any]
    links: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # Where each old input went whose values mean the same, and whose values were translated;
    # promoted widgets of subgraphs follow it.
    moved: dict[str, str] = field(default_factory=dict)
    reworded: dict[str, str] = field(default_factory=dict)


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

    def add(self, where: str, new: TranslatedNode) -> None:
        """Note that a node was converted."""
        self.converted.append(f"{where} is {new.node.display_name} now")
        self.notes += [f"{where}: {note}" for note in new.notes]


def translate_node(
    old: OldNode, values: Mapping[str, Any], links: Mapping[str, Any]
) -> TranslatedNode:
    """Translate the values and links of an old node, both by its own names."""
    node = CHAT if _asks_without_pictures(old, values, links) else old.node
    result = TranslatedNode(node, {each.id: each.default for each in node.widgets})
    for name, value in old.settings.items():
        _set(result, name, value)
    _move_pictures(old, links, result)
    pictures = {*old.pictures, old.frames, old.video}
    for name in [*values, *(name for name in links if name not in values)]:
        if name in pictures:
            continue
        if name in links:
            _move_link(old, name, links[name], result)
        if name in values and (name not in links or name in result.moved):
            _move_value(old, name, values[name], result)
    if node is CHAT and "prompt" not in result.links and not result.values["prompt"]:
        result.notes.append("prompt is empty: write what to ask")
    return result


def _asks_without_pictures(
    old: OldNode, values: Mapping[str, Any], links: Mapping[str, Any]
) -> bool:
    """Old nodes for pictures answer without one, too; of ours, the one for captions does not."""
    shown = {*old.pictures, old.frames, old.video, *old_packs.FILE_INPUTS}
    if any(name in links or values.get(name) for name in shown):
        return False
    return any(
        SAME.get(name) == "prompt" and (name in links or bool(value))
        for name, value in {**values, **links}.items()
    )


def _move_pictures(old: OldNode, links: Mapping[str, Any], result: TranslatedNode) -> None:
    pictures = [name for name in old.pictures if name in links]
    if old.video in links:
        result.links["video"] = links[old.video]
    if old.frames in links:
        result.links["images"] = links[old.frames]
        result.values["batch_mode"] = BatchMode.VIDEO.value
    elif len(pictures) == 1:
        result.links["images"] = links[pictures.pop()]
    places = [each.id for each in result.node.inputs if re.fullmatch(r"image_\d", each.id)]
    for place, name in zip(places, pictures, strict=False):
        result.links[place] = links[name]
    for name in pictures[len(places) :]:
        result.notes.append(f"{name}: there are {len(places)} inputs for pictures, it is left out")


def _place(old: OldNode, name: str, node: Node) -> str | None:
    """The input of `node` that means the same; None: there is none."""
    place = old.names.get(name, SAME.get(name, ""))
    return place if any(each.id == place for each in node.inputs) else None


def _move_link(old: OldNode, name: str, link: Any, result: TranslatedNode) -> None:
    place = _place(old, name, result.node)
    if place is not None:
        result.links[place] = link
        result.moved[name] = place
        return
    _, instead = NO_EQUAL.get(name, (None, "choose it in the node"))
    result.notes.append(f"{name} came from another node and has no equal: {instead}")


def _move_value(old: OldNode, name: str, value: Any, result: TranslatedNode) -> None:
    place = _place(old, name, result.node)
    if (shown := old_packs.TRANSLATED.get(name)) in result.values:
        result.reworded[name] = str(shown)
    if place is not None:
        result.moved[name] = place
        # An empty text says nothing: what a preset or a style has put there stays.
        if value != "" or not result.values.get(place):
            _set(result, place, value)
    elif name in old_packs.MODEL_INPUTS:
        _set_model(result, value)
    elif name in old_packs.QUANTIZATION_INPUTS:
        bits = re.search(r"[48]", str(value))
        _set(result, "quantization", f"{bits[0]}bit" if bits else "none")
    elif name in old_packs.ATTENTION_INPUTS:
        if value == "sage":
            result.notes.append(f"{name} sage has no equal: auto takes the fastest here")
            value = AUTO
        _set(result, "attention", value)
    elif name in old_packs.KEEP_INPUTS | old_packs.UNLOAD_INPUTS:
        # A node that never unloads has our own time after which it does.
        if bool(value) == (name in old_packs.UNLOAD_INPUTS):
            _set(result, "keep_loaded", "0")
    elif name in old_packs.PRESET_INPUTS:
        _set_preset(result, name, value)
    elif name in old_packs.STYLE_INPUTS:
        system = old_packs.OLD_STYLES.get(_letters(value), old_packs.OLD_STYLES["enhance"])
        _set(result, "system", system)
        result.notes.append(f"{name} {value!r:.60}: system says it in words of our own")
    else:
        nothing, instead = NO_EQUAL.get(name, (None, "it is unknown"))
        if value != nothing or nothing is None:
            result.notes.append(f"{name} {value!r:.60} has no equal: {instead}")


def _set(result: TranslatedNode, name: str, value: Any) -> None:
    """Give an input a value, brought into its range."""
    place = next((each for each in result.node.inputs if each.id == name), None)
    if place is None:
        return
    fitting = _fitting(place, value)
    if fitting is None:
        result.notes.append(f"{name} cannot be {value!r:.60}: it stays {place.default!r}")
        return
    if fitting != value:
        result.notes.append(f"{name} {value!r:.60} is out of range here: it is {fitting!r}")
    result.values[name] = fitting


def _fitting(place: Input, value: Any) -> Any:
    """The value that an input of ours takes for this one, None where there is none."""
    if place.kind is Kind.BOOLEAN:
        return value if isinstance(value, bool) else None
    if place.kind in (Kind.INT, Kind.FLOAT):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if place.kind is Kind.INT and value != int(value):
            return None
        if place.id == _SEED:
            value = fold_seed(int(value))
        bounded = min(max(value, place.low if place.low is not None else value),
                      place.high if place.high is not None else value)  # fmt: skip
        # -1 has a meaning of its own for sampling parameters, which no old node gave it.
        if place.default == AS_MODEL and place.id in SAMPLING_BOUNDS:
            bounded = max(bounded, SAMPLING_BOUNDS[place.id].low)
        return int(bounded) if place.kind is Kind.INT else bounded
    if not isinstance(value, str):
        return None
    return value if place.kind is Kind.STRING or value in place.options else None


def _set_model(result: TranslatedNode, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        return
    name = old_packs.OLD_MODELS.get(value.strip(), value.strip())
    if (file := _gguf(name)) is not None:
        base, quantization = file
        entry = find_builtin(base)
        if entry is None:
            result.notes.append(f"model {name!r:.80} is a GGUF file: choose a model in the node")
            return
        result.notes.append(f"model {name!r:.80} is a GGUF file: it is {entry.alias} now")
        _set(result, "quantization", quantization)
        name = base
    if name in models():  # an entry of custom_models.json, whose format the packs share
        result.values["model"] = name
        return
    entry = find_builtin(name)
    if entry is not None:
        result.values["model"] = entry.alias
        return
    if "/" not in name and name.lower().startswith("qwen"):
        name = f"Qwen/{name}"
    elif "/" not in name:
        result.notes.append(
            f"model {name!r:.80} is unknown: name its hub id in custom_model, or put it into "
            "custom_models.json"
        )
    result.values["custom_model"] = name


def _gguf(name: str) -> tuple[str, str] | None:
    """What a GGUF file was made of, and the quantization nearest to it; None: it is none."""
    found = _GGUF.search(name)
    if found is None:
        return ("", "4bit") if "gguf" in name.lower() else None
    bits = found["bits"]
    quantization = "none" if bits is None else "8bit" if int(bits) > 5 else "4bit"
    # Qwen's own files leave out a hyphen of the model's name.
    base = re.sub(r"(?i)^(qwen[\d.]+)vl-", r"\1-VL-", found["base"])
    return base.rstrip("-"), quantization


def _letters(value: Any) -> str:
    return " ".join(re.findall("[a-z]+", str(value).lower()))


def _set_preset(result: TranslatedNode, name: str, value: Any) -> None:
    if not isinstance(value, str):
        _set(result, "preset", value)  # which says that it cannot be
        return
    if value in PRESETS:
        preset, prompt = value, ""
    elif _letters(value) in old_packs.OLD_PRESETS:
        preset, prompt = old_packs.OLD_PRESETS[_letters(value)]
        if prompt:
            result.notes.append(f"{name} {value!r:.60}: prompt says it in words of our own")
    else:  # the first version's presets were the questions themselves
        preset, prompt = NO_PRESET, value
    _set(result, "preset", preset)
    _set(result, "prompt", prompt)


def is_known(old: OldNode, names: Iterable[str]) -> bool:
    """Whether inputs of these names can be this node's, not those of a namesake: most are known."""
    own = {*old.pictures, old.frames, old.video, *old_packs.FILE_INPUTS}.union(*old.layouts)
    given = set(names)
    return 2 * len(given & own) >= len(given)
