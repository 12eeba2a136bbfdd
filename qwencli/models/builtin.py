"""Built-in models: alias -> hub id and a config.json with the model's true shapes.

`hub_config` is what makes `--load-format dummy` possible: a model of the right size from
nothing but this table. See `catalog` for the sizes and how each was verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from qwencli.config import ModelSource, ModelSpec
from qwencli.models.catalog import DECODERS, ENTRIES, TOWERS, Decoder, Entry
from qwencli.models.families import FAMILIES, VisionFamily

BUILTINS: Mapping[str, Entry] = {entry.alias: entry for entry in ENTRIES}
_BY_REPO: Mapping[str, Entry] = {entry.repo_id.lower(): entry for entry in ENTRIES}
_OWNER = "qwen/"


def find_builtin(name: str) -> Entry | None:
    """The entry with this alias or hub id ("Qwen/" may be left out), in any case; else None."""
    key = name.lower()
    return BUILTINS.get(key) or _BY_REPO.get(key) or _BY_REPO.get(_OWNER + key)


def builtin_spec(entry: Entry) -> ModelSpec:
    """A built-in as a ModelSpec, without asking whether it is on this machine."""
    return ModelSpec(
        name=entry.alias,
        source=ModelSource.BUILTIN,
        repo_id=entry.repo_id,
        hub_config=hub_config(entry.alias),
    )


def hub_config(alias: str) -> dict[str, Any]:
    """The model's config.json as the hub lays it out, from the table of sizes.

    Two keys that change nothing while `use_sliding_window` is false are uniform here:
    `sliding_window` is null and `max_window_layers` is the number of layers.

    Raises:
        KeyError: `alias` is not a built-in (callers look names up with `find_builtin`).
    """
    entry = BUILTINS[alias]
    family = FAMILIES[entry.model_type]
    decoder = DECODERS[entry.decoder]
    text = {**deepcopy(dict(family.text_config)), **_text_sizes(decoder)}
    if family.head_dim is not None:
        text["head_dim"] = decoder.head_dim
    if "use_sliding_window" in text:
        text["max_window_layers"] = decoder.layers
    config: dict[str, Any] = {"architectures": [family.architecture], **family.top_config}
    config |= {"text_config": text} if family.nested else text
    config["model_type"] = family.model_type
    config["tie_word_embeddings"] = decoder.tied
    if family.vision is not None:
        config["vision_config"] = _vision_config(family.vision, TOWERS[entry.tower], decoder.hidden)
    return config


def _text_sizes(decoder: Decoder) -> dict[str, Any]:
    return {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "tie_word_embeddings": decoder.tied,
        "vocab_size": decoder.vocab,
    }


def _vision_config(
    vision: VisionFamily, tower: Mapping[str, Any], out_hidden: int
) -> dict[str, Any]:
    sizes = {**tower, "out_hidden": out_hidden}
    written = {
        vision.keys[name]: list(value) if isinstance(value, tuple) else value
        for name, value in sizes.items()
    }
    return {**deepcopy(dict(vision.config)), **written}
