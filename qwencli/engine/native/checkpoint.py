"""Finds the tensors of a model in a checkpoint, and says what is missing, of another shape, or
there for nothing. Reads no values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwencli.engine.native.reader import AGAIN, FLOATS
from qwencli.errors import ModelFileError
from qwencli.models.packing import PackedFormat, PackedLayer, packed_layer
from qwencli.models.safetensors_header import StoredTensor
from qwencli.models.weight_specs import PREFIXES, PROBES, Part, Section, TensorSpec
from qwencli.models.weights import all_named

# A tensor as it is, or a linear layer packed in a way of its own.
Source = StoredTensor | PackedLayer

# Found in checkpoints and of no use: a tied head (checked), frequencies that follow from the base,
# scales for caches of fewer bits.
_IDLE = ("lm_head.weight", "rotary_emb.inv_freq", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class Checkpoint:
    """Where everything is.

    Args:
        sources: of each part of a tensor.
        unused: names of tensors of no use.
        zero_biases: biases that packed layers have and the model does not; they have to be zero.
            AutoGPTQ wrote them for every layer.
    """

    sources: Mapping[Part, Source]
    unused: tuple[str, ...]
    zero_biases: tuple[StoredTensor, ...]


def find_sources(
    wanted: tuple[TensorSpec, ...],
    stored: Mapping[str, StoredTensor],
    packed: PackedFormat | None,
    folder: Path,
) -> Checkpoint:
    """Find each part of the wanted tensors in this checkpoint.

    Args:
        packed: how its layers may be packed.

    Raises:
        ModelFileError: tensors that are missing, of another shape or an unknown type, or of no
            model of this shape (all named).
    """
    prefix = {section: prefix_of(section, stored) for section in PREFIXES}
    names = {part: prefix[part.section] + part.name for spec in wanted for part in spec.parts}
    layers = {
        part: layer
        for part, name in names.items()
        if (layer := packed_layer(name, part.shape, stored, packed))
    }
    plain = {part: name for part, name in names.items() if part not in layers}
    missing = [name for name in plain.values() if name not in stored]
    missing += [name for layer in layers.values() for name in layer.missing]
    if missing:
        raise ModelFileError(f"{folder} lacks {len(missing)} tensors: {all_named(missing)}", AGAIN)
    _check_plain({part: stored[name] for part, name in plain.items()}, folder)
    used = {*plain.values()}
    used |= {tensor.name for layer in layers.values() for tensor in layer.tensors.values()}
    unused = sorted(stored.keys() - used)
    biases = {f"{layer.layer}.bias" for layer in layers.values()}
    _check_extra([name for name in unused if name not in biases], folder)
    return Checkpoint(
        {**layers, **{part: stored[name] for part, name in plain.items()}},
        tuple(unused),
        tuple(stored[name] for name in unused if name in biases),
    )


def prefix_of(section: Section, stored: Mapping[str, StoredTensor]) -> str:
    """What names of a section begin with in this checkpoint."""
    for prefix in PREFIXES[section]:
        if prefix + PROBES[section] in stored:
            return prefix
    return PREFIXES[section][0]


def _check_plain(found: Mapping[Part, StoredTensor], folder: Path) -> None:
    misfits = [
        f"{tensor.name} is {list(tensor.shape)}, config.json asks for {list(part.shape)}"
        for part, tensor in found.items()
        if tensor.shape != part.shape
    ]
    if misfits:
        raise ModelFileError(
            f"{folder}: {'; '.join(misfits)}", "weights and config.json belong to different models"
        )
    types = [f"{t.name} is {t.dtype}" for t in found.values() if t.dtype not in FLOATS]
    if types:
        raise ModelFileError(
            f"{folder}: {'; '.join(types)}; the native engine reads {', '.join(FLOATS)}, and what "
            "the quantization_config of config.json describes",
            "use another version of the model, or try --engine transformers",
        )


def _check_extra(unused: list[str], folder: Path) -> None:
    """Weights that a model has and we would not use make it another model."""
    extra = [name for name in unused if not name.endswith(_IDLE)]
    if extra:
        raise ModelFileError(
            f"{folder} has {len(extra)} tensors that config.json does not describe: "
            f"{all_named(extra)}",
            "they belong to different models; --engine transformers ignores such tensors",
        )
