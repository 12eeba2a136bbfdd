"""Finds the tensors of a model in a checkpoint, and says what is missing, of another shape, there
for nothing, or laid out in a way of its own. Reads no values but those of a head that is tied.

Both engines load only what passes here: a checkpoint of which a tensor is left over, or missing, is
another model than config.json says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwencli.errors import ModelFileError
from qwencli.models.quant_formats import (
    UNPACKED,
    PackedFormat,
    PackedLayer,
    packed_layer,
    scheme_named_by,
)
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import (
    HEAD,
    Part,
    TensorSpec,
    canonical_tensors,
    count_experts,
    embedding_name,
    in_draft_head,
    part_name,
    specs,
    with_experts_as_stored,
)
from qwencli.models.weight_files import StoredTensor, all_named, some

# A tensor as it is, or a linear layer packed in a way of its own.
Source = StoredTensor | PackedLayer

AGAIN = "download the model again"
_OTHERS = "config.json and the weights are of different models; download both again"
# Found in checkpoints and of no use: what follows from the shape, scales for caches of fewer bits,
# the mark of ComfyUI's scaled files.
_IDLE = re.compile(
    r"(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|\.position_ids|\.[kv]_scale|^scaled_fp8)$"
)
_NO_DRAFTS = "use --speculate off, or download the model again, whole"
_COMPARED_BYTES = 16 * 2**20

# Names that only files of another layout have -> what such a file is, and what to do.
_LAYOUTS: Sequence[tuple[str, str, str]] = (
    (
        r"(^|\.)(lora|lokr|hada|oft|ia3|dora)_|\.(base_layer|modules_to_save|original_module)\."
        r"|^base_model\.model\.",
        "the weights of a PEFT model or adapter that is not merged",
        "merge it first (PEFT: merge_and_unload(), then save_pretrained()) and give that folder",
    ),
    (
        r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|\b_?flat_param",
        "weights saved from inside FSDP or activation checkpointing",
        "save the model's full state dict under its own names, with save_pretrained()",
    ),
    (
        r"(^|\.)_orig_mod\.",
        "weights saved from a model that torch.compile wrapped",
        "save the model inside it: model._orig_mod.save_pretrained()",
    ),
    (
        r"(^|\.)(_forward_)?module\.",
        "weights saved from inside DDP or DeepSpeed, under names with 'module.'",
        "save the model inside it: model.module.save_pretrained()",
    ),
    (
        r"^(model\.)?vision_tower\.|\.biases$",
        "weights in MLX's layout",
        "use the original version of the model, or one quantized for GPUs (AWQ, GPTQ, fp8)",
    ),
    (
        r"^(blk\.\d+|token_embd|v\.blk\.\d+)\.",
        "weights under GGUF's names",
        "use the original version of the model in safetensors",
    ),
    (
        r"^(tok_embeddings|layers\.\d+\.attention|decoder\.layers|transformer\.h|embedding)\.",
        "weights under names of another library",
        "convert them to transformers' layout, or use the original version of the model",
    ),
    (
        r"^(state_dict|model_state_dict|optimizer|ema|diffusion_model|first_stage_model)\.",
        "a training state or another kind of model",
        "give the folder that save_pretrained() wrote",
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """Where everything is.

    Args:
        shape: of the model, its head tied as the weights have it.
        sources: of each part of a tensor.
        unused: names of tensors of no use.
        zero_biases: biases that packed layers have and the model does not; they have to be zero.
            AutoGPTQ wrote them for every layer.
    """

    shape: ModelShape
    sources: Mapping[Part, Source]
    unused: tuple[str, ...]
    zero_biases: tuple[StoredTensor, ...]

    def size_bytes(self, spec: TensorSpec) -> int:
        """Bytes that the files hold of a tensor."""
        sources = [self.sources[part] for part in spec.parts]
        return sum(
            tensor.size_bytes
            for source in sources
            for tensor in (
                [source] if isinstance(source, StoredTensor) else source.tensors.values()
            )
        )


def find_sources(
    shape: ModelShape,
    stored: Mapping[str, StoredTensor],
    packed: PackedFormat | None,
    folder: Path,
) -> Checkpoint:
    """Find each part of the model's tensors in this checkpoint.

    Args:
        packed: how its layers may be packed.

    Raises:
        ModelFileError: tensors that are missing, of another shape or an unknown type, or of no
            model of this shape (named, and counted where they are many); a layout that is not
            that of transformers.
    """
    check_layout(folder, stored)
    found = canonical_tensors(stored, shape)
    shape = with_experts_as_stored(as_stored(shape, found), found)
    _check_experts(shape, found, folder)
    names = {part: part_name(part, shape) for spec in specs(shape) for part in spec.parts}
    sorted_names = sorted(found)
    layers = {
        part: layer
        for part, name in names.items()
        if (layer := packed_layer(name, part.shape, found, sorted_names, packed))
    }
    plain = {part: name for part, name in names.items() if part not in layers}
    missing = [name for name in plain.values() if name not in found]
    missing += [name for layer in layers.values() for name in layer.missing]
    if missing and all(map(in_draft_head, missing)):
        raise _draft_head_error(folder, missing, found)
    if missing:
        raise missing_error(folder, missing, found.keys() - names.values() if not packed else ())
    _check_plain({part: found[name] for part, name in plain.items()}, stored, folder)
    used = {found[name].name for name in plain.values()}
    used |= {tensor.name for layer in layers.values() for tensor in layer.tensors.values()}
    biases = {f"{layer.layer}.bias" for layer in layers.values()}
    zero = [tensor for name, tensor in found.items() if name in biases and tensor.name not in used]
    unused = sorted(stored.keys() - used)
    idle = {bias.name for bias in zero}
    if shape.text.tied_head and HEAD in found:
        idle.add(found[HEAD].name)  # it is the embedding
    extra = [name for name in unused if name not in idle and not is_idle(name)]
    if extra:
        raise extra_error(folder, extra)
    unread = [name for name in unused if name not in idle and not _IDLE.search(name)]
    if shape.text.draft_head and unread:
        raise ModelFileError(
            f"{folder}: the head that drafts tokens (MTP) is of another kind, with "
            f"{_count(unread, 'tensor')} not known here: {all_named(unread)}",
            "use --speculate off",
        )
    return Checkpoint(
        shape,
        {**layers, **{part: found[name] for part, name in plain.items()}},
        tuple(unused),
        tuple(zero),
    )


def check_layout(folder: Path, names: Iterable[str]) -> None:
    """Raise ModelFileError for names that only files of another layout have."""
    names = list(names)
    for pattern, what, hint in _LAYOUTS:
        hits = list(filter(re.compile(pattern).search, names))
        if hits:
            raise ModelFileError(f"{folder}: {what} ({all_named(hits[:1])})", hint)


def is_idle(name: str) -> bool:
    """Whether a tensor of this name is of no use to a model that drafts no tokens."""
    return in_draft_head(name) or _IDLE.search(name) is not None


def has_draft_head(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names has a head that drafts tokens, or a part."""
    return any(map(in_draft_head, names))


