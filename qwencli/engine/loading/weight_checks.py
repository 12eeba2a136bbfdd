"""What loaded values have to be: finite, and zero where the model has no use for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from qwencli.engine.loading.reader import AGAIN, FLOATS, Reader
from qwencli.errors import ModelFileError
from qwencli.models.quant_formats import PackedFormat, PackedLayer
from qwencli.models.safetensors_header import StoredTensor
from qwencli.models.weights import all_named

# The least and the largest value of a tensor: numbers, or on its device [2].
Extremes = torch.Tensor | list[float]


def check_zero(biases: tuple[StoredTensor, ...], reader: Reader) -> None:
    """Biases of no use to the model may be left out only if they are zero."""
    others = [bias.name for bias in biases if reader.as_stored(bias).any()]
    if others:
        raise ModelFileError(
            f"{all_named(others)}: biases that config.json does not describe and that are not zero",
            "weights and config.json belong to different models",
        )


def check_finite(
    extremes: Mapping[str, Extremes], dtype: torch.dtype
) -> Mapping[str, Sequence[float]]:
    """Raise for every tensor whose extremes [2] are not numbers, else give these as numbers.

    Waits for the device once.
    """
    pairs = dict(extremes)
    waiting = [name for name, pair in pairs.items() if isinstance(pair, torch.Tensor)]
    if waiting:
        together = torch.stack([torch.as_tensor(pairs[name]) for name in waiting])
        pairs.update(zip(waiting, together.tolist(), strict=True))
    broken = [name for name, (low, high) in pairs.items() if not math.isfinite(low - high)]
    if broken:
        hint = "use --dtype bfloat16 or float32 if the values exceed float16, else " + AGAIN
        raise ModelFileError(
            f"weights with NaN or infinity: {all_named(broken)}",
            hint if dtype == torch.float16 else AGAIN,
        )
    return {name: (low, high) for name, (low, high) in pairs.items()}


def check_stored_scales(stored: Mapping[str, StoredTensor], packed: PackedFormat) -> None:
    """As `check_finite` and `check_scales`, of the scales in a checkpoint that another loads."""
    broken, lost = [], []
    with Reader(torch.device("cpu")) as reader:
        for main, scale in {(packing.main, packing.scale) for packing in packed.packings}:
            for name, tensor in stored.items():
                values = stored.get(name.removesuffix(scale) + main)
                if not name.endswith(f".{scale}") or tensor.dtype not in FLOATS or values is None:
                    continue
                low, high = reader.as_stored(tensor).float().aminmax()
                if not math.isfinite(low - high):
                    broken.append(name)
                elif not low and not high and _any(reader, values):
                    lost.append(name)
    if broken:
        raise ModelFileError(f"weights with NaN or infinity: {all_named(broken)}", AGAIN)
    if lost:
        raise ModelFileError(f"scales that are all zero: {all_named(lost)}", AGAIN)


def _any(reader: Reader, tensor: StoredTensor) -> bool:
    return bool(reader.as_stored(tensor).view(torch.uint8).any())


def check_scales(
    extremes: Mapping[str, Sequence[float]], scaled: Mapping[str, PackedLayer], reader: Reader
) -> None:
    """Raise for matrices that are zero although their stored values are not: their scales are.

    Args:
        scaled: the layers, by the name that `extremes` has of their scales, or of their product.
    """
    zero = [layer for name, layer in scaled.items() if not any(extremes[name])]
    lost = [
        f"{layer.layer}.{layer.packing.scale}"
        for layer in zero
        if _any(reader, layer.tensors[layer.packing.main])
    ]
    if lost:
        raise ModelFileError(f"scales that are all zero: {all_named(lost)}", AGAIN)
