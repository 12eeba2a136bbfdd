"""The bundled model; and built-in ones: alias -> hub id and a config.json with true shapes.

`hub_config` is what makes `--load-format dummy` possible: a model of the right size from
nothing but this table.

How each row of the table was verified (each also: tensor list and parameter count against the model
that transformers builds from it, see tests/models/test_builtin.py):

- Qwen3-VL-4B and Qwen2.5-VL-3B: compared with the hub's own config.json, key by key.
- Qwen3-VL-2B, 8B, 32B: torchtitan's `qwen3_vl` presets (2B, 8B) and a copy of the 32B's
  config.json in another project's tests; the 8B's 8.767 B parameters match the checkpoint.
- Qwen3 and Qwen2.5 text: torchtune's model builders, which state each size of both families.
- Qwen2.5-VL-7B, 32B, 72B: the decoders are Qwen2.5's; vision widths from the Qwen2.5-VL report's
  table and published module listings (the 3B and 7B use 3420 in the vision MLP, the larger 3456).
- Qwen2-VL: the decoders are Qwen2's 1.5B, 7B and 72B; one vision tower for all, from published
  module listings and the defaults of transformers' config class.
- Qwen3.5-0.8B: compared with the hub's own config.json, key by key; the other sizes of that class:
  published configurations of each size, and the sizes that transformers' class has by default (9B).
  Qwen3.6-27B and Qwen3.8-27B have the shape of Qwen3.5-27B. MTP heads are counted where used.
- Qwen3-30B-A3B, Qwen3-VL-30B-A3B and Qwen3.5-35B-A3B: published configurations, and what
  transformers' classes have by default; Qwen3.6-35B-A3B has the shape of Qwen3.5-35B-A3B.
- Thinking variants have the shape of their Instruct sibling.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import qwencli
from qwencli.config import ModelSource, ModelSpec
from qwencli.models.families import FAMILIES, VisionFamily

BUNDLED_NAME = "scenes"


def bundled_folder() -> Path:
    """Where the package keeps its own model."""
    return Path(qwencli.__file__).parent / "bundled" / BUNDLED_NAME


class Experts(NamedTuple):
    """Sizes of a mixture of experts; `shared`: of the one that all tokens take."""

    among: int
    chosen: int
    width: int
    shared: int = 0


class Decoder(NamedTuple):
    """Sizes of a text decoder; head_dim is given because Qwen3's is not hidden / heads.

    `delta_heads`: of queries and keys, and of values, in gated delta nets; None without any.
    `intermediate` is 0 where config.json has none, as every feed-forward is a mixture of experts.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    delta_heads: tuple[int, int] | None = None
    experts: Experts | None = None


DECODERS: Mapping[str, Decoder] = {
    "qwen2-0.5b": Decoder(24, 896, 14, 2, 64, 4864, 151936, True),
    "qwen2-1.5b": Decoder(28, 1536, 12, 2, 128, 8960, 151936, True),
    "qwen2-3b": Decoder(36, 2048, 16, 2, 128, 11008, 151936, True),
    "qwen2-7b": Decoder(28, 3584, 28, 4, 128, 18944, 152064, False),
    "qwen2-14b": Decoder(48, 5120, 40, 8, 128, 13824, 152064, False),
    "qwen2-32b": Decoder(64, 5120, 40, 8, 128, 27648, 152064, False),
    "qwen2-72b": Decoder(80, 8192, 64, 8, 128, 29568, 152064, False),
    "qwen3-0.6b": Decoder(28, 1024, 16, 8, 128, 3072, 151936, True),
    "qwen3-1.7b": Decoder(28, 2048, 16, 8, 128, 6144, 151936, True),
    "qwen3-4b": Decoder(36, 2560, 32, 8, 128, 9728, 151936, True),
    "qwen3-8b": Decoder(36, 4096, 32, 8, 128, 12288, 151936, False),
    "qwen3-14b": Decoder(40, 5120, 40, 8, 128, 17408, 151936, False),
    "qwen3-32b": Decoder(64, 5120, 64, 8, 128, 25600, 151936, False),
    "qwen3.5-0.8b": Decoder(24, 1024, 8, 2, 256, 3584, 248320, True, (16, 16)),
    "qwen3.5-2b": Decoder(24, 2048, 8, 2, 256, 6144, 248320, True, (16, 16)),
    "qwen3.5-4b": Decoder(32, 2560, 16, 4, 256, 9216, 248320, True, (16, 32)),
    "qwen3.5-9b": Decoder(32, 4096, 16, 4, 256, 12288, 248320, False, (16, 32)),
    "qwen3.5-27b": Decoder(64, 5120, 24, 4, 256, 17408, 248320, False, (16, 48)),
    "qwen3-30b-a3b": Decoder(
        48, 2048, 32, 4, 128, 6144, 151936, False, experts=Experts(128, 8, 768)
    ),
    "qwen3.5-35b-a3b": Decoder(
        40, 2048, 16, 2, 256, 0, 248320, False, (16, 32), Experts(256, 8, 512, 512)
    ),
}
# Of all gated delta nets: dimensions of a head of keys and of values, inputs of the convolution.
_DELTA = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}

