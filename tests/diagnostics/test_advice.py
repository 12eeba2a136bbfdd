from __future__ import annotations

import pytest

from qwencli.config import Attention, Cache, EngineName, Kernels, Quantization
from qwencli.diagnostics.advice import advise
from qwencli.diagnostics.checks.speed import bandwidth
from qwencli.diagnostics.decode_work import image_tokens, token_bytes, work_of
from qwencli.models.listing import list_models
from qwencli.models.memory import CPU_VALUE_BYTES
from qwencli.models.resolve import SearchPaths, resolve_model
from qwencli.models.shape_reader import read_shape
from tests.diagnostics.replay import machine, recorded

GPU = recorded("healthy-5090")["driver"]["gpus"][0]


def shape(name):
    return read_shape(resolve_model(name).hub_config, name)


def with_free(gigabytes, **change):
    return machine(
        "healthy-5090",
        driver={"gpus": [{**GPU, "free_memory_bytes": int(gigabytes * 1e9)}]},
        **change,
    )


@pytest.mark.parametrize(
    ("model", "gigabytes"), [("qwen3-vl-2b", 3.44), ("qwen3-vl-4b", 8.04), ("qwen3-vl-8b", 15.14)]
)
def test_a_token_reads_the_decoder_and_the_head(model, gigabytes):
    assert round(token_bytes(shape(model)) / 1e9, 2) == gigabytes


def test_the_work_of_a_model():
    work = work_of(shape("qwen3-vl-4b"))
    assert (work.layers, work.heads, work.kv_heads, work.head_dim) == (36, 32, 8, 128)
    assert (work.vision_heads, work.vision_head_dim) == (16, 64)
    assert work_of(shape("qwen3-4b")).vision_heads is None
    assert image_tokens(shape("qwen3-vl-4b"), 1024 * 1024) == 1024
    assert image_tokens(shape("qwen3-4b"), 1024 * 1024) == 0


def test_room_for_everything():
    advice = advise(machine("healthy-5090"))
    assert (advice.quantization, advice.engine, advice.cache) == (
        Quantization.NONE, EngineName.NATIVE, Cache.STATIC_GRAPH,
    )  # fmt: skip
    assert (advice.max_seq_len, advice.max_pixels) == (16384, 1024 * 1024)
    assert 190 < advice.limit_tok_per_s < 200
    assert advice.attention is Attention.AUTO, "sdpa would give up the fused attention"
    assert advice.kernels is Kernels.TRITON
    assert "182 fused kernels at 1.1 us in a graph add 0.20 ms" in advice.why[2]
    assert 150 < advice.expected_tok_per_s < advice.limit_tok_per_s
    assert "1610 GB/s (measured)" in advice.why[1]


@pytest.mark.parametrize(
    "change",
    [
        {"packages": {"triton": None}},
        {"probes": {"triton": {"outcome": "failed", "value": None}}},
    ],
)
def test_without_triton_the_plain_operators_are_advised(change):
    advice = advise(machine("healthy-5090", **change))
    assert advice.kernels is Kernels.TORCH
    assert "694 kernels add, as on an H200, about 2.71 ms: about 129 tok/s" in advice.why[2]


def test_what_needs_memory_shrinks_before_the_weights_are_quantized():
    roomy, tight = advise(with_free(16)), advise(with_free(11))
    assert roomy.quantization is tight.quantization is Quantization.NONE
    assert tight.max_seq_len < roomy.max_seq_len
    assert tight.vram_bytes < 11e9
    small, smallest = advise(with_free(8)), advise(with_free(5.5))
    assert (small.quantization, small.engine) == (Quantization.INT8, EngineName.NATIVE)
    assert (smallest.quantization, smallest.engine) == (Quantization.INT4, EngineName.NATIVE)
    assert small.expected_tok_per_s < smallest.expected_tok_per_s


def test_fewer_bits_without_fused_kernels_are_not_promised_a_speed():
    advice = advise(with_free(8, packages={"triton": None}))
    assert (advice.quantization, advice.kernels) == (Quantization.INT8, Kernels.TORCH)
    assert advice.limit_tok_per_s is not None
    assert advice.expected_tok_per_s is None


