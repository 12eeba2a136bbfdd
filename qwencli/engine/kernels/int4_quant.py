"""Quantizes matrices to int4 in one pass over them, for a model that is quantized as it loads.

A program holds some groups in registers, tries every step size there, and writes what remains: each
value is read once. The reference (`quantized_tensor.quantize`) goes over a matrix in float32 about
a hundred times. What is computed is the same but for how sums of errors are rounded: where two step
sizes are as good, another one may be taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwencli.engine.quant.quantized_tensor import (
    INT4_MAX,
    NIBBLES,
    SHRINKS,
    QuantizedTensor,
    Scheme,
    group_of,
)
from qwencli.engine.quant.quantized_tensor import quantize as quantize_reference

# Values that a program holds: 16 a thread.
PROGRAM_VALUES, WARPS = 2048, 4
_HALF_STEP = tl.constexpr(12582912.0)  # 1.5 * 2^23: added, it leaves an integer, ties to even
_SHRINKS = tl.constexpr(len(SHRINKS))
_TOP = tl.constexpr(float(INT4_MAX))


@triton.jit
def nearest(x, step, offset):
    """The integers from 0 to 15 that are nearest to x / step + offset."""
    q = tl.div_rn(x, step) + offset
    return tl.minimum(tl.maximum((q + _HALF_STEP) - _HALF_STEP, 0.0), _TOP)


@triton.jit(do_not_specialize=["num_groups"])
def quantize_int4_kernel(
    w_ptr,  # [groups, G]
    data_ptr,  # int32 [groups, G / 8], see `pack`
    scale_ptr,  # float16 [groups]
    zero_ptr,  # float16 [groups]
    shrinks_ptr,  # float32 [_SHRINKS]
    num_groups,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    there = group < num_groups
    columns = tl.arange(0, G)
    at = group[:, None] * G + columns[None, :]
    w = tl.load(w_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(w, axis=1), 0.0)
    high = tl.maximum(tl.max(w, axis=1), 0.0)
    scale = tl.full([GROUPS], 1.0, tl.float32)
    zero = tl.full([GROUPS], 0.0, tl.float32)
    best = tl.full([GROUPS], float("inf"), tl.float32)
    for number in range(_SHRINKS):
        shrink = tl.load(shrinks_ptr + number)
        step = tl.maximum(tl.div_rn((high - low) * shrink, _TOP), 1e-7)
        step = step.to(tl.float16).to(tl.float32)
        offset = tl.div_rn(-low * shrink, step).to(tl.float16).to(tl.float32)
        q = nearest(w, step[:, None], offset[:, None])
        off = (q - offset[:, None]) * step[:, None] - w
        error = tl.sum(off * off, axis=1)
        better = error < best
        best = tl.where(better, error, best)
        scale = tl.where(better, step, scale)
        zero = tl.where(better, offset, zero)
    q = nearest(w, scale[:, None], zero[:, None]).to(tl.int32)
    place = (columns % 4) * 8 + columns % 8 // 4 * 4
    words = tl.sum(tl.reshape(q << place[None, :], [GROUPS, G // 8, 8]), axis=2)
    word = group[:, None] * (G // 8) + tl.arange(0, G // 8)[None, :]
    tl.store(data_ptr + word, words, mask=there[:, None])
    tl.store(scale_ptr + group, scale.to(tl.float16), mask=there)
    tl.store(zero_ptr + group, zero.to(tl.float16), mask=there)


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """As `quantized_tensor.quantize`; what is not int4 is done there."""
    group = group_of(weight.shape[1])
    if scheme is not Scheme.INT4 or group is None:
        return quantize_reference(weight, scheme)
    (rows, columns), device = weight.shape, weight.device
    data = torch.empty(rows, columns // NIBBLES, dtype=torch.int32, device=device)
    scale = torch.empty(rows, columns // group, dtype=torch.float16, device=device)
    zero = torch.empty_like(scale)
    shrinks = torch.tensor(SHRINKS, dtype=torch.float32, device=device)
    each = PROGRAM_VALUES // group
    quantize_int4_kernel[triton.cdiv(scale.numel(), each),](
        weight.contiguous(), data, scale, zero, shrinks, scale.numel(),
        G=group, GROUPS=each, num_warps=WARPS,
    )  # fmt: skip
    return QuantizedTensor(scheme, data, scale, zero)
