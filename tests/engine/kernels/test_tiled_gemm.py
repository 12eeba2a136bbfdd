"""Products of many rows are those of the matrix read back, but for the rounding of activations."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.kernels.many_rows import ManyRows
from qwencli.engine.kernels.row_quant import QuantizedRows, RowFormat, quantize_rows
from qwencli.engine.kernels.tiled_gemm import MOST_SHARED_TILES, TiledGemm
from qwencli.engine.kernels.tiles import ProductTiles, product_tiles
from qwencli.engine.ops.decoder_ops import (
    REFERENCE_OPS,
    DecoderOps,
    Layer,
    Products,
    RMSNorm,
    swiglu,
)
from qwencli.engine.quant.quantized_tensor import QuantizedTensor
from tests.engine.quant.drawn_matrices import KINDS, Kind, Scheme, drawn

FORMATS = {"fp8": RowFormat.FP8, "int8": RowFormat.INT8, "int4": RowFormat.FLOAT16}
# How far each format may round a value, of the largest one of its row (fp8: of itself).
STEPS = {RowFormat.FP8: 2**-4, RowFormat.INT8: 0.5 / 127, RowFormat.FLOAT16: 2**-11}
SMALL = ProductTiles(32, 16, 64, num_warps=2, splits=1, stages=2, band=2)


def values_of(rows: QuantizedRows) -> torch.Tensor:
    """What quantized rows stand for, float32 [M, K]."""
    values = rows.values.float()
    if rows.format is RowFormat.FLOAT16:
        low, high = (half.view(len(values), -1, 4) for half in values.chunk(2, 1))
        values = torch.cat((low, high), 2).view(values.shape)
    return values * rows.scale[:, None]


def activations(rows: int, columns: int, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    x[:, 3] *= 20  # the outlier that such rows have
    return x.to(device)


def assert_rounded(row_format: RowFormat, rows: int, columns: int, device: str) -> None:
    x = activations(rows, columns, device)
    norm = RMSNorm(torch.rand(columns, device=device) + 0.5, 1e-6)
    both = activations(rows, 2 * columns, device)
    for got, expected in (
        (quantize_rows(x, row_format), x),
        (quantize_rows(x, row_format, norm), norm(x)),
        (quantize_rows(both, row_format, gated=True), swiglu(both)),
    ):
        off = (values_of(got) - expected).abs()
        largest = expected.abs().amax(1, keepdim=True)
        if row_format is RowFormat.FP8:
            # Below its normal values fp8 has even steps.
            largest = torch.maximum(expected.abs(), largest * (2**-6 / 448) * 2)
        assert (off <= largest * STEPS[row_format] + 1e-6).all()


# Not fp8: the interpreter loses the carry of values that round up to a power of two.
@pytest.mark.parametrize("row_format", [RowFormat.INT8, RowFormat.FLOAT16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (17, 200), (9, 2560)])
def test_rows_are_rounded_to_their_formats_steps(
    row_format: RowFormat, rows: int, columns: int
) -> None:
    assert_rounded(row_format, rows, columns, "cpu")


def assert_close(matrix: QuantizedTensor, rows: int, tiles: ProductTiles, device: str) -> None:
    row_format = FORMATS[matrix.scheme.value.split("-")[0]]
    x = quantize_rows(activations(rows, matrix.columns, device), row_format)
    bias = torch.randn(matrix.rows, device=device)
    before = torch.randn(rows, matrix.rows, device=device)
    gemm = TiledGemm.on(torch.device(device))
    expected = values_of(x) @ matrix.dequantize(torch.float32).t()
    for add in (False, True):
        y = before.clone() if add else torch.full_like(before, float("nan"))
        gemm(x, matrix, y, tiles, bias, add)
        whole = expected + bias + (before if add else 0)
        assert (y - whole).norm() / whole.norm() < 2e-3
        assert not gemm.semaphore.any(), "ready for the next product"


@pytest.mark.parametrize("rows", [9, 16, 17, 33])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_matrix_read_back(name: str, splits: int, rows: int) -> None:
    tiles = ProductTiles(32, 16, 64, num_warps=2, splits=splits, stages=2, band=2)
    assert_close(drawn(KINDS[name], 77, 384), rows, tiles, "cpu")


@pytest.mark.parametrize("columns", [200, 8 * 37])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_rows_that_end_within_a_step(name: str, columns: int) -> None:
    assert_close(drawn(KINDS[name], 40, columns), 10, SMALL, "cpu")


@pytest.mark.parametrize("group", [32, 64])
def test_groups_shorter_than_a_step(group: int) -> None:
    kind = Kind(Scheme.INT4, group, zeros=True, scales=torch.float16)
    assert_close(drawn(kind, 40, 3 * group), 12, SMALL, "cpu")


def layer_of(kind: str) -> Layer:
    """Of 256 columns, with a bias on both sides of attention."""

    def matrix(rows: int, columns: int) -> QuantizedTensor:
        return drawn(KINDS[kind], rows, columns)

    def gain() -> RMSNorm:
        return RMSNorm((torch.rand(256) + 0.5).half(), 1e-6)

    norm, head = gain(), matrix(300, 256)
    return Layer(
        0, 2, 1, 64, gain(), matrix(256, 256), torch.randn(256).half(), None, matrix(256, 128),
        torch.randn(256).half(), gain(), matrix(512, 256), matrix(256, 256), norm, head,
    )  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8 groups", "nf4", "int8 ordered"])
def test_a_layer_of_many_rows_is_that_of_plain_operators(kind: str) -> None:
    many, layer = ManyRows(torch.device("cpu")).products(), layer_of(kind)
    hidden, attended = activations(19, 256).half() / 99, activations(19, 128).half() / 99

    def run(ops: Products | DecoderOps) -> list[torch.Tensor]:
        residual = ops.o_residual(attended, layer, hidden.clone())
        activated = ops.norm_gate_up(residual, layer)
        return [
            ops.norm_qkv(hidden, layer),
            residual.clone(),
            ops.down_residual(activated, layer, residual),
            ops.norm_head(hidden, layer.next_norm, layer.next_matrix),
        ]

    for got, expected in zip(run(many), run(REFERENCE_OPS), strict=True):
        assert got.dtype is torch.float16
        assert (got.float() - expected.float()).norm() / expected.float().norm() < 0.04


def test_tiles_fit_every_card_and_share_columns_only_while_a_device_has_room() -> None:
    for name, bits in (("FP8", (8, 8)), ("INT8", (8, 8)), ("FLOAT16", (4, 16))):
        for tokens in (9, 16, 17, 64, 128, 4000):
            for rows, columns in ((2560, 9728), (151936, 2560), (128, 128)):
                tiles = product_tiles(name, rows, columns, tokens, 132)
                stage = (tiles.rows * bits[0] + tiles.tokens * bits[1]) * tiles.columns // 8
                assert stage * tiles.stages <= 99 * 1024
                count = -(-rows // tiles.rows) * -(-tokens // tiles.tokens)
                assert tiles.splits == 1 or count * tiles.splits <= MOST_SHARED_TILES
