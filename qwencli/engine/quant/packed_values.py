"""What the formats of ready-made checkpoints have in common: words of several values, groups of
columns, and how a mistake is told."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme, pack
from qwencli.errors import ModelFileError
from qwencli.models.quant_formats import GROUPS, PackedLayer

Tensor = torch.Tensor
Parts = Mapping[str, Tensor]

WORD_BITS = 32


def values_of(words: Tensor, bits: int, places: Tensor | None = None) -> Tensor:
    """The values of int32 words [N, M], the lowest bits first: int32 [N, M x 32 / bits].

    Args:
        places: which place of a word each of its values has; None = in order.
    """
    shifts = torch.arange(0, WORD_BITS, bits, device=words.device, dtype=torch.int32)
    shifts = shifts if places is None else shifts[places]
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def grouped(
    layer: PackedLayer,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_of: Tensor | None = None,
) -> QuantizedTensor:
    """The matrix of w = scale x (q - zero), all of them unsigned: q [rows, columns], scales and
    zeros [rows, groups].

    Args:
        group_of: int32 [columns], each column's group; None = groups in order.
    """
    columns = layer.shape[1]
    groups = scales.shape[1]
    size = block_size(columns, groups)
    if size is None or columns % size:
        raise unreadable(layer, f"has {groups} groups, which do not divide {columns} columns")
    group = group_within(columns, size)
    if group is None:
        raise unreadable(
            layer, f"has groups of {size} in {columns} columns, which no group of ours divides"
        )
    order = None
    if group_of is not None:
        in_order = torch.arange(columns, device=q.device) // size
        if not torch.equal(group_of.long(), in_order):
            order = group_of.long().argsort(stable=True)
            if not torch.equal(group_of.long()[order], in_order):
                raise unreadable(layer, f"has groups (g_idx) that are not {size} columns each")
            q = q[:, order]
            order = order.int()
    # float16 holds every zero, and our kernels any float type of scales.
    scale, zero = (t.repeat_interleave(size // group, 1).contiguous() for t in (scales, zeros))
    if bits == 4:
        return QuantizedTensor(
            Scheme.INT4, pack(q.int().contiguous()), scale, zero.half(), g_idx_sort_indices=order
        )
    # Symmetric values need no zero.
    centre = None if bool((zero == 128).all()) else (zero - 128).half()
    data = (q - 128).to(torch.int8).contiguous()
    return QuantizedTensor(Scheme.INT8, data, scale, centre, g_idx_sort_indices=order)


def bits_of(layer: PackedLayer) -> int:
    if layer.bits not in (4, 8):
        raise unreadable(layer, f"has {layer.bits} bits a value; 4 and 8 are read")
    return layer.bits


def scales_by_rows(layer: PackedLayer, scales: Tensor) -> Tensor:
    """[], [1], [rows] or [rows, groups] -> [rows, groups]."""
    rows = layer.shape[0]
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(rows, 1)
    if len(scales) != rows or scales.dim() > 2:
        raise unreadable(layer, f"has scales or zeros {list(scales.shape)} for {rows} rows")
    return scales.view(rows, -1)


def block_size(size: int, count: int) -> int | None:
    """How much of `size` each of `count` blocks covers, the last one perhaps less.

    Formats use powers of two, or all of it; anything else has to divide it.
    """
    if count == 1:
        return size
    powers = (1 << power for power in range(size.bit_length()))
    found = next((block for block in powers if -(-size // block) == count), None)
    return found or (size // count if count and size % count == 0 else None)


def group_within(columns: int, size: int) -> int | None:
    """Columns of a group of ours, a part of `size` and of all columns."""
    return next((group for group in GROUPS if size % group == 0 == columns % group), None)


def expect(layer: PackedLayer, parts: Parts, name: str, shape: tuple[int, ...]) -> None:
    if tuple(parts[name].shape) != shape:
        raise unreadable(
            layer,
            f"has {name} {list(parts[name].shape)}, expected {list(shape)}",
            "weights and config.json belong to different models",
        )


def unfit(layer: PackedLayer, parts: Parts, *names: str) -> ModelFileError:
    shapes = " and ".join(f"{name} {list(parts[name].shape)}" for name in names)
    return unreadable(layer, f"has {shapes}, which do not fit a matrix {list(layer.shape)}")


def unreadable(layer: PackedLayer, what: str, hint: str = "") -> ModelFileError:
    return ModelFileError(
        f"{layer.layer} {what}",
        hint or "use another version of the model, or try --engine transformers",
    )
