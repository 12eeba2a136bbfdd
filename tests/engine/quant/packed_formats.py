"""Writes tiny checkpoints in the formats of other tools, each by its public definition.

A writer gives the tensors of one linear layer [rows, columns] and the matrix they stand for, made
by the definition and not by our reader. Definitions:

awq     AutoAWQ, awq/modules/linear/gemm.py `from_linear`: word j of a row of qweight holds columns
        8 j + (0, 2, 4, 6, 1, 3, 5, 7) of the transposed matrix, the lowest bits first; qzeros too.
gptq    AutoGPTQ, qlinear_cuda.py `pack`: qweight packs the inputs of an output from the lowest bits
        on, qzeros the outputs; the first format stores zeros less one (`zeros -= 1`), the second
        as they are. g_idx: the group of each input.
ct      compressed-tensors, pack_quantized `pack_to_int32`: signed values plus half their range,
        the first in the lowest bits; zeros of groups packed along the rows. naive_quantized:
        values as they are beside weight_scale and weight_zero_point.
fp8     transformers finegrained_fp8.py: e4m3 times weight_scale_inv of 128 x 128 blocks;
        fbgemm_fp8.py: weight_scale of rows. ModelOpt, export/quant_utils.py: weight_scale of the
        whole, of rows, or [rows, 1, columns, 1] of blocks. ComfyUI, ops.py: scale_weight.
bnb     bitsandbytes functional.py `quantize_4bit` and `QuantState.as_dict`: the first of two values
        in the upper half of a byte, absmax of blocks of 64, themselves quantized in blocks of 256
        around their mean; modules.py `Linear8bitLt`: SCB, the largest magnitude of a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
Layer = tuple[dict[str, Tensor], Tensor]

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unsigned values [N, M] -> int32 [N, M x bits / 32], value order[i] of a word in place i."""
    per_word = 32 // bits
    split = values.long().view(len(values), -1, per_word)
    total = torch.zeros_like(split[:, :, 0])
    for place in range(per_word):
        total += split[:, :, order[place] if order else place] << (bits * place)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def draw(rows: int, columns: int, group: int, bits: int, seed: int, symmetric: bool) -> Any:
    """q [rows, columns] unsigned, scales (float16) and zeros [rows, groups], and their matrix."""
    generator = torch.Generator().manual_seed(seed)
    top = 1 << bits
    q = torch.randint(0, top, (rows, columns), generator=generator)
    size = (rows, columns // group)
    scales = (torch.rand(size, generator=generator) * 0.2 / top + 0.4 / top).half()
    zeros = torch.randint(top // 2 - 2, top // 2 + 3, size, generator=generator)
    if symmetric:
        zeros = torch.full(size, top // 2)
    return q, scales, zeros


def matrix_of(q: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    return (q - zeros[:, group_of]).float() * scales.float()[:, group_of]


def awq(rows: int, columns: int, seed: int, group: int = 32) -> Layer:
    q, scales, zeros = draw(rows, columns, group, 4, seed, symmetric=False)
    tensors = {
        "qweight": words(q.t(), 4, AWQ_ORDER),
        "qzeros": words(zeros.t(), 4, AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }
    return tensors, matrix_of(q, scales, zeros, torch.arange(columns) // group)


def gptq(
    rows: int,
    columns: int,
    seed: int,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    less: int = 1,
    shuffle: bool = False,
) -> Layer:
    q, scales, zeros = draw(rows, columns, group, bits, seed, symmetric)
    group_of = torch.arange(columns) // group
    if shuffle:
        # As layers of one input have it: the order follows from the input alone.
        group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(5))]
    tensors = {
        "qweight": words(q, bits).t().contiguous(),
        "qzeros": words(zeros.t() - less, bits),
        "scales": scales.t().contiguous(),
        "g_idx": group_of.int(),
    }
    return tensors, matrix_of(q, scales, zeros, group_of)


def ct_packed(
    rows: int,
    columns: int,
    seed: int,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Layer:
    group = columns if group == -1 else group
    q, scales, zeros = draw(rows, columns, group, bits, seed, symmetric)
    scales = scales.to(dtype)
    tensors = {
        "weight_packed": words(q, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
    return tensors, matrix_of(q, scales, zeros, torch.arange(columns) // group)


def ct_int8(
    rows: int, columns: int, seed: int, *, symmetric: bool = True, per_tensor: bool = False
) -> Layer:
    q, scales, zeros = draw(rows, columns, columns, 8, seed, symmetric)
    scales = scales[:1] if per_tensor else scales
    tensors = {"weight": (q - 128).to(torch.int8), "weight_scale": scales.clone()}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)
    return tensors, (q - zeros).float() * scales.float()


def fp8_values(rows: int, columns: int, seed: int) -> Tensor:
    """None beyond the largest: what those become depends on the version of torch, NaN or 448."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 100
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_rows(
    rows: int,
    columns: int,
    seed: int,
    *,
    shape: tuple[int, ...] | None = None,
    name: str = "weight_scale",
) -> Layer:
    q = fp8_values(rows, columns, seed)
    scales = torch.linspace(1e-3, 2e-3, rows)
    scales = scales[:1] if shape in ((1,), ()) else scales
    shaped = scales.view((rows, 1) if shape is None else shape).clone()
    return {"weight": q, name: shaped}, q.float() * scales[:, None]


def fp8_blocks(
    rows: int, columns: int, seed: int, *, side: int = 128, modelopt: bool = False
) -> Layer:
    q = fp8_values(rows, columns, seed)
    size = (-(-rows // side), -(-columns // side))
    scales = torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 1e-3 + 1e-3
    scales = scales.bfloat16()
    wide = scales.float().repeat_interleave(side, 0)[:rows].repeat_interleave(side, 1)[:, :columns]
    if modelopt:
        return {"weight": q, "weight_scale": scales[:, None, :, None]}, q.float() * wide
    return {"weight": q, "weight_scale_inv": scales}, q.float() * wide


def bnb_nf4(rows: int, columns: int, seed: int, *, nested: bool = True) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows * columns,), generator=generator)
    absmax = torch.rand(len(q) // 64, generator=generator) * 0.2 + 0.3
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
    state["shape"] = [rows, columns]
    tensors = {
        "weight": (q[::2] << 4 | q[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": torch.tensor(NF4),
    }
    if nested:
        offset = float(absmax.mean())
        codes = torch.linspace(-1, 1, 256)
        padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        outer = padded.abs().amax(1)
        indexes = ((padded / outer[:, None])[..., None] - codes).abs().argmin(-1)
        indexes = indexes.view(-1)[: len(absmax)]
        tensors |= {
            "weight.absmax": indexes.to(torch.uint8),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": codes,
        }
        absmax = codes[indexes] * outer.repeat_interleave(256)[: len(absmax)] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors["weight.absmax"] = absmax
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    matrix = torch.tensor(NF4)[q].view(-1, 64) * absmax[:, None]
    return tensors, matrix.view(rows, columns)


def bnb_int8(rows: int, columns: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
    largest = torch.rand(rows, generator=generator) * 0.2 + 0.3
    tensors = {"weight": q, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, q.float() * largest[:, None] / 127


def ct(form: str) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form}


Writer = Callable[..., Layer]
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4}
BNB = {"quant_method": "bitsandbytes"}
# name -> quantization_config, writer, its arguments, what results say.
FORMATS: dict[str, tuple[dict[str, Any], Writer, dict[str, Any], str]] = {
    "awq g32": (AWQ, awq, {}, "awq-int4-g32"),
    "awq g64": (AWQ, awq, {"group": 64}, "awq-int4-g64"),
    "awq g128": (AWQ, awq, {"group": 128}, "awq-int4-g128"),
    "gptq": (GPTQ, gptq, {}, "gptq-int4-g32"),
    "gptq g128 sym": (GPTQ, gptq, {"group": 128, "symmetric": True}, "gptq-int4-g128"),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq, {"less": 0}, "gptq-int4-g32"),
    "gptq desc_act": (GPTQ | {"desc_act": True}, gptq, {"shuffle": True}, "gptq-int4-g32"),
    "gptq 8": (GPTQ | {"bits": 8}, gptq, {"bits": 8}, "gptq-int8-g32"),
    "gptq 8 sym desc_act": (
        GPTQ | {"bits": 8},
        gptq,
        {"bits": 8, "symmetric": True, "shuffle": True},
        "gptq-int8-g32",
    ),
    "ct int4": (ct("pack-quantized"), ct_packed, {}, "ct-int4-g32"),
    "ct int4 asym": (ct("pack-quantized"), ct_packed, {"symmetric": False}, "ct-int4-g32"),
    "ct int4 rows": (ct("pack-quantized"), ct_packed, {"group": -1}, "ct-int4-g128"),
    "ct packed int8": (ct("pack-quantized"), ct_packed, {"bits": 8}, "ct-int8-g32"),
    "ct int8": (ct("int-quantized"), ct_int8, {}, "ct-int8"),
    "ct int8 asym": (ct("naive-quantized"), ct_int8, {"symmetric": False}, "ct-int8-g128"),
    "ct int8 tensor": (ct("int-quantized"), ct_int8, {"per_tensor": True}, "ct-int8"),
    "ct fp8": (ct("float-quantized"), fp8_rows, {}, "ct-fp8-e4m3"),
    "ct fp8 tensor": (ct("float-quantized"), fp8_rows, {"shape": (1,)}, "ct-fp8-e4m3"),
    "fp8 blocks": ({"quant_method": "fp8"}, fp8_blocks, {}, "hf-fp8-e4m3-g128"),
    "fp8 rows": ({"quant_method": "fp8"}, fp8_rows, {}, "hf-fp8-e4m3"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fp8_rows, {}, "fbgemm-fp8-e4m3"),
    "bnb nf4": (BNB, bnb_nf4, {"nested": False}, "bnb-nf4"),
    "bnb nf4 nested": (BNB, bnb_nf4, {}, "bnb-nf4"),
    "bnb int8": (BNB, bnb_int8, {}, "bnb-int8"),
}
