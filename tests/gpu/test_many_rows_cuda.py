"""Products of many rows on a CUDA device, through the tiles that models get."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.kernels.many_rows import ManyRows
from qwencli.engine.kernels.row_quant import RowFormat
from qwencli.engine.kernels.tiles import product_tiles
from tests.engine.kernels.test_tiled_gemm import FORMATS, assert_close, assert_rounded
from tests.engine.quant.drawn_matrices import KINDS, drawn

CUDA = torch.device("cuda")
ROWS = (9, 16, 17, 32, 64, 128, 256, 300)
needs_fp8 = pytest.mark.skipif(
    torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8"
)
NAMES = ["int4", "int8", pytest.param("fp8", marks=needs_fp8)]


@pytest.mark.parametrize("row_format", list(RowFormat))
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (17, 200), (9, 9728)])
def test_rows_are_rounded_to_their_formats_steps(row_format, rows, columns):
    if row_format is RowFormat.FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    assert_rounded(row_format, rows, columns, "cuda")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_matrix_read_back(name, rows):
    matrix = drawn(KINDS[name], 1000, 2560, "cuda")
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    tiles = product_tiles(FORMATS[name].name, 1000, 2560, rows, processors)
    assert_close(matrix, rows, tiles, "cuda")


@torch.inference_mode()
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_repeats_the_same_bits(name, rows):
    matrix, many = drawn(KINDS[name], 2560, 4096, "cuda"), ManyRows(CUDA)
    x = torch.randn(rows, 4096, device=CUDA, dtype=torch.bfloat16)
    hidden = torch.randn(rows, 2560, device=CUDA, dtype=torch.bfloat16)
    first = many.product(x, matrix, onto=hidden.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = many.product(x, matrix, onto=hidden.clone())
    for _ in range(3):
        graph.replay()
        assert torch.equal(again, first)
    expected = hidden.float() + x.float() @ matrix.dequantize(torch.float32).t()
    assert (first.float() - expected).norm() / expected.norm() < 0.04