# Vision towers by the names of `families.VisionFamily.keys`; the output width is the decoder's.
_TOWER = {"heads": 16, "temporal_patch_size": 2, "spatial_merge_size": 2}
_TOWER_3 = {**_TOWER, "patch_size": 16, "num_position_embeddings": 2304}
_TOWER_2_5 = {
    **_TOWER,
    "depth": 32,
    "hidden": 1280,
    "patch_size": 14,
    "window_size": 112,
    "full_attention_indexes": (7, 15, 23, 31),
}
TOWERS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-vl-s": {
        **_TOWER_3,
        "depth": 24,
        "hidden": 1024,
        "intermediate": 4096,
        "deepstack_indexes": (5, 11, 17),
    },
    "qwen3-vl-l": {
        **_TOWER_3,
        "depth": 27,
        "hidden": 1152,
        "intermediate": 4304,
        "deepstack_indexes": (8, 16, 24),
    },
    "qwen2.5-vl-s": {**_TOWER_2_5, "intermediate": 3420},
    "qwen2.5-vl-l": {**_TOWER_2_5, "intermediate": 3456},
    "qwen3.5-xs": {
        **_TOWER_3,
        "depth": 12,
        "hidden": 768,
        "heads": 12,
        "intermediate": 3072,
    },
    "qwen3.5-s": {**_TOWER_3, "depth": 24, "hidden": 1024, "intermediate": 4096},
    "qwen3.5-l": {**_TOWER_3, "depth": 27, "hidden": 1152, "intermediate": 4304},
    "qwen2-vl": {**_TOWER, "depth": 32, "hidden": 1280, "mlp_ratio": 4, "patch_size": 14},
}


@dataclass(frozen=True)
class Entry:
    """One built-in model: its alias, hub repository and where its sizes are."""

    alias: str
    repo_id: str
    model_type: str
    decoder: str
    tower: str = ""


def _entry(repo: str, model_type: str, decoder: str, tower: str = "") -> Entry:
    alias = repo.lower().removesuffix("-instruct")
    return Entry(alias, f"Qwen/{repo}", model_type, decoder, tower)


