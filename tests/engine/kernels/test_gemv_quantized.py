"""Products of quantized weights against float64, the vector rounded as the kernel rounds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwencli.engine.kernels.activation_buffers import WORD_FORMATS, ActivationConsumer
from qwencli.engine.kernels.activation_quant import ACT_GROUPS
from qwencli.engine.kernels.fused_ops import FusedOps
from qwencli.engine.kernels.tiles import GemvTiles
from qwencli.engine.loading import weights
from qwencli.engine.ops.decoder_ops import RMSNorm
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme, codebook_of, quantize
from qwencli.models.quant_formats import packed_format
from qwencli.models.shape_reader import read_shape
from tests.engine.quant.packed_formats import FORMATS, NF4
from tests.engine.quant.test_prequantized import TEXT as PREQUANTIZED_TEXT
from tests.engine.quant.test_prequantized import tensors_of, write
from tests.models.test_shape_reader import TEXT

CPU = torch.device("cpu")
LONGEST = 1376
MADE = (Scheme.INT8, Scheme.FP8, Scheme.INT4)


def rounded(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """`x` [K] with every block rounded to 127 steps of its largest value; for fp8 to float16."""
    blocks = x.view(-1, ACT_GROUPS[WORD_FORMATS[scheme].act_format])
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    if scheme is Scheme.FP8:
        return ((blocks / largest).half() * largest).view(-1)
    return ((blocks / largest * 127).round() * largest / 127).view(-1)


def ops(dtype: torch.dtype = torch.float32) -> FusedOps:
    shape = read_shape({"model_type": "qwen2", **TEXT, "intermediate_size": LONGEST}).text
    angles = torch.zeros(1, 2, shape.head_dim)
    return FusedOps(shape, angles, dtype, CPU, lambda _: GemvTiles(512, 32, 1))


def values(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def dense(matrix: QuantizedTensor) -> torch.Tensor:
    """What the integers stand for, float64 [rows, columns]."""
    return matrix.dequantize(torch.float64)


@pytest.mark.parametrize("scheme", MADE)
@pytest.mark.parametrize(("rows", "columns"), [(40, 224), (64, 1376), (7, 64)])
def test_the_product_of_a_normed_vector(scheme: Scheme, rows: int, columns: int) -> None:
    matrix, x, y = quantize(values(rows, columns), scheme), values(1, columns), torch.zeros(1, rows)
    norm = RMSNorm(1 + 0.1 * values(columns), 1e-6)
    bias = values(rows)
    ops()._gemv(x, ActivationConsumer(norm, matrix), y, bias=bias)
    length = (x.double().square().mean() + 1e-6).rsqrt()
    vector = rounded(x[0] * norm.weight, scheme).double() * length
    assert torch.allclose(y[0].double(), dense(matrix) @ vector + bias, rtol=1e-4, atol=1e-4)
    # Rounding costs what 8 bits cost.
    exact = dense(matrix) @ (x[0] * norm.weight).double() * length + bias
    assert (y[0] - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("scheme", MADE)
def test_gate_up_and_residual(scheme: Scheme) -> None:
    x = values(1, 352)
    vector = rounded(x[0], scheme).double()
    both, y = quantize(values(80, 352), scheme), torch.zeros(1, 40)
    ops()._gemv(x, ActivationConsumer(None, both), y, gated=True)
    gate, up = (dense(both) @ vector).chunk(2)
    layout = torch.nn.functional.silu(gate) * up
    assert torch.allclose(y[0].double(), layout, rtol=1e-4, atol=1e-4)
    matrix, y = quantize(values(40, 352), scheme), values(1, 40)
    layout = y[0] + dense(matrix) @ vector
    ops()._gemv(x, ActivationConsumer(None, matrix), y, add=True)
    assert torch.allclose(y[0].double(), layout, rtol=1e-4, atol=1e-4)


def test_a_vector_of_zeros_gives_zeros() -> None:
    matrix, y = quantize(values(32, 64), Scheme.INT8), torch.ones(1, 32)
    ops()._gemv(torch.zeros(1, 64), ActivationConsumer(None, matrix), y)
    assert torch.equal(y, torch.zeros(1, 32))


def test_scales_of_a_half_type_and_a_matrix_without_groups() -> None:
    """As pre-quantized checkpoints have them."""
    matrix = quantize(values(32, 64), Scheme.INT8)
    matrix = replace(matrix, scale=matrix.scale.half())
    x, y = values(1, 64), torch.zeros(1, 32)
    ops()._gemv(x, ActivationConsumer(None, matrix), y)
    assert torch.allclose(
        y[0].double(), dense(matrix) @ rounded(x[0], Scheme.INT8).double(), rtol=1e-4, atol=1e-4
    )


def stored_values(matrix: QuantizedTensor) -> torch.Tensor:
    """As `dense`, a table's values rounded to its int8 steps."""
    if matrix.codebook is None:
        return dense(matrix)
    codes = matrix.codebook.codes.view(torch.int8).double() * matrix.codebook.step
    return dense(replace(matrix, codebook=replace(matrix.codebook, values=codes.float())))


# Groups with zeros and without, tables, columns in an order of their own, each type of scales.
PREQUANTIZED = (
    "awq g64", "gptq desc_act", "gptq 8", "gptq 8 sym desc_act", "ct int4", "ct int8 asym",
    "fp8 blocks", "bnb nf4",
)  # fmt: skip


@pytest.mark.parametrize("name", PREQUANTIZED)
def test_matrices_of_prequantized_checkpoints(tmp_path: Path, name: str) -> None:
    config, writer, arguments, _ = FORMATS[name]
    packed, _ = tensors_of(PREQUANTIZED_TEXT, writer, arguments)
    loaded = weights.load(
        write(tmp_path, packed),
        read_shape(PREQUANTIZED_TEXT),
        torch.float32,
        CPU,
        packed=packed_format({"quantization_config": config}),
    )
    matrix = loaded.matrices["text.0.gate_up"]
    x, y = values(1, matrix.columns), torch.zeros(1, matrix.rows // 2)
    norm = RMSNorm(1 + 0.1 * values(matrix.columns), 1e-6)
    ops()._gemv(x, ActivationConsumer(norm, matrix), y, gated=True)
    length = (x.double().square().mean() + 1e-6).rsqrt()
    order = slice(None) if matrix.g_idx_sort_indices is None else matrix.g_idx_sort_indices.long()
    vector = torch.empty_like(x[0])
    vector[order] = rounded((x[0] * norm.weight)[order], matrix.scheme)

    def gated(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ vector.double() * length).chunk(2)
        return torch.nn.functional.silu(gate) * up

    layout = gated(stored_values(matrix), vector)
    assert torch.allclose(y[0].double(), layout, rtol=1e-4, atol=1e-4 * float(layout.abs().max()))
    exact = gated(dense(matrix), x[0] * norm.weight)
    assert (y[0] - exact).norm() < 0.02 * exact.norm()


def test_the_steps_of_a_table_are_near_its_values() -> None:
    table = codebook_of(torch.tensor(NF4))
    off = table.codes.view(torch.int8).float() * table.step - table.values
    assert off.norm() < 0.004 * table.values.norm()
    assert off.abs().max() < 0.5 * table.step + 1e-6
