"""What loaded values have to be: finite, and zero where the model has no use for them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from qwencli.engine.loading.reader import AGAIN, Reader
from qwencli.errors import ModelFileError
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


def check_finite(extremes: Mapping[str, Extremes], dtype: torch.dtype) -> None:
    """Raise for every tensor whose extremes [2] are not numbers. Waits for the device once."""
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
