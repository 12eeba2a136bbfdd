"""Quantized matrices of every kind that a checkpoint may hold, with random contents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwencli.engine.quant.quantized_tensor import (
    CODEBOOK_SCHEMES,
    IN_NIBBLES,
    QuantizedTensor,
    Scheme,
    codebook_of,
    pack,
)
from tests.engine.quant.packed_formats import NF4


@dataclass(frozen=True)
class Kind:
    """What a checkpoint may hold. `group` None = a scale for each row."""

    scheme: Scheme
    group: int | None = None
    zeros: bool = False
    ordered: bool = False
    scales: torch.dtype = torch.float32


KINDS = {
    "int8": Kind(Scheme.INT8),
    "int8 half scales": Kind(Scheme.INT8, scales=torch.float16),
    "fp8": Kind(Scheme.FP8),
    "fp8 groups": Kind(Scheme.FP8, 128),
    "int8 groups": Kind(Scheme.INT8, 32, scales=torch.bfloat16),
    "int8 zeros": Kind(Scheme.INT8, 64, zeros=True, scales=torch.float16),
    "int8 ordered": Kind(Scheme.INT8, 32, zeros=True, ordered=True, scales=torch.float16),
    "int4": Kind(Scheme.INT4, 128, zeros=True, scales=torch.float16),
    "int4 ordered": Kind(Scheme.INT4, 32, zeros=True, ordered=True, scales=torch.bfloat16),
    "nf4": Kind(Scheme.NF4, 64),
    "fp4": Kind(Scheme.FP4, 32, scales=torch.float16),
}


def drawn(kind: Kind, rows: int, columns: int, device: str = "cpu") -> QuantizedTensor:
    """Every value that the scheme has, with scales and zeros that are no round numbers."""
    generator = torch.Generator().manual_seed(rows + columns)
    size = (rows,) if kind.group is None else (rows, columns // kind.group)
    scale = (torch.rand(size, generator=generator) * 0.02 + 1e-3).to(kind.scales)
    zero = None
    if kind.zeros:
        zero = (torch.rand(size, generator=generator) * 15).half()
    order = torch.randperm(columns, generator=generator).int() if kind.ordered else None
    q = torch.randint(0, 256, (rows, columns), dtype=torch.int32, generator=generator)
    table = None
    if kind.scheme in IN_NIBBLES:
        data = pack(q & 15, kind.scheme)
        table = codebook_of(torch.tensor(NF4)) if kind.scheme in CODEBOOK_SCHEMES else None
    elif kind.scheme is Scheme.FP8:
        # All bits set but the sign is a NaN.
        data = torch.where((q & 0x7F) == 0x7F, 0, q).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        data = (q - 128).to(torch.int8)
    zero, order = (None if part is None else part.to(device) for part in (zero, order))
    table = None if table is None else table.to(torch.device(device))
    return QuantizedTensor(kind.scheme, data.to(device), scale.to(device), zero, table, order)
