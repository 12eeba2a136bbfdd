"""Reads the sizes of a model out of its config.json, whichever family wrote it.

The one place that knows where a family keeps a size; everything that plans memory or checks
weights works on `ModelShape`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwencli.errors import ModelFileError
from qwencli.models.families import FAMILIES, Family, VisionFamily, supported

# Far above any model, far below what would keep a check busy for minutes.
_MOST = 10**7
_MOST_LAYERS = 1000
_AGAIN = "this config.json does not describe a complete model; download it again"


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower. Indexes count blocks from 0; sizes in pixels or features.

    `num_position_embeddings` and `window_size` are 0, the index tuples empty, where the family
    has no such thing.
    """

    depth: int
    hidden: int
    heads: int
    intermediate: int
    out_hidden: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    num_position_embeddings: int = 0
    deepstack_indexes: tuple[int, ...] = ()
    window_size: int = 0
    full_attention_indexes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model: its decoder and, for vision models, its tower.

    `family` says how tensors are named; `head_dim` is per head and need not be hidden / heads.
    `tied` models use the embedding as output projection and store no `lm_head`.
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    vision: VisionShape | None = None


def read_shape(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """Sizes of the model that `config` (the contents of a config.json) describes.

    Args:
        where: the file, for the error line.

    Raises:
        ModelFileError: an unsupported `model_type`, or a size that is missing or impossible.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        said = (
            f"model_type {model_type!r}"[:60] + " is not supported"
            if model_type
            else "no model_type"
        )
        raise ModelFileError(f"{where}: {said}", f"supported are: {supported()}")
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    hidden = _size(text, "hidden_size", where)
    heads = _size(text, "num_attention_heads", where)
    return ModelShape(
        family=family,
        layers=_size(text, "num_hidden_layers", where),
        hidden=hidden,
        heads=heads,
        kv_heads=_size(text, "num_key_value_heads", where, heads),
        head_dim=_size(text, "head_dim", where, family.head_dim or hidden // heads),
        intermediate=_size(text, "intermediate_size", where),
        vocab=_size(text, "vocab_size", where),
        tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        vision=_read_vision(family.vision, config, where) if family.vision else None,
    )


def _read_vision(vision: VisionFamily, config: Mapping[str, Any], where: str) -> VisionShape:
    section = config.get("vision_config")
    if not isinstance(section, Mapping):
        raise ModelFileError(
            f"{where}: vision_config is missing or not an object",
            "a vision model's config.json states its vision tower; download the file again",
        )
    place = f"{where}: vision_config"
    sizes: dict[str, Any] = {}
    for name, key in vision.keys.items():
        default = vision.defaults.get(name)
        if name.endswith("_indexes"):
            sizes[name] = _indexes(section, key, place, default or ())
        elif name not in ("intermediate", "mlp_ratio"):
            sizes[name] = _size(section, key, place, default)
    if "mlp_ratio" in vision.keys:
        ratio = _size(section, "mlp_ratio", place, vision.defaults["mlp_ratio"])
        sizes["intermediate"] = sizes["hidden"] * ratio
    else:
        default = vision.defaults["intermediate"]
        sizes["intermediate"] = _size(section, vision.keys["intermediate"], place, default)
    return VisionShape(**sizes)


def _size(section: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = section.get(key)
    value = default if value is None else value
    most = _MOST_LAYERS if key in ("num_hidden_layers", "depth") else _MOST
    if type(value) is not int or not 1 <= value <= most:
        said = "is missing" if value is None else f"is {value!r}"[:60]
        raise ModelFileError(
            f"{where}: {key} {said}, expected a whole number from 1 to {most}", _AGAIN
        )
    return value


def _indexes(
    section: Mapping[str, Any], key: str, where: str, default: tuple[int, ...]
) -> tuple[int, ...]:
    value = section.get(key)
    value = default if value is None else value
    if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
        said = f"is {value!r}"[:60]
        raise ModelFileError(f"{where}: {key} {said}, expected a list of whole numbers", _AGAIN)
    return tuple(value)