def _draft_head_error(folder: Path, missing: Sequence[str], names: Iterable[str]) -> ModelFileError:
    """For a head that was asked for and lacks these tensors, or all."""
    if not has_draft_head(names):
        return ModelFileError(
            f"{folder}: the weights have no head that drafts tokens (MTP)", _NO_DRAFTS
        )
    return ModelFileError(
        f"{folder}: half of a head that drafts tokens (MTP): {_count(missing, 'tensor')} missing "
        f"from the weights: {all_named(missing)}",
        _NO_DRAFTS,
    )


def as_stored(shape: ModelShape, found: Mapping[str, StoredTensor]) -> ModelShape:
    """The shape with a head of its own where the weights have one that is not the embedding."""
    embedding = found.get(embedding_name(shape))
    if not shape.text.tied_head or embedding is None:
        return shape
    head = found.get(HEAD)
    if head is None:
        own = any(name.startswith("lm_head.") for name in found)
    else:
        own = not _equal(head, embedding)
    return replace(shape, text=replace(shape.text, tied_head=False)) if own else shape


def missing_error(
    folder: Path, missing: Sequence[str], others: Iterable[str] = ()
) -> ModelFileError:
    """For tensors that the weights lack.

    Args:
        others: tensors that are there and not known, which may tell why.
    """
    scheme = scheme_named_by(others)
    if scheme:
        return ModelFileError(
            f"{folder}: {_count(missing, 'tensor')} missing from the weights: "
            f"{all_named(missing)}; there are tensors of {scheme} instead, which the "
            "quantization_config of config.json does not describe",
            "use a version of the model whose config.json is its own",
        )
    hint = f"the weights are incomplete or of another model; {AGAIN}"
    if list(missing) == [HEAD]:
        hint = (
            "if the model's head is its embedding, set tie_word_embeddings to true in config.json; "
            "if not, save the whole model, not its base alone"
        )
    return ModelFileError(
        f"{folder}: {_count(missing, 'tensor')} missing from the weights: {all_named(missing)}",
        hint,
    )


