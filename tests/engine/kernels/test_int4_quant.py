"""Matrices quantized in one pass are those of `quantized_tensor.quantize`."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.kernels.int4_quant import quantize
from qwencli.engine.quant import quantized_tensor as reference
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme


def error_of(matrix: QuantizedTensor, weight: torch.Tensor) -> torch.Tensor:
    """Squared, of each group."""
    off = matrix.dequantize(torch.float32) - weight.float()
    return off.view(len(weight), -1, matrix.group).square().sum(2)


def assert_alike(weight: torch.Tensor) -> None:
    made, wanted = quantize(weight, Scheme.INT4), reference.quantize(weight, Scheme.INT4)
    assert {name: (part.dtype, part.shape) for name, part in made.parts.items()} == {
        name: (part.dtype, part.shape) for name, part in wanted.parts.items()
    }
    # The same step size gives the same bits; another one only where it is as good.
    same = (made.scale == wanted.scale) & (made.zero_point == wanted.zero_point)
    words = same.repeat_interleave(made.group // 8, dim=1)
    assert torch.equal(made.data[words], wanted.data[words])
    assert float(same.float().mean()) > 0.98
    allowed = 1.0001 * error_of(wanted, weight) + 1e-12
    assert bool((error_of(made, weight) <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(3, 256), (17, 192), (5, 96), (1, 1280)])
def test_groups_of_every_size_are_those_of_the_reference(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[0, ::7] *= 20  # outliers, for which a range is shrunk
    assert_alike(weight.to(dtype))


@pytest.mark.parametrize("fill", [0.0, 3.0, -2.0, 1e-9, 4e4])
def test_groups_without_a_range(fill: float) -> None:
    weight = torch.full((2, 256), fill)
    weight[1, :128] = 0.0
    assert_alike(weight)


def test_halves_are_rounded_to_even() -> None:
    weight = torch.arange(128).repeat(2, 1) * 0.5
    weight[1] *= -1
    assert_alike(weight)


@pytest.mark.parametrize("scheme", [Scheme.INT8, Scheme.FP8])
def test_other_schemes_are_the_references(scheme: Scheme) -> None:
    weight = torch.randn(4, 100)
    made, wanted = quantize(weight, scheme), reference.quantize(weight, scheme)
    assert torch.equal(made.data.view(torch.uint8), wanted.data.view(torch.uint8))


def test_columns_that_make_no_groups_become_int8() -> None:
    assert quantize(torch.randn(4, 100), Scheme.INT4).scheme is Scheme.INT8
