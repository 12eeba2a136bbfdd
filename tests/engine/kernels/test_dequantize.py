"""Matrices read back in one pass are those of `QuantizedTensor.dequantize`, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.kernels.dequantize import dequantize, forget_dense, keep_dense
from qwencli.engine.kernels.many_rows import ManyRows
from qwencli.engine.quant.quantized_tensor import QuantizedTensor
from tests.engine.quant.drawn_matrices import KINDS, drawn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expected(matrix: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Triton's interpreter cuts bfloat16 off, where a GPU rounds it."""
    if dtype is not torch.bfloat16 or matrix.data.is_cuda:
        return matrix.dequantize(dtype)
    whole = matrix.dequantize(torch.float32).view(torch.int32)
    return (whole & -0x10000).view(torch.float32).to(dtype)


def assert_same_bits(matrix: QuantizedTensor, dtype: torch.dtype) -> None:
    got = dequantize(matrix, dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert got.dtype is dtype
    assert torch.equal(got.view(bits), expected(matrix, dtype).view(bits))
    assert int((got != 0).sum()) > got.numel() // 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_back_as_it_stands(name: str, dtype: torch.dtype) -> None:
    assert_same_bits(drawn(KINDS[name], 13, 384), dtype)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (7, 65), (3, 1001), (129, 36), (5, 4096)])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rows_of_any_length(name: str, rows: int, columns: int) -> None:
    assert_same_bits(drawn(KINDS[name], rows, columns), torch.bfloat16)


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (259, 128), (3, 2560)])
@pytest.mark.parametrize("name", ["int4", "nf4", "fp8 groups", "int8 zeros"])
def test_any_number_of_rows_of_groups(name: str, rows: int, columns: int) -> None:
    assert_same_bits(drawn(KINDS[name], rows, columns), torch.float16)


def test_what_is_kept_dense_is_read_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = drawn(KINDS["int4"], 16, 128)
    many = ManyRows(torch.device("cpu"))
    keep_dense([matrix], torch.float16)
    kept = dequantize(matrix, torch.float16)
    assert kept is dequantize(matrix, torch.float16)
    assert torch.equal(kept, matrix.dequantize(torch.float16))
    assert dequantize(matrix, torch.float32) is not kept
    x = torch.ones(40, 128, dtype=torch.float16)
    unpacked: list[object] = []
    monkeypatch.setattr(many, "_gemm", lambda *given, **_: unpacked.append(given[1]))
    assert torch.equal(many.product(x, matrix), torch.mm(x, kept.t()))
    many.product(x[:16], matrix)
    assert unpacked == [matrix], "so few rows read the smaller one"
    forget_dense([matrix])
    assert dequantize(matrix, torch.float16) is not kept
    many.product(x, matrix)
    assert len(unpacked) == 2