def extra_error(folder: Path, extra: Sequence[str]) -> ModelFileError:
    """For weights that would not be used: the model would be another one without them."""
    scheme = scheme_named_by(extra)
    what = f" (those of {scheme})" if scheme else ""
    return ModelFileError(
        f"{folder}: {_count(extra, 'tensor')} that config.json does not describe{what}: "
        f"{all_named(extra)}",
        "use a version of the model in a format that is read here"
        if scheme
        else "config.json and the weights are of different models; use those that belong together",
    )


def _check_experts(shape: ModelShape, found: Mapping[str, StoredTensor], folder: Path) -> None:
    moe = shape.text.moe
    if moe is None:
        return
    counts = count_experts(found, shape)
    if counts and counts != {moe.num_experts}:
        there = " or ".join(map(str, sorted(counts)))
        raise ModelFileError(
            f"{folder}: config.json says {moe.num_experts} experts a layer, the weights have "
            f"{there}",
            _OTHERS,
        )


def _check_plain(found: Mapping[Part, StoredTensor], stored: Iterable[str], folder: Path) -> None:
    types: dict[str, list[str]] = {}
    for tensor in found.values():
        if tensor.dtype not in UNPACKED:
            types.setdefault(tensor.dtype, []).append(tensor.name)
    if types:
        scheme = scheme_named_by(stored)
        shown = "; ".join(f"{all_named(names)} is {dtype}" for dtype, names in types.items())
        raise ModelFileError(
            f"{folder}: {shown} ({scheme or 'without scales'}); read are {', '.join(UNPACKED)}, "
            "and what the quantization_config of config.json describes",
            "use another version of the model",
        )
    misfits = {
        tensor.name: f"{tensor.name} is {dims(tensor.shape)}, config.json asks for "
        f"{dims(part.shape)}"
        for part, tensor in found.items()
        if tensor.shape != part.shape and not part.is_transposed(tensor.shape)
    }
    if misfits:
        raise ModelFileError(
            f"{folder}: {_count(list(misfits), 'tensor')} of the wrong shape: "
            f"{some(list(misfits.values()), '; ')}",
            _OTHERS,
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape, one.size_bytes) != (other.dtype, other.shape, other.size_bytes):
        return False
    try:
        with one.file.open("rb") as first, other.file.open("rb") as second:
            first.seek(one.start)
            second.seek(other.start)
            left = one.size_bytes
            while left:
                piece = min(left, _COMPARED_BYTES)
                if first.read(piece) != second.read(piece):
                    return False
                left -= piece
    except OSError as error:
        raise ModelFileError(
            f"{one.file}: cannot be read ({error.strerror or error})",
            "check the file's permissions",
        ) from error
    return True


def dims(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _count(items: Sequence[str], noun: str) -> str:
    return f"{len(items)} {noun}" + ("s" if len(items) > 1 else "")
