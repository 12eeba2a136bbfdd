"""The Qwen families the transformers engine can build, by `model_type` of config.json."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwencli.errors import ModelFileError


@dataclass(frozen=True)
class Family:
    """`model_class` and `config_class` are names in the transformers package."""

    model_class: str
    config_class: str


FAMILIES = {
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", "Qwen3VLConfig"),
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig"),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", "Qwen2VLConfig"),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config"),
}


def family_of(model_type: str) -> Family:
    """Raises ModelFileError for a `model_type` outside the table."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise ModelFileError(
            f"model_type {model_type!r} is not a Qwen model this version knows",
            f"known: {', '.join(sorted(FAMILIES))}",
        ) from None


def skeleton(model_class: Any, config: Any) -> Any:
    """The model without its weights, to look at its modules and shapes."""
    import torch

    with torch.device("meta"):
        return model_class(config)


def build_config(hub_config: Mapping[str, Any]) -> Any:
    """The transformers configuration object for the contents of a config.json."""
    import transformers

    family = family_of(hub_config["model_type"])
    try:
        return getattr(transformers, family.config_class).from_dict(copy.deepcopy(dict(hub_config)))
    # Its checks raise what they like, and what has no check raises what happens to come of it.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelFileError(
            f"config.json cannot be read by transformers: {' '.join(lines)[:300]}",
            "download the model's files again",
        ) from error
