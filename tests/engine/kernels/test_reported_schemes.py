"""What results say of the vectors of quantized products is what the kernels do with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwencli.config import EngineConfig, LoadFormat, Quantization
from qwencli.engine.kernels.activation_buffers import ActivationConsumer, activation_bits
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.decoder_ops import REFERENCE_OPS, RMSNorm
from qwencli.engine.quant.quantized_tensor import Scheme, quantize
from qwencli.models.resolve import resolve_model
from tests.engine.kernels.test_fused_ops import OWN
from tests.engine.kernels.test_gemv_quantized import dense, ops, values
from tests.engine.kernels.test_prequantized import loaded_from
from tests.engine.quant.packed_formats import FORMATS


@pytest.mark.parametrize(
    ("scheme", "columns", "bits"),
    [
        (Scheme.INT8, 224, 8),
        (Scheme.INT4, 224, 8),
        (Scheme.FP8, 224, 16),
        (Scheme.INT8, 40, None),  # no row of whole words
        (Scheme.FP8, 40, None),
    ],
)
def test_a_vector_is_rounded_where_the_kernels_say_so(
    scheme: Scheme, columns: int, bits: int | None
) -> None:
    matrix, x, y = quantize(values(24, columns), scheme), values(1, columns), torch.zeros(1, 24)
    ops()._gemv(x, ActivationConsumer(RMSNorm(torch.ones(columns), 1e-6), matrix), y)
    normed = x[0].double() * (x.double().square().mean() + 1e-6).rsqrt()
    exact = dense(matrix) @ normed
    error = float((y[0] - exact).norm() / exact.norm())
    assert activation_bits(matrix) == bits
    # A unit in the last place of what is left: 2^-8 of a block's largest, 2^-11 of a value.
    low, high = {8: (5e-4, 1e-2), 16: (2e-5, 5e-4), None: (0.0, 2e-6)}[bits]
    assert low <= error < high


LABELS = {
    Quantization.NONE: ("none", "none"),
    Quantization.INT8: ("int8", "int8-w8a8"),
    Quantization.FP8: ("fp8-e4m3", "fp8-e4m3-w8a16"),
    Quantization.INT4: ("int4-g128", "int4-g128-w4a8"),
}


@pytest.mark.parametrize("mode", LABELS)
def test_the_engine_reports_what_its_operations_round(
    mode: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        resolve_model("scenes"), quantization=mode, device="cpu", load_format=LoadFormat.DUMMY
    )
    reported = []
    for fused in (None, OWN):
        monkeypatch.setattr("qwencli.engine.native.engine.fused_for", lambda *_, f=fused: f)
        with NativeEngine(config) as engine:
            reported.append(engine.effective.quantization)
    assert tuple(reported) == LABELS[mode]


@pytest.mark.parametrize(
    ("name", "label"), [("awq g64", "awq-int4-g64-w4a8"), ("bnb nf4", "bnb-nf4-w4a8")]
)
def test_prequantized_checkpoints_are_rounded_alike(tmp_path: Path, name: str, label: str) -> None:
    loaded = loaded_from(tmp_path, name)
    assert loaded.effective_scheme(REFERENCE_OPS.activation_bits) == FORMATS[name][-1]
    assert loaded.effective_scheme(activation_bits) == label
