"""The tensors a checkpoint of a given shape holds: names and shapes, without loading anything.

Names are those of transformers 5's state dict. Hub files of older families name the same
tensors differently; `canonical_name` maps every layout that transformers reads to these names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from qwencli.models.safetensors_header import StoredTensor
from qwencli.models.shapes import ModelShape
from qwencli.models.weight_specs import PREFIXES, Part, Section, specs

TensorShapes = dict[str, tuple[int, ...]]

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def expected_tensors(shape: ModelShape) -> TensorShapes:
    """Name -> shape of every parameter; a tied `lm_head` is not listed, it is not stored."""
    parts = (part for spec in specs(shape) for part in spec.parts)
    return {part_name(part, shape): part.shape for part in parts}


def part_name(part: Part, shape: ModelShape) -> str:
    """Name of a part in the state dict."""
    return _prefix(part.section, shape) + part.name


def embedding_name(shape: ModelShape) -> str:
    return _prefix("text", shape) + EMBEDDING


def _prefix(section: Section, shape: ModelShape) -> str:
    if section == "text":
        return "model.language_model." if shape.vision else "model."
    return "model.visual." if section == "vision" else ""


def parameter_count(shape: ModelShape) -> int:
    """Number of parameters, tied weights counted once."""
    return sum(prod(size) for size in expected_tensors(shape).values())


def renamings(shape: ModelShape) -> dict[str, str]:
    """Pattern of what a name begins with in a file -> what it begins with in the state dict.

    At most one changes a name, and none changes a name of the state dict.
    """
    return {
        "^" + pattern: _prefix(section, shape)
        for section, pattern in PREFIXES.items()
        if section != "vision" or shape.vision is not None
    }


def canonical_name(name: str, shape: ModelShape) -> str:
    """The state-dict name of a tensor that a file calls `name`."""
    for pattern, prefix in renamings(shape).items():
        renamed, count = re.subn(pattern, prefix, name, count=1)
        if count:
            return renamed
    return name


def canonical_tensors(
    stored: Mapping[str, StoredTensor], shape: ModelShape
) -> dict[str, StoredTensor]:
    """A checkpoint's tensors by their names in the state dict.

    Of two that would have one name, the one that is called so keeps it; the other stays as it is.
    Where the one of an embedding and a head that are tied is stored, it is found as the embedding.
    """
    names = {name: canonical_name(name, shape) for name in stored}
    found = {name: stored[name] for name, known in names.items() if name == known}
    for name, known in names.items():
        if name != known:
            found[name if known in found else known] = stored[name]
    if shape.text.tied_head and HEAD in found:
        found.setdefault(embedding_name(shape), found[HEAD])
        if found[embedding_name(shape)] is found[HEAD]:
            del found[HEAD]
    return found


def is_quantizable(name: str, size: tuple[int, ...]) -> bool:
    """Whether bitsandbytes replaces this tensor: the weight of a linear layer, not `lm_head`.

    Source: `replace_with_bnb_linear` and `get_modules_to_not_convert` of transformers, which
    convert every `nn.Linear` but the output embedding. Embeddings are two-dimensional as well.
    """
    return len(size) == 2 and not name.endswith(
        ("embed_tokens.weight", "pos_embed.weight", "lm_head.weight")
    )
