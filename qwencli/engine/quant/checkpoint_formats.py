"""Turns the packed tensors of pre-quantized checkpoints into our `QuantizedTensor`s.

GPTQ, AWQ, compressed-tensors, bitsandbytes and fp8 share words of several values and groups of
columns. Values, scales and zeros are taken over as they are: nothing is rounded anew. Groups of
more than 128 columns become several with the same scale. Where each format is defined is told by
`models.quant_formats`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qwencli.engine.loading.reader import Reader
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme, codebook_of, pack
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
    """4 or 8; raises ModelFileError for another number."""
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
    """Raise ModelFileError where the tensor `name` of a layer has another shape."""
    if tuple(parts[name].shape) != shape:
        raise unreadable(
            layer,
            f"has {name} {list(parts[name].shape)}, expected {list(shape)}",
            "weights and config.json belong to different models",
        )


def unfit(layer: PackedLayer, parts: Parts, *names: str) -> ModelFileError:
    """The error for tensors whose shapes contradict the layer's matrix."""
    shapes = " and ".join(f"{name} {list(parts[name].shape)}" for name in names)
    return unreadable(layer, f"has {shapes}, which do not fit a matrix {list(layer.shape)}")


def unreadable(layer: PackedLayer, what: str, hint: str = "") -> ModelFileError:
    """The error for a layer that is stored in a way that is not read here."""
    return ModelFileError(
        f"{layer.layer} {what}",
        hint or "use another version of the model, or try --engine transformers",
    )


# AutoAWQ's gemm kernels want them so: place i of a word holds column AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INT8_MAX = 127


def read_packed(layer: PackedLayer, reader: Reader, zero_offset: int) -> QuantizedTensor | Tensor:
    """Read one layer's tensors and give its matrix; plain float32 [rows, columns] where none of our
    layouts has its blocks, as those of vision towers whose widths no power of two divides.

    Args:
        zero_offset: see `PackedFormat`.

    Raises:
        ModelFileError: tensors whose shapes do not belong together, or a layout that our kernels
            cannot have.
    """
    parts = {name: reader.as_stored(tensor) for name, tensor in layer.tensors.items()}
    return _READERS[layer.packing.name](layer, parts, zero_offset)


