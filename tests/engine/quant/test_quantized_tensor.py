"""Weights of fewer bits: packing, errors, whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwencli.config import EngineConfig, Quantization, SamplingOptions
from qwencli.engine.frontend.images import open_image
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.decoder_ops import RMSNorm, norm_head
from qwencli.engine.quant import quantized_tensor
from qwencli.engine.quant.quantized_tensor import (
    LARGEST,
    QuantizedTensor,
    Scheme,
    pack,
    quantize,
    unpack,
)
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model
from tests.engine.quant.drawn_matrices import KINDS, drawn

SCENE = Path(__file__).parents[3] / "examples" / "scene.png"


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_packing_loses_nothing(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, 8 * words), dtype=torch.int32, generator=generator)
    packed = pack(values)
    assert packed.shape == (rows, words)
    assert torch.equal(unpack(packed).int(), values)


def test_a_word_masked_and_shifted_is_its_eight_values_in_order() -> None:
    word = pack(torch.arange(8, dtype=torch.int32)[None])
    low, high = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
    assert torch.cat((low, high), 1).view(torch.int8).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def error_of(matrix: QuantizedTensor, weight: torch.Tensor) -> float:
    return float((matrix.dequantize(torch.float32) - weight).norm() / weight.norm())


def in_doubles(matrix: QuantizedTensor) -> torch.Tensor:
    """The matrix by the definition of its scheme, float64."""
    nibbles = matrix.scheme in quantized_tensor.IN_NIBBLES
    q = unpack(matrix.data, matrix.scheme) if nibbles else matrix.data
    values = q.double() if matrix.codebook is None else matrix.codebook.values.double()[q.long()]
    scale = matrix.scale.double().view(matrix.rows, -1).repeat_interleave(matrix.group, 1)
    if matrix.zero_point is not None:
        values = values - matrix.zero_point.double().repeat_interleave(matrix.group, 1)
    stored = values * scale
    if matrix.g_idx_sort_indices is None:
        return stored
    return torch.empty_like(stored).index_copy_(1, matrix.g_idx_sort_indices.long(), stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_matrix_read_back_in_pieces_is_what_it_stands_for(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = drawn(KINDS[name], 13, 256)
    whole = matrix.dequantize(dtype)
    monkeypatch.setattr(quantized_tensor, "VALUES_AT_A_TIME", 5 * 256)
    assert [piece.stop for piece in matrix.pieces()] == [5, 10, 15]
    assert torch.equal(matrix.dequantize(dtype), whole)
    part = matrix.part(slice(3, 9))
    assert torch.equal(part.dequantize(dtype), whole[3:9])
    rounding = 2**-23 if dtype is torch.float32 else 2**-8
    wanted = in_doubles(matrix)
    # Zeros are subtracted in float32 too.
    slack = 1e-6 * float(wanted.abs().max())
    assert torch.all((whole.double() - wanted).abs() <= rounding * wanted.abs() + slack)


# Relative errors of normal values: a step of 2 / 254 or 2 / 15 of the range over sqrt(12), and
# three bits of mantissa; a little above what theory gives for these sizes.
@pytest.mark.parametrize(
    ("scheme", "low", "high"),
    [(Scheme.INT8, 0.005, 0.01), (Scheme.FP8, 0.02, 0.035), (Scheme.INT4, 0.07, 0.11)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_bits(
    scheme: Scheme, low: float, high: float, dtype: torch.dtype
) -> None:
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert low < error_of(quantize(weight, scheme), weight.float()) < high


def test_a_head_is_multiplied_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole it would be the largest thing in memory."""
    head = drawn(KINDS["int8"], 301, 64)
    norm = RMSNorm(torch.ones(64), 1e-6)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    wanted = norm(hidden) @ head.dequantize(torch.float32).t()
    monkeypatch.setattr(quantized_tensor, "VALUES_AT_A_TIME", 40 * 64)
    sizes = []

    def noted(matrix: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(matrix.rows)
        return matrix.dequantize(dtype)

    assert torch.allclose(norm_head(hidden, norm, head, noted), wanted, rtol=1e-5, atol=1e-5)
    assert sizes == [40] * 7 + [21]


def test_shrinking_a_range_beats_keeping_its_outliers() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    weight[:, ::64] *= 4
    grouped = weight.view(64, -1, 128)
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = ((grouped - low) / step).round() * step + low
    kept = float((plain - grouped).norm() / grouped.norm())
    assert error_of(quantize(weight, Scheme.INT4), weight) < kept


def test_rows_of_zeros_stay_zeros() -> None:
    for scheme in (*LARGEST, Scheme.INT4):  # nf4 and fp4 are read from checkpoints, never made
        matrix = quantize(torch.zeros(3, 128), scheme)
        assert not matrix.dequantize(torch.float32).any()


def test_a_row_that_no_group_divides_becomes_int8_and_says_so() -> None:
    matrix = quantize(torch.randn(4, 72), Scheme.INT4)
    assert matrix.label == "int8"
    assert quantize(torch.randn(4, 96), Scheme.INT4).label == "int4-g32"


@pytest.mark.parametrize(
    ("mode", "scheme"),
    [
        (Quantization.INT8, "int8"),
        (Quantization.FP8, "fp8-e4m3"),
        (Quantization.INT4, "int4-g128"),
    ],
)
def test_the_bundled_model_still_sees(mode: Quantization, scheme: str) -> None:
    config = EngineConfig(resolve_model("scenes"), device="cpu", quantization=mode)
    request = GenerationRequest(
        (user_message("Describe this image.", (open_image(SCENE),)),),
        SamplingOptions(do_sample=False, max_new_tokens=40),
    )
    with NativeEngine(config) as engine:
        result = engine.generate(request)
    assert result.effective.quantization == scheme
    assert "large red circle" in result.text and "small blue star" in result.text