# Best first within the vision families: `resolve` picks the first one that is here and fits.
ENTRIES: tuple[Entry, ...] = (
    _entry("Qwen3.8-27B", "qwen3_5", "qwen3.5-27b", "qwen3.5-l"),
    _entry("Qwen3.6-27B", "qwen3_5", "qwen3.5-27b", "qwen3.5-l"),
    _entry("Qwen3.5-27B", "qwen3_5", "qwen3.5-27b", "qwen3.5-l"),
    _entry("Qwen3.6-35B-A3B", "qwen3_5_moe", "qwen3.5-35b-a3b", "qwen3.5-l"),
    _entry("Qwen3.5-35B-A3B", "qwen3_5_moe", "qwen3.5-35b-a3b", "qwen3.5-l"),
    _entry("Qwen3-VL-32B-Instruct", "qwen3_vl", "qwen3-32b", "qwen3-vl-l"),
    _entry("Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe", "qwen3-30b-a3b", "qwen3-vl-l"),
    _entry("Qwen3.5-9B", "qwen3_5", "qwen3.5-9b", "qwen3.5-l"),
    _entry("Qwen3-VL-8B-Instruct", "qwen3_vl", "qwen3-8b", "qwen3-vl-l"),
    _entry("Qwen3.5-4B", "qwen3_5", "qwen3.5-4b", "qwen3.5-s"),
    _entry("Qwen3-VL-4B-Instruct", "qwen3_vl", "qwen3-4b", "qwen3-vl-s"),
    _entry("Qwen3.5-2B", "qwen3_5", "qwen3.5-2b", "qwen3.5-s"),
    _entry("Qwen3-VL-2B-Instruct", "qwen3_vl", "qwen3-1.7b", "qwen3-vl-s"),
    _entry("Qwen3.5-0.8B", "qwen3_5", "qwen3.5-0.8b", "qwen3.5-xs"),
    _entry("Qwen3-VL-32B-Thinking", "qwen3_vl", "qwen3-32b", "qwen3-vl-l"),
    _entry("Qwen3-VL-30B-A3B-Thinking", "qwen3_vl_moe", "qwen3-30b-a3b", "qwen3-vl-l"),
    _entry("Qwen3-VL-8B-Thinking", "qwen3_vl", "qwen3-8b", "qwen3-vl-l"),
    _entry("Qwen3-VL-4B-Thinking", "qwen3_vl", "qwen3-4b", "qwen3-vl-s"),
    _entry("Qwen3-VL-2B-Thinking", "qwen3_vl", "qwen3-1.7b", "qwen3-vl-s"),
    _entry("Qwen2.5-VL-72B-Instruct", "qwen2_5_vl", "qwen2-72b", "qwen2.5-vl-l"),
    _entry("Qwen2.5-VL-32B-Instruct", "qwen2_5_vl", "qwen2-32b", "qwen2.5-vl-l"),
    _entry("Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", "qwen2-7b", "qwen2.5-vl-s"),
    _entry("Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", "qwen2-3b", "qwen2.5-vl-s"),
    _entry("Qwen2-VL-72B-Instruct", "qwen2_vl", "qwen2-72b", "qwen2-vl"),
    _entry("Qwen2-VL-7B-Instruct", "qwen2_vl", "qwen2-7b", "qwen2-vl"),
    _entry("Qwen2-VL-2B-Instruct", "qwen2_vl", "qwen2-1.5b", "qwen2-vl"),
    _entry("Qwen3-32B", "qwen3", "qwen3-32b"),
    _entry("Qwen3-30B-A3B", "qwen3_moe", "qwen3-30b-a3b"),
    _entry("Qwen3-14B", "qwen3", "qwen3-14b"),
    _entry("Qwen3-8B", "qwen3", "qwen3-8b"),
    _entry("Qwen3-4B", "qwen3", "qwen3-4b"),
    _entry("Qwen3-1.7B", "qwen3", "qwen3-1.7b"),
    _entry("Qwen3-0.6B", "qwen3", "qwen3-0.6b"),
    _entry("Qwen2.5-32B-Instruct", "qwen2", "qwen2-32b"),
    _entry("Qwen2.5-14B-Instruct", "qwen2", "qwen2-14b"),
    _entry("Qwen2.5-7B-Instruct", "qwen2", "qwen2-7b"),
    _entry("Qwen2.5-3B-Instruct", "qwen2", "qwen2-3b"),
    _entry("Qwen2.5-1.5B-Instruct", "qwen2", "qwen2-1.5b"),
    _entry("Qwen2.5-0.5B-Instruct", "qwen2", "qwen2-0.5b"),
)


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
    heads: dict[str, Any] = {}
    if decoder.delta_heads is not None:
        keys, values = decoder.delta_heads
        heads = {"linear_num_key_heads": keys, "linear_num_value_heads": values, **_DELTA}
    experts: dict[str, Any] = {}
    if decoder.experts is not None:
        among, chosen, width, shared = decoder.experts
        experts = {
            "num_experts": among,
            "num_experts_per_tok": chosen,
            "moe_intermediate_size": width,
        }
        if shared:
            experts["shared_expert_intermediate_size"] = shared
    if decoder.intermediate:
        experts["intermediate_size"] = decoder.intermediate
    return {
        **heads,
        **experts,
        "hidden_size": decoder.hidden,
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
