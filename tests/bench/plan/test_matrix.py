from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.plan.matrix import AXES, Matrix, check_values, expand, override
from qwencli.capabilities import KEEPS_STATES, PREQUANTIZED, ROWS_ONLY
from qwencli.config import Cache
from qwencli.engine.machine.device import DeviceFacts
from qwencli.errors import BenchError, UsageError

TRANSFORMERS = {"engine": "transformers"}
NO_FACTS = DeviceFacts("cpu", None, None, None, None, "2.13", None, None, "no flash", "no compiler")

values = {
    axis: st.lists(
        st.text(min_size=1, max_size=30)
        if kinds is None
        else st.sampled_from([k.value for k in kinds]),
        min_size=1,
        max_size=3,
        unique=True,
    ).map(tuple)
    for axis, kinds in AXES.items()
}
# Cells of one matrix: with more, an example takes a second and says nothing else.
MOST_CELLS = 300


def is_small(axes):
    return math.prod(map(len, axes.values())) <= MOST_CELLS


axes_said = st.fixed_dictionaries({}, optional=values).filter(is_small)
excludes = st.lists(axes_said.filter(bool), max_size=2).map(tuple)


@given(axes_said, excludes)
def test_expansion_is_the_product_without_the_excluded(axes, exclude):
    matrix = Matrix("m", axes, exclude)
    whole = expand(replace(matrix, exclude=()), "default-model", NO_FACTS)
    sizes = [len(axes.get(axis, (None,))) for axis in AXES]
    assert len(whole) == len(list(itertools.product(*map(range, sizes))))
    wanted = [
        cell
        for cell in whole
        if not any(
            all(cell.axes()[axis] in said for axis, said in rule.items()) for rule in exclude
        )
    ]
    if wanted:
        # Which of two cells with equal work runs depends on which are left.
        ids = [cell.cell_id for cell in expand(matrix, "default-model", NO_FACTS)]
        assert ids == [cell.cell_id for cell in wanted]
    else:
        with pytest.raises(BenchError, match="no cell left"):
            expand(matrix, "default-model", NO_FACTS)


@given(axes_said)
def test_cell_ids_are_unique_stable_and_safe_as_file_names(axes):
    cells = expand(Matrix("m", axes), "default-model", NO_FACTS)
    ids = [cell.cell_id for cell in cells]
    assert len(set(ids)) == len(ids)
    assert ids == [cell.cell_id for cell in expand(Matrix("m", axes), "default-model", NO_FACTS)]
    for cell_id in ids:
        assert set(cell_id) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-.")
        assert len(cell_id) < 150
        assert cell_id[0] not in "-."


def ran(facts, **axes):
    cells = expand(Matrix("m", axes), "scenes", facts)
    return [(str(c.attention), str(c.cache), str(c.kernels)) for c in cells if not c.skip_reason]


def test_cells_that_differ_in_nothing_run_once(cpu, gpu):
    attention, caches = ("auto", "sdpa"), ("dynamic", "static")
    # Static steps of the CPU may attend with numpy where the choice is theirs.
    assert ran(cpu, attention=attention, cache=caches) == [
        ("auto", "dynamic", "auto"), ("auto", "static", "auto"), ("sdpa", "static", "auto"),
    ]  # fmt: skip
    assert ran(gpu, attention=attention, cache=(*caches, "static-graph")) == [
        ("auto", "dynamic", "auto"), ("auto", "static", "auto"),
        ("auto", "static-graph", "auto"), ("sdpa", "static-graph", "auto"),
    ]  # fmt: skip
    assert ran(cpu, engine=("transformers",), attention=attention) == [("auto", "dynamic", "auto")]
    assert ran(gpu, cache=("static-graph",), kernels=("auto", "torch")) == [
        ("sdpa", "static-graph", "auto"), ("sdpa", "static-graph", "torch"),
    ]  # fmt: skip
    assert ran(gpu, cache=("static-graph",), kernels=("auto", "triton")) == [
        ("sdpa", "static-graph", "auto")
    ]
    assert ran(gpu, quantization=("4bit",), cache=("static",), attention=attention) == [
        ("auto", "static", "auto"), ("sdpa", "static", "auto"),
    ]  # fmt: skip
    assert ran(cpu, kernels=("auto", "torch")) == [("sdpa", "dynamic", "auto")]


def test_a_cell_that_is_not_run_says_which_one_is(cpu):
    _, again = expand(Matrix("m", {"attention": ("auto", "sdpa")}), "scenes", cpu)
    assert again.skip_reason == "the same work here as attention auto, which is measured"


@pytest.mark.parametrize("prequantized", [False, True])
def test_kernels_of_a_checkpoint_that_came_quantized_are_as_of_one_quantized_here(
    gpu, prequantized
):
    matrix = Matrix("m", {"cache": ("static",), "kernels": ("auto", "triton", "torch")})
    cells = expand(matrix, "scenes", gpu, {"scenes": {PREQUANTIZED: prequantized}})
    run = [cell.kernels.value for cell in cells if cell.skip_reason is None]
    assert run == (["auto", "torch"] if prequantized else ["auto", "triton"])


