from __future__ import annotations

import itertools

import pytest

from qwencli.capabilities import (
    AXES,
    BATCH_INVARIANT,
    KEEPS_STATES,
    ROWS_ONLY,
    TABLE,
    Need,
    fastest_cache,
    fastest_kernels,
    runs_with,
    why_not,
)
from qwencli.config import Cache, EngineName, Kernels

ON_A_CPU = {
    Need.CUDA: "this runs on cpu",
    Need.TRITON: "triton kernels need an NVIDIA GPU",
    Need.FLASH_ATTN: "flash_attention_2 needs a CUDA GPU",
}
EVERYTHING_MISSING = dict.fromkeys(Need, "it is not here")


def combinations():
    """Of every mode with every other one; how many tokens are drafted makes no difference."""
    names, values = list(AXES), {**AXES, "speculate": ("off", "auto", "1")}
    for modes in itertools.product(*values.values()):
        yield dict(zip(names, modes, strict=True))


@pytest.mark.parametrize("lacks", [{}, ON_A_CPU, EVERYTHING_MISSING])
def test_the_nearest_modes_lead_to_one_that_runs(lacks):
    """Whoever does what a refusal says, one after the other, ends with modes that run."""
    # Both at once have no mode that runs.
    others = ({}, {BATCH_INVARIANT: True}, {ROWS_ONLY: True, KEEPS_STATES: True})
    for modes, other in itertools.product(combinations(), others):
        asked = {**modes, **other}
        for _ in range(len(AXES) + 2):
            refusal = why_not(asked, lacks)
            if refusal is None:
                break
            flag, value = refusal.nearest.split()
            asked[flag.removeprefix("--").replace("-", "_")] = value
        else:
            pytest.fail(f"{modes}: {refusal}")


def test_every_entry_is_reached():
    reached = set()
    for lacks in ({}, ON_A_CPU, EVERYTHING_MISSING, *({need: "missing"} for need in Need)):
        others = [(False, False), (True, False)]
        others += [(False, True), (True, True)] if not lacks else []
        for modes, (invariant, keeps) in itertools.product(combinations(), others):
            asked = {**modes, BATCH_INVARIANT: invariant, ROWS_ONLY: keeps, KEEPS_STATES: keeps}
            refusal = why_not(asked, lacks)
            if refusal is not None:
                reached.add((refusal.axis, refusal.reason.replace(refusal.value, "{value}")))
    said = {limit.reason for limit in TABLE if limit.reason}
    reasons = {reason for _, reason in reached}
    assert all(
        reason in reasons or any(reason.replace(v, "{value}") in reasons for v in limit.values)
        for limit in TABLE
        if (reason := limit.reason)
    ), said - reasons


def test_a_refusal_is_an_error_that_names_the_nearest():
    refusal = why_not({"engine": "native", "cache": "static-graph"}, ON_A_CPU)
    error = refusal.error()
    assert error.message == "--cache static-graph cannot run: CUDA graphs need a CUDA device"
    assert (error.hint, error.nearest) == ("use --cache static instead", "static")
    assert str(refusal).endswith("; --cache static is the nearest")


def test_what_the_engine_chooses_runs():
    for engine, lacks in itertools.product(EngineName, ({}, ON_A_CPU, EVERYTHING_MISSING)):
        assert why_not({"engine": engine, "cache": fastest_cache(engine, lacks)}, lacks) is None
    assert fastest_cache(EngineName.NATIVE, {}) is Cache.STATIC_GRAPH
    without_graphs = {Need.GRAPHS: "another allocator"}
    assert fastest_cache(EngineName.NATIVE, without_graphs) is Cache.STATIC


def test_kernels_that_are_launched_one_by_one_are_for_quantized_weights():
    """Unless somebody asks for them; and where they cannot run torch's operators do."""
    graph, static, dynamic = Cache.STATIC_GRAPH, Cache.STATIC, Cache.DYNAMIC
    chosen = {
        (cache, quantized): fastest_kernels(cache, quantized, {})
        for cache in (graph, static, dynamic)
        for quantized in (False, True)
    }
    ours = {(graph, False), (graph, True), (static, True)}
    assert {key for key, kernels in chosen.items() if kernels is Kernels.TRITON} == ours
    assert fastest_kernels(static, True, ON_A_CPU) is Kernels.TORCH
    assert why_not({"engine": "native", "cache": "static", "kernels": "triton"}) is None


def test_help_says_what_modes_run_with():
    assert runs_with("quantization") == "fp8: native"
    assert runs_with("kernels").startswith("triton: native, static or static-graph, an NVIDIA GPU")
    assert runs_with("speculate") == "Runs with native, static or static-graph"
    assert runs_with("engine") == ""
