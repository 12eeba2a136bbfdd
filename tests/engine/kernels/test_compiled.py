"""What compiled kernels need, found out without a GPU."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwencli.engine.kernels.tiles import FLASH
from tests.engine.quant.test_prequantized import TEXT

# Heads as large as published models have, six queries a key; rows longer than one tile.
WIDE = TEXT | {
    "hidden_size": 1280,
    "intermediate_size": 3072,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "head_dim": 128,
}
MOST_SPILLED = 1024
MOST_SPILLED_OF_FLASH = 48
MOST_JOINING = 64
# Where the result is rounded for the next product: the largest values are looked for among lanes.
MOST_JOINING_AND_ROUNDING = 128
MOST_EXCHANGED_OF_CACHES = 48
KV = (None, "int8", "fp8-e4m3")


OF_EXPERTS = {
    "route_kernel",
    "pick_experts_kernel",
    "sort_pairs_kernel",
    "add_results_kernel",
    "experts_gate_up_kernel",
    "experts_down_kernel",
    "grouped_gemm_kernel",
}
# Compute capabilities, and bytes of shared memory that a program can have there at most.
CARDS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
# With fp8, and little shared memory; `make kernels` tries all.
QUICK = (120,)
EVERY_CARD = "EVERY_CARD" in os.environ
HAS_FP8 = 89
# Minutes of a processor. What they hold changes with the kernels alone.
BY_MAKE_KERNELS = pytest.mark.skipif(not EVERY_CARD, reason="make kernels compiles them")


def compile_kernels(request: pytest.FixtureRequest, *arguments: str) -> list[dict[str, Any]]:
    """What `compile_steps` says of every kernel; each is compiled once, until it changes."""
    assert request.config.cache is not None
    cache = request.config.cache.mkdir("compiled")
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    module = "tests.engine.kernels.compile_steps"
    command = [sys.executable, "-m", module, json.dumps(WIDE), *arguments]
    root = Path(__file__).parents[3]
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be compiling them
        ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return compile_kernels(request)


@pytest.mark.parametrize("card", CARDS if EVERY_CARD else QUICK)
def test_kernels_of_many_rows_fit_the_card(request: pytest.FixtureRequest, card: int) -> None:
    """And need no instruction that it lacks: they would not compile."""
    found = compile_kernels(request, str(card))
    assert {
        "add_norm_kernel",
        "decode_attention_kernel",
        "finish_token_kernel",
        "likeliest_kernel",
        "quantize_rows_kernel",
        "tiled_gemm_kernel",
        "verify_drafts_kernel",
        *OF_EXPERTS,
    } == {kernel["kernel"] for kernel in found}
    products = [kernel for kernel in found if kernel["kernel"] == "tiled_gemm_kernel"]
    formats = {kernel["quantization"] for kernel in products}
    assert formats == {"int8", "int4", *(["fp8-e4m3"] if card >= HAS_FP8 else [])}
    assert [kernel for kernel in found if kernel["spilled"]] == []
    assert [kernel for kernel in found if kernel["shared"] > CARDS[card]] == []


@BY_MAKE_KERNELS
@pytest.mark.parametrize("card", CARDS)
def test_kernels_of_gated_delta_nets_fit_the_card(
    request: pytest.FixtureRequest, card: int
) -> None:
    """And keep states in registers."""
    found = compile_kernels(request, str(card), "delta")
    steps = {k["tokens"] for k in found if k["kernel"] == "delta_step_kernel"}
    assert steps == {1, 4}
    assert {
        "adopt_accepted_kernel",
        "delta_conv_kernel",
        "delta_output_kernel",
        "delta_scan_kernel",
        "delta_solve_kernel",
        "delta_step_kernel",
        "gated_norm_kernel",
    } == {kernel["kernel"] for kernel in found}
    assert [kernel for kernel in found if kernel["spilled"]] == []
    assert [kernel for kernel in found if kernel["shared"] > CARDS[card]] == []


@BY_MAKE_KERNELS
@pytest.mark.parametrize("card", sorted({major * 10 + minor for (major, minor), *_ in FLASH}))
def test_attention_of_many_queries_fits_the_card(request: pytest.FixtureRequest, card: int) -> None:
    found = compile_kernels(request, str(card), "flash")
    assert {kernel["kernel"] for kernel in found} == {"flash_attention_kernel"}
    assert len(found) >= len([key for key in FLASH if key[0] == divmod(card, 10)])
    # Heads of 256 columns fill all registers; tiles of which nothing spills are slower.
    assert [kernel for kernel in found if kernel["spilled"] > MOST_SPILLED_OF_FLASH] == []
    assert [kernel for kernel in found if kernel["shared"] > CARDS[card]] == []


@BY_MAKE_KERNELS
def test_no_kernel_keeps_kilobytes_in_memory_that_belong_in_registers(
    compiled: list[dict[str, Any]],
) -> None:
    """Attention in float32 once kept five, and with heads of 128 gave wrong results on a GPU."""
    assert {
        "decode_attention_kernel",
        "gemv_kernel",
        "gemm_kernel",
        "gemm_float16_kernel",
        "gemm_quantized_kernel",
        "verify_drafts_kernel",
        "finish_token_kernel",
        "likeliest_kernel",
        "qk_norm_rope_kernel",
        "dequantize_kernel",
    } <= {kernel["kernel"] for kernel in compiled}
    assert [kernel for kernel in compiled if kernel["spilled"] > MOST_SPILLED] == []


@BY_MAKE_KERNELS
def test_attention_keeps_everything_in_registers(compiled: list[dict[str, Any]]) -> None:
    """Of one and of several tokens, over plain and quantized caches: joining parts once spilled."""
    attention = [kernel for kernel in compiled if kernel["kernel"] == "decode_attention_kernel"]
    seen = {(k["dtype"], k["kv"], k["tokens"]) for k in attention if not k["rows"]}
    of_rows = {(k["dtype"], k["kv"]) for k in attention if k["rows"] == 8}
    caches = [("torch.float32", None), *(("torch.bfloat16", kv) for kv in KV)]
    assert {(*cache, tokens) for cache in caches for tokens in (2, 8)} <= seen
    assert of_rows == set(caches)
    assert {k["quantization"] for k in attention} == {"none", "8bit", "fp8", "4bit"}
    assert [kernel for kernel in attention if kernel["spilled"]] == []


@BY_MAKE_KERNELS
def test_parts_of_attention_are_joined_within_threads(compiled: list[dict[str, Any]]) -> None:
    """Where the parts of a place are dealt to several threads, they meet through shared memory."""
    attention = [kernel for kernel in compiled if kernel["kernel"] == "decode_attention_kernel"]
    for kernel in attention:
        rounding = max(kernel["tokens"], kernel["rows"]) > 1 and kernel["quantization"] != "none"
        most = MOST_JOINING_AND_ROUNDING if rounding else MOST_JOINING
        assert 0 < kernel["joining"] <= most, kernel


@BY_MAKE_KERNELS
def test_operands_of_products_are_loaded_where_they_are_multiplied(
    compiled: list[dict[str, Any]],
) -> None:
    names = ("gemm_quantized_kernel", "gemm_float16_kernel")
    products = [kernel for kernel in compiled if kernel["kernel"] in names]
    assert {kernel["quantization"] for kernel in products} == {"none", "8bit", "fp8", "4bit"}
    assert [kernel for kernel in products if kernel["exchanges"]] == []
    assert [kernel for kernel in products if kernel["spilled"] > 16] == []
    attention = [k for k in compiled if k["kernel"] == "decode_attention_kernel"]
    halves = [k for k in attention if "bfloat16" in k["dtype"]]
    assert all(kernel["exchanges"] for kernel in halves), "the count sees exchanges"
    # Weights change lanes, scales and largest scores go around; keys and values do not.
    # Pages are read value by value.
    cached = [k for k in halves if k["kv"] and not k["rows"]]
    assert [k for k in cached if k["exchanges"] > MOST_EXCHANGED_OF_CACHES] == []
