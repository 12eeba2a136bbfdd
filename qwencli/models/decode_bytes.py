"""Bytes that decoding one token has to read: the numerator of MBU. Knows no device, no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod

from qwencli.config import Quantization
from qwencli.models.memory import (
    NF4_BYTES_PER_WEIGHT,
    native_kv_bytes,
    native_matrix_bytes,
)
from qwencli.models.scheme_labels import stored_label
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import expected_tensors, is_quantizable

# Scheme, as engines report it -> bytes of a quantized matrix of [rows, columns]. Sources as in
# `memory.weight_bytes`.
_QUANTIZED: Mapping[str, Callable[[int, int], float]] = {
    "bnb-nf4": lambda rows, columns: rows * columns * NF4_BYTES_PER_WEIGHT,
    "bnb-int8": lambda rows, columns: rows * columns + 4 * rows,
}
# Those of the native engine, which quantizes the head too.
_NATIVE = {
    "int8": Quantization.INT8,
    "fp8-e4m3": Quantization.FP8,
    "int4-g128": Quantization.INT4,
}
_QUANTIZED_KV = ("int8", "fp8-e4m3")
# Ready-made checkpoints in the native engine, whose heads are as they came: unquantized in all but
# a few. Then a byte or half a byte, and scales (int4: and zeros, of two bytes each) of groups.
_READY_MADE = re.compile(
    r"(?:awq|gptq|ct|hf|fbgemm|modelopt|scaled)-(int4|int8|fp8-e4m3)(?:-g(\d+))?"
)


def decode_bytes(
    shape: ModelShape,
    scheme: str,
    value_bytes: int,
    context_tokens: float,
    kv_dtype: str | None = None,
) -> float | None:
    """Bytes read for one token of one sequence.

    Every weight of the decoder and the output head once, one row of the embedding, and the keys
    and values of `context_tokens`. What a kernel reads beyond that (a whole static cache, weights
    unpacked to memory) is waste and not in it: MBU is to fall for it.

    Args:
        scheme: as `RanModes.quantization` says. value_bytes: of what is not quantized.
        kv_dtype: as `RanModes.kv_dtype` says.

    Returns:
        None for a scheme whose storage is not known here.
    """
    scheme = stored_label(scheme)
    quantized, native = _QUANTIZED.get(scheme) or _ready_made(scheme), _NATIVE.get(scheme)
    if scheme != "none" and quantized is None and native is None:
        return None
    total = float(shape.text.hidden_size * value_bytes)
    for name, size in expected_tensors(shape).items():
        looked_up = name.endswith("embed_tokens.weight") and not shape.text.tied_head
        if ".visual." in name or looked_up:
            continue
        head = name.endswith(("lm_head.weight", "embed_tokens.weight"))
        if native is not None and len(size) == 2:
            total += native_matrix_bytes(native, head, *size)
        elif quantized is not None and is_quantizable(name, size):
            total += quantized(*size)
        else:
            total += prod(size) * value_bytes
    cache = native_kv_bytes(shape, kv_dtype in _QUANTIZED_KV, value_bytes)
    return total + cache * context_tokens


def _ready_made(scheme: str) -> Callable[[int, int], float] | None:
    match = _READY_MADE.fullmatch(scheme)
    if match is None:
        return None
    value_bytes = 0.5 if match[1] == "int4" else 1.0

    def matrix_bytes(rows: int, columns: int) -> float:
        groups = columns // int(match[2]) if match[2] else 1
        return rows * columns * value_bytes + 4 * rows * groups

    return matrix_bytes
