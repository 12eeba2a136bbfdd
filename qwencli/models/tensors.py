"""The tensors a checkpoint of a given shape holds: names and shapes, without loading anything.

Names are those of transformers 5's state dict. Hub files of older families name the same
tensors differently; `canonical_name` maps every layout seen on the hub to these names.
"""

from __future__ import annotations

from math import prod

from qwencli.models.shapes import ModelShape
from qwencli.models.weight_specs import specs

TensorShapes = dict[str, tuple[int, ...]]

# (prefix in the file, canonical prefix); the first that fits is used. Vision models only.
_VISION_LAYOUTS = (
    ("model.language_model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("visual.", "model.visual."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("model.", "model.language_model."),
)


def expected_tensors(shape: ModelShape) -> TensorShapes:
    """Name -> shape of every parameter; a tied `lm_head` is not listed, it is not stored."""
    prefix = {"text": "model.language_model." if shape.vision else "model."}
    prefix |= {"vision": "model.visual.", "root": ""}
    parts = (part for spec in specs(shape) for part in spec.parts)
    return {prefix[part.section] + part.name: part.shape for part in parts}


def parameter_count(shape: ModelShape) -> int:
    """Number of parameters, tied weights counted once."""
    return sum(prod(size) for size in expected_tensors(shape).values())


def canonical_name(name: str, shape: ModelShape) -> str:
    """The state-dict name of a tensor that a file calls `name`."""
    if shape.vision is None:
        return name
    for stored, canonical in _VISION_LAYOUTS:
        if name.startswith(stored):
            return canonical + name.removeprefix(stored)
    return name


def is_quantizable(name: str, size: tuple[int, ...]) -> bool:
    """Whether bitsandbytes replaces this tensor: the weight of a linear layer, not `lm_head`.

    Source: `replace_with_bnb_linear` and `get_modules_to_not_convert` of transformers, which
    convert every `nn.Linear` but the output embedding. Embeddings are two-dimensional as well.
    """
    return len(size) == 2 and not name.endswith(
        ("embed_tokens.weight", "pos_embed.weight", "lm_head.weight")
    )
