"""Bytes a token against figures that can be worked out by hand."""

from __future__ import annotations

import pytest

from qwencli.models.builtin import hub_config
from qwencli.models.memory import decode_bytes
from qwencli.models.shape_reader import read_shape


@pytest.mark.parametrize(
    ("alias", "gigabytes"), [("qwen3-vl-2b", 3.44), ("qwen3-vl-4b", 8.04), ("qwen3-vl-8b", 15.14)]
)
def test_unquantized_weights_of_the_decoder_are_read_once(alias, gigabytes):
    assert decode_bytes(read_shape(hub_config(alias)), "none", 2, 0) / 1e9 == pytest.approx(
        gigabytes, abs=0.005
    )


def test_each_token_of_the_context_adds_its_keys_and_values():
    shape = read_shape(hub_config("qwen3-vl-4b"))
    more = decode_bytes(shape, "none", 2, 101.5) - decode_bytes(shape, "none", 2, 1.5)
    assert more == 100 * 147_456
    assert decode_bytes(shape, "none", 4, 10) == 2 * decode_bytes(shape, "none", 2, 10)


def test_quantized_weights_by_hand():
    # 36 layers of QKV 6144 x 2560, O 2560 x 4096, gate and up 2 x 9728 x 2560, down 2560 x 9728.
    shape = read_shape(hub_config("qwen3-vl-4b"))
    linears = 36 * (6144 * 2560 + 2560 * 4096 + 3 * 9728 * 2560)
    saved = decode_bytes(shape, "none", 2, 0) - decode_bytes(shape, "bnb-nf4", 2, 0)
    assert saved == linears * (2 - 0.5 - 4 / 64)
    rows = 36 * (6144 + 2560 + 2 * 9728 + 2560)
    saved = decode_bytes(shape, "none", 2, 0) - decode_bytes(shape, "bnb-int8", 2, 0)
    assert saved == linears - 4 * rows


def test_prequantized_checkpoints_by_hand():
    shape = read_shape(hub_config("qwen3-vl-4b"))
    linears = 36 * (6144 * 2560 + 2560 * 4096 + 3 * 9728 * 2560)
    plain = decode_bytes(shape, "none", 2, 0)
    assert plain - decode_bytes(shape, "awq-int4-g128", 2, 0) == linears * (2 - 0.5 - 4 / 128)
    assert plain - decode_bytes(shape, "gptq-int4-g32", 2, 0) == linears * (2 - 0.5 - 4 / 32)
    assert plain - decode_bytes(shape, "hf-fp8-e4m3-g128", 2, 0) == linears * (2 - 1 - 4 / 128)
    rows = 36 * (6144 + 2560 + 2 * 9728 + 2560)
    assert plain - decode_bytes(shape, "ct-int8", 2, 0) == linears - 4 * rows
    assert decode_bytes(shape, "awq-int4-g128+none", 2, 0) is None


@pytest.mark.parametrize(
    ("label", "stored"),
    [
        ("int8-w8a8", "int8"),
        ("fp8-e4m3-w8a16", "fp8-e4m3"),
        ("int4-g128-w4a8", "int4-g128"),
        ("awq-int4-g128-w4a8", "awq-int4-g128"),
    ],
)
def test_rounded_vectors_change_no_weight(label, stored):
    shape = read_shape(hub_config("qwen3-vl-4b"))
    assert decode_bytes(shape, label, 2, 100) == decode_bytes(shape, stored, 2, 100)


def test_an_unknown_scheme_has_no_figure():
    assert decode_bytes(read_shape(hub_config("qwen3-vl-4b")), "gptq", 2, 0) is None