def _awq(layer: PackedLayer, parts: Parts, _: int) -> QuantizedTensor:
    """qweight int32 [columns, rows / 8], qzeros [groups, rows / 8], scales [groups, rows]."""
    rows, columns = layer.shape
    scales = parts["scales"]
    groups = len(scales)
    expect(layer, parts, "qweight", (columns, rows // 8))
    expect(layer, parts, "qzeros", (groups, rows // 8))
    expect(layer, parts, "scales", (groups, rows))
    place = torch.tensor(AWQ_ORDER, device=scales.device).argsort()
    q, zeros = (values_of(parts[name], 4, place).view(-1, rows) for name in ("qweight", "qzeros"))
    return grouped(layer, q.t(), scales.t(), zeros.t(), 4)


def _gptq(layer: PackedLayer, parts: Parts, zero_offset: int) -> QuantizedTensor:
    """qweight int32 [columns x bits / 32, rows], qzeros [groups, rows x bits / 32], scales [groups,
    rows], g_idx [columns]: the group of each column, not in order after `desc_act`."""
    rows, columns = layer.shape
    bits = bits_of(layer)
    groups = len(parts["scales"])
    expect(layer, parts, "qweight", (columns * bits // WORD_BITS, rows))
    expect(layer, parts, "qzeros", (groups, rows * bits // WORD_BITS))
    expect(layer, parts, "scales", (groups, rows))
    q = values_of(parts["qweight"].t().contiguous(), bits).view(rows, columns)
    zeros = values_of(parts["qzeros"], bits).view(groups, rows).t() + zero_offset
    return grouped(layer, q, parts["scales"].t(), zeros, bits, parts.get("g_idx"))


def _ct_packed(layer: PackedLayer, parts: Parts, _: int) -> QuantizedTensor:
    """weight_packed int32 [rows, columns x bits / 32] of q + 2^(bits - 1), weight_scale [rows,
    groups], weight_zero_point packed along the rows, or int8 as it is; none when symmetric."""
    rows, columns = layer.shape
    bits = bits_of(layer)
    middle = 1 << (bits - 1)
    scales = scales_by_rows(layer, parts["weight_scale"])
    expect(layer, parts, "weight_packed", (rows, columns * bits // WORD_BITS))
    q = values_of(parts["weight_packed"], bits).view(rows, columns)
    zeros = parts.get("weight_zero_point")
    if zeros is None:
        zeros = torch.full_like(scales, middle, dtype=torch.int32)
    elif zeros.dtype == torch.int32:
        zeros = values_of(zeros.t().contiguous(), bits).view(len(zeros.t()), -1)[:, :rows].t()
    else:
        zeros = scales_by_rows(layer, zeros).int() + middle
    return grouped(layer, q, scales, zeros, bits, parts.get("weight_g_idx"))


def _int8(layer: PackedLayer, parts: Parts, _: int) -> QuantizedTensor:
    """weight int8 [rows, columns], weight_scale of the whole, of rows, or of groups."""
    expect(layer, parts, "weight", layer.shape)
    scales = scales_by_rows(layer, parts["weight_scale"])
    zeros = parts.get("weight_zero_point")
    if zeros is None or not zeros.any():
        if scales.shape[1] == 1 and parts.get("weight_g_idx") is None:
            return QuantizedTensor(Scheme.INT8, parts["weight"], scales[:, 0].float().contiguous())
        zeros = torch.zeros_like(scales)
    q = parts["weight"].int() + 128
    zeros = scales_by_rows(layer, zeros).int() + 128
    return grouped(layer, q, scales, zeros, 8, parts.get("weight_g_idx"))


def _bnb_int8(layer: PackedLayer, parts: Parts, _: int) -> QuantizedTensor:
    """weight int8 [rows, columns], SCB float32 [rows]: the largest magnitude of each row."""
    expect(layer, parts, "weight", layer.shape)
    expect(layer, parts, "SCB", layer.shape[:1])
    if int(parts.get("weight_format", torch.zeros(()))):
        raise unreadable(layer, "is not stored row by row", "save it again with transformers")
    largest = parts["SCB"].float()
    # By a tensor: a GPU multiplies by the inverse of a number, which is not always the same.
    return QuantizedTensor(
        Scheme.INT8, parts["weight"], largest / torch.full_like(largest, INT8_MAX)
    )


def _fp8(layer: PackedLayer, parts: Parts, _: int) -> QuantizedTensor | Tensor:
    """weight e4m3 [rows, columns], and scales of the whole, of rows, or of blocks of both.

    ModelOpt writes those of blocks as [rows, 1, columns, 1].
    """
    rows, columns = layer.shape
    expect(layer, parts, "weight", layer.shape)
    scales = parts[layer.packing.scale].float()
    if scales.dim() == 4 and scales.shape[1] == scales.shape[3] == 1:
        scales = scales[:, 0, :, 0]
    if tuple(scales.shape) in ((), (1,), (rows,), (rows, 1)):
        return QuantizedTensor(
            Scheme.FP8, parts["weight"], scales.reshape(-1).expand(rows).contiguous()
        )
    if scales.dim() != 2:
        raise unfit(layer, parts, layer.packing.scale)
    high, wide = block_size(rows, scales.shape[0]), block_size(columns, scales.shape[1])
    if high is None or wide is None:
        raise unfit(layer, parts, layer.packing.scale)
    group = group_within(columns, wide)
    by_rows = scales.repeat_interleave(high, 0)[:rows]
    if group is None:
        return parts["weight"].float() * by_rows.repeat_interleave(wide, 1)[:, :columns]
    by_columns = by_rows.repeat_interleave(wide // group, 1)[:, : columns // group]
    return QuantizedTensor(Scheme.FP8, parts["weight"], by_columns.contiguous())


def _bnb_4bit(layer: PackedLayer, parts: Parts, _: int) -> QuantizedTensor | Tensor:
    """weight: bytes of two values in the order of the rows, the first in the upper half;
    weight.absmax: of blocks of that order, itself quantized where it is uint8; weight.quant_map:
    the 16 values; weight.quant_state.*: a JSON text."""
    rows, columns = layer.shape
    state = _state(layer, parts)
    table, absmax = parts["weight.quant_map"].float(), parts["weight.absmax"]
    raw = parts["weight"].contiguous().view(-1).view(torch.uint8)
    block = rows * columns // max(absmax.numel(), 1)
    if raw.numel() * 2 != rows * columns or block * absmax.numel() != rows * columns:
        raise unfit(layer, parts, "weight", "weight.absmax")
    if absmax.dtype == torch.uint8:
        absmax = _nested(layer, parts, state)
    q = torch.stack((raw >> 4, raw & 15), 1).view(rows, columns)
    group = group_within(columns, block) if columns % block == 0 else None
    if group is None:
        values = table[q.int()].view(-1, block) * absmax.float().view(-1, 1)
        return values.view(rows, columns)
    scale = absmax.float().view(rows, -1).repeat_interleave(block // group, 1)
    scheme = Scheme(state["quant_type"])
    return QuantizedTensor(
        scheme, pack(q.int(), scheme), scale, codebook=codebook_of(table).to(raw.device)
    )


def _state(layer: PackedLayer, parts: Parts) -> dict[str, Any]:
    found = [name for name in parts if name.startswith("weight.quant_state.")]
    if not found:
        raise unreadable(layer, "lacks its weight.quant_state")
    try:
        state = json.loads(bytes(parts[found[0]].tolist()))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or state.get("quant_type") not in ("nf4", "fp4"):
        raise unreadable(layer, f"has a {found[0]} that tells no 4-bit type")
    return state


def _nested(layer: PackedLayer, parts: Parts, state: Mapping[str, Any]) -> Tensor:
    """absmax = map[absmax] x nested_absmax of its block + offset (QLoRA's double quantization)."""
    names = ("weight.nested_quant_map", "weight.nested_absmax")
    offset, block = state.get("nested_offset"), state.get("nested_blocksize")
    if (
        any(name not in parts for name in names)
        or not isinstance(offset, int | float)
        or not isinstance(block, int)
    ):
        raise unreadable(layer, f"lacks {' or '.join(names)}, or what belongs to them")
    indexes = parts["weight.absmax"].view(-1).long()
    outer = parts[names[1]].float().view(-1).repeat_interleave(block)
    if len(outer) < len(indexes):
        raise unfit(layer, parts, "weight.absmax", names[1])
    return parts[names[0]].float()[indexes] * outer[: len(indexes)] + offset


_READERS: Mapping[str, Callable[[PackedLayer, Parts, int], QuantizedTensor | Tensor]] = {
    "awq": _awq,
    "gptq": _gptq,
    "ct-packed": _ct_packed,
    "int8": _int8,
    "fp8": _fp8,
    "bnb-4bit": _bnb_4bit,
    "bnb-int8": _bnb_int8,
}
