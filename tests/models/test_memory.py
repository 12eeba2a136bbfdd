"""Memory estimates against figures that can be worked out by hand or are published."""

from __future__ import annotations

import pytest

from qwencli.config import Quantization
from qwencli.models.builtin import BUILTINS, hub_config
from qwencli.models.memory import (
    CPU_VALUE_BYTES,
    RUNTIME_BYTES,
    estimate,
    kv_cache_bytes,
    prefill_peak_bytes,
    vision_peak_bytes,
    weight_bytes,
)
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import parameter_count


def shape_of(alias):
    return read_shape(hub_config(alias))


def test_full_weights_are_two_bytes_a_parameter():
    # The hub's Qwen3-VL-4B-Instruct holds 8.88 GB of safetensors.
    assert weight_bytes(shape_of("qwen3-vl-4b")) == 2 * parameter_count(shape_of("qwen3-vl-4b"))
    assert weight_bytes(shape_of("qwen3-vl-4b")) / 1e9 == pytest.approx(8.88, abs=0.01)


def test_kv_cache_of_qwen3_4b():
    # 2 (k, v) x 36 layers x 8 heads x 128 x 2 bytes = 144 KiB a token.
    assert kv_cache_bytes(shape_of("qwen3-4b"), 1) == 144 * 1024
    assert kv_cache_bytes(shape_of("qwen3-4b"), 1000, batch=3) == 144 * 1024 * 3000


@pytest.mark.parametrize("alias", BUILTINS)
def test_smaller_modes_need_less(alias):
    shape = shape_of(alias)
    sizes = [weight_bytes(shape, q) for q in (Quantization.INT4, Quantization.INT8)]
    assert sizes[0] < sizes[1] < weight_bytes(shape)
    assert sizes[0] > parameter_count(shape) / 2
    assert abs(weight_bytes(shape, Quantization.FP8) / sizes[1] - 1) < 0.01


def test_embeddings_and_head_stay_in_half_precision():
    shape = shape_of("qwen3-8b")
    kept = 2 * 2 * shape.text.vocab_size * shape.text.hidden_size
    linear = parameter_count(shape) - 2 * shape.text.vocab_size * shape.text.hidden_size
    assert weight_bytes(shape, Quantization.INT4) == pytest.approx(
        kept + linear * 0.5625, rel=0.001
    )


def test_vision_peak_grows_with_the_image_and_is_nothing_for_text():
    shape = shape_of("qwen3-vl-4b")
    assert vision_peak_bytes(shape, 2048) == 2 * vision_peak_bytes(shape, 1024)
    # 4096 patches x (2 x 1024 + 2 x 4096) features x 2 bytes, pixels 1536 x 4, features 4 x 2560.
    assert vision_peak_bytes(shape, 1024) == 4096 * (20480 + 6144) + 1024 * 2560 * 4 * 2
    assert vision_peak_bytes(shape_of("qwen3-4b"), 1024) == 0


def test_total_is_the_sum_of_its_parts():
    shape = shape_of("qwen3-vl-4b")
    whole = estimate(shape, context_tokens=2048, image_tokens=1024)
    assert whole.total == (
        weight_bytes(shape)
        + kv_cache_bytes(shape, 2048)
        + max(vision_peak_bytes(shape, 1024), prefill_peak_bytes(shape, 2048))
        + RUNTIME_BYTES
    )
    assert 9e9 < whole.total < 11e9


def test_on_a_cpu_what_is_not_quantized_takes_twice_the_bytes():
    shape = shape_of("qwen3-vl-4b")
    half, wide = estimate(shape), estimate(shape, value_bytes=CPU_VALUE_BYTES)
    assert wide.total - RUNTIME_BYTES == 2 * (half.total - RUNTIME_BYTES)
    packed = (
        estimate(shape, Quantization.INT4),
        estimate(shape, Quantization.INT4, value_bytes=CPU_VALUE_BYTES),
    )
    assert packed[0].weights < packed[1].weights < 2 * packed[0].weights, "the embedding is wider"