@pytest.mark.parametrize(
    ("model", "mode", "gigabytes"),
    [("qwen3-vl-4b", "4bit", 2.32), ("qwen3-vl-4b", "8bit", 4.03), ("qwen3-vl-8b", "4bit", 4.31)],
)
def test_a_token_of_fewer_bits_reads_the_quantized_head(model, mode, gigabytes):
    assert round(token_bytes(shape(model), Quantization(mode)) / 1e9, 2) == gigabytes


@pytest.mark.parametrize("free", [3.5, 4, 5, 6, 8, 10, 12, 24, 32])
@pytest.mark.parametrize("model", ["qwen3-vl-2b", "qwen3-vl-8b", "qwen3-8b", "qwen2.5-vl-7b"])
def test_advice_always_fits(free, model):
    advice = advise(with_free(free, model=model))
    if advice.quantization is None:
        assert "does not fit" in advice.why[0]
    else:
        assert advice.vram_bytes <= 0.95 * free * 1e9


def test_nothing_fits():
    advice = advise(with_free(4, model="qwen3-vl-8b"))
    assert advice.quantization is None
    assert "qwen3-vl-8b does not fit: 4-bit needs" in advice.why[0]
    assert "qwen3-vl-2b fits" in advice.why[0]


def test_without_a_measurement_the_vendors_bandwidth_is_used():
    record = recorded("healthy-5090")
    del record["probes"]["bandwidth"]
    box = machine("healthy-5090")
    box._recorded["probes"].pop("bandwidth")
    advice = advise(box)
    assert "what clock and bus width promise" in advice.why[1]


def test_without_a_gpu():
    advice = advise(machine("no-gpu"))
    assert (advice.device, advice.cache) == ("cpu", Cache.STATIC)
    assert "no CUDA device" in advice.why[0]
    large = advise(machine("no-gpu", model="qwen3-vl-32b", memory={"available_bytes": 8 * 10**9}))
    assert "nor in 4bit (" in large.why[1] and "the bundled model `scenes` does" in large.why[1]
    assert large.quantization is None, "there is nothing to apply"


def without_gpu(gigabytes, model):
    return machine("no-gpu", model=model, memory={"available_bytes": int(gigabytes * 1e9)})


@pytest.mark.parametrize(
    ("model", "gigabytes", "mode"),
    [
        ("qwen3-vl-4b", 22.6, "none"),
        ("qwen3-vl-4b", 15, "8bit"),
        ("qwen3-vl-8b", 22.8, "8bit"),
        ("qwen3-vl-8b", 12, "4bit"),
    ],
)
def test_without_a_gpu_the_mode_that_fits_is_named(model, gigabytes, mode):
    advice = advise(without_gpu(gigabytes, model))
    assert advice.quantization is Quantization(mode)
    said = f"--quantization {mode} fits" in " ".join(advice.why)
    assert said == (mode != "none")
    assert advice.limit_tok_per_s == pytest.approx(
        24e9 / token_bytes(shape(model), advice.quantization, value_bytes=4)
    )


@pytest.mark.parametrize("model", ["qwen3-vl-4b", "qwen3-vl-8b"])
def test_a_cpu_needs_as_much_as_the_list_of_models_says(model):
    paths = SearchPaths()
    rows = list_models(paths.custom_models(None), paths, 0, CPU_VALUE_BYTES)
    full = next(row for row in rows if row.name == model).vram_gb["full"]
    assert f"{model} needs {full:.1f} of" in advise(without_gpu(40, model)).why[0]


def test_a_bandwidth_beyond_memory_is_that_of_a_cache():
    rates = {"bandwidth": {"value": {"read_bytes_per_s": 15e9, "token_bytes_per_s": 35e9}}}
    box = machine("no-gpu", probes=rates)
    assert "comes at 35.0 GB/s, as it stays in a cache (memory: 15.0 GB/s)" in advise(box).why[-1]
    evidence = bandwidth(box).evidence
    assert "GB/s from memory; what a token of" in evidence
    assert evidence.endswith("reads stays in a cache and comes at 35 GB/s")
    rates["bandwidth"]["value"]["token_bytes_per_s"] = 16e9
    assert "cache" not in bandwidth(machine("no-gpu", probes=rates)).evidence


def test_where_torch_does_not_load():
    box = machine("healthy-5090", probes={"torch": {"outcome": "crashed", "value": None}})
    assert advise(box).why == ("torch does not load, so nothing can run",)