def test_cell_id_is_readable_and_does_not_change(cpu):
    (cell,) = expand(Matrix("m", {"engine": ("transformers",)}), "scenes", cpu)
    assert cell.cell_id == "scenes-transformers-none-sdpa-dynamic-keep-bd2d7d"


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"engine": "native", "cache": "static-graph"}, "need a CUDA device"),
        ({**TRANSFORMERS, "cache": "static-graph"}, "static-compile is the nearest"),
        ({**TRANSFORMERS, "quantization": "fp8"}, "8bit is the nearest"),
        ({"attention": "flash_attention_2"}, "needs a CUDA device"),
        ({**TRANSFORMERS, "speculate": "auto"}, "drafted tokens need the native engine"),
        ({"engine": "native", "speculate": "3"}, "cannot take back the keys and values"),
        (
            {**TRANSFORMERS, "quantization": "4bit", "cache": "static-compile"},
            "does not compile a bitsandbytes",
        ),
    ],
)
def test_cells_that_cannot_run_name_the_reason(axes, reason, cpu):
    (cell,) = expand(Matrix("m", {axis: (value,) for axis, value in axes.items()}), "scenes", cpu)
    assert reason in (cell.skip_reason or "")


def test_what_a_model_has_no_operations_for_skips_its_cells_alone():
    axes = {"model": ("dense", "hybrid"), "cache": ("dynamic", "static"), "engine": ("native",)}
    traits = {"dense": {ROWS_ONLY: False}, "hybrid": {ROWS_ONLY: True, KEEPS_STATES: True}}
    cells = expand(Matrix("m", axes), "", NO_FACTS, traits)
    skipped = [(cell.model, cell.cache) for cell in cells if cell.skip_reason]
    assert skipped == [("hybrid", Cache.DYNAMIC)]


def test_what_is_missing_on_the_machine_skips_cells(gpu):
    poor = replace(gpu, bitsandbytes_version=None, compile_blocker="no Triton")
    axes = {
        "engine": ("transformers",),
        "quantization": ("none", "8bit", "4bit"),
        "cache": ("dynamic", "static-compile"),
    }
    reasons = {
        c.cell_id.split("-", 2)[2]: c.skip_reason for c in expand(Matrix("m", axes), "x", poor)
    }
    assert sum(reason is None for reason in reasons.values()) == 1
    assert {r for r in reasons.values() if r} == {
        "no Triton; --cache static is the nearest",
        "8bit needs bitsandbytes, which is not installed; --engine native is the nearest",
        "4bit needs bitsandbytes, which is not installed; --engine native is the nearest",
    }


def test_a_capable_gpu_skips_nothing_the_engine_has(gpu):
    axes = {
        "attention": ("sdpa", "eager", "flash_attention_2"),
        "cache": ("dynamic", "static-compile"),
    }
    assert all(cell.skip_reason is None for cell in expand(Matrix("m", axes), "x", gpu))


def test_command_line_replaces_axes_of_the_matrix():
    matrix = Matrix("m", {"attention": ("sdpa",), "cache": ("static",)})
    said = {"attention": "eager, sdpa,eager", "model": None}
    assert override(matrix, said).axes == {"attention": ("eager", "sdpa"), "cache": ("static",)}


@pytest.mark.parametrize(
    ("axis", "text", "message"),
    [
        ("attention", "sdp", "--attention has no value 'sdp'"),
        ("load_mode", "keep,", "--load-mode has an empty value"),
        ("model", "", "--model has an empty value"),
    ],
)
def test_wrong_values_are_named(axis, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        override(Matrix("m", {}), {axis: text})
    assert caught.value.hint


def test_exclusions_of_the_command_line_come_on_top(cpu):
    axes = {"attention": ("sdpa", "eager"), "cache": ("dynamic", "static")}
    matrix = Matrix("m", axes, ({"attention": ("sdpa",), "cache": ("static",)},))
    said = ["attention=eager, cache=static,cache=dynamic", "load-mode=reload"]
    (cell,) = expand(override(matrix, {}, said), "scenes", cpu)
    assert (cell.attention, cell.cache) == ("sdpa", "dynamic")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eager", "--exclude has 'eager'"),
        ("speed=fast", "--exclude has 'speed=fast'"),
        ("attention=sdp", "--attention has no value 'sdp'"),
        ("attention=", "--attention has an empty value"),
        ("", "--exclude has ''"),
    ],
)
def test_wrong_exclusions_are_named(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        override(Matrix("m", {}), {}, [text])
    assert caught.value.hint


def test_the_hint_lists_the_values_of_the_axis():
    with pytest.raises(UsageError) as caught:
        check_values("cache", ("statics",))
    assert "static-compile" in caught.value.hint


def test_matrix_and_report_never_import_torch():
    names = (
        "plan.matrix_file",
        "plan.prepare",
        "report.campaign_report",
        "run.bench_run",
        "run.worker",
    )
    modules = ", ".join(f"qwencli.bench.{name}" for name in names)
    script = (
        f"import sys; sys.modules['torch'] = None; import {modules}; import qwencli.commands.bench"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
