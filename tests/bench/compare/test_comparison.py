from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qwencli.bench.compare.comparison import Verdict, compare, decide
from qwencli.bench.compare.comparison_tables import comparison_document, comparison_table
from qwencli.bench.compare.intervals import Intervals
from qwencli.bench.compare.sides import read_side
from qwencli.bench.statistics.robust import Interval
from qwencli.config import Attention, Cache
from qwencli.errors import BenchError, UsageError
from tests.bench.comparing import ENVIRONMENT, cell, make_side, write_campaign

STEADY = [100.0, 100.1, 99.9, 100.0, 100.05]
SDPA, EAGER, STATIC = cell(), cell(attention=Attention.EAGER), cell(cache=Cache.STATIC)


def slower(values, percent):
    return [value * (1 - percent / 100) for value in values]


def intervals(low, high, change_low, change_high):
    """Interval to be the same, and the wider one to be a change."""
    middle = (low + high) / 2
    return Intervals(
        Interval(middle, low, high, 0.9),
        Interval(middle, change_low, change_high, 0.99),
        few=False,
        restless=False,
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.995, 1.005, "SAME"),
        (1.002, 1.008, "SAME"),
        (1.02, 1.03, "FASTER"),
        (0.97, 0.98, "SLOWER"),
        (0.98, 1.0, "AMBIGUOUS"),
        (1.005, 1.02, "AMBIGUOUS"),
        (0.9, 1.1, "AMBIGUOUS"),
    ],
)
def test_the_interval_against_the_band(low, high, verdict):
    assert decide(intervals(low, high, low, high)) == verdict


def test_a_change_needs_the_wider_interval_and_the_same_does_not():
    assert decide(intervals(0.97, 0.98, 0.96, 0.995)) == "AMBIGUOUS"
    assert decide(intervals(1.02, 1.03, 1.005, 1.05)) == "AMBIGUOUS"
    assert decide(intervals(0.995, 1.005, 0.98, 1.02)) == "SAME"


@given(st.floats(0.5, 2.0), st.floats(0.5, 2.0), st.floats(0.001, 0.2))
def test_swapping_the_sides_mirrors_the_verdict(x, y, threshold):
    low, high = min(x, y), max(x, y)
    mirrored = {"FASTER": "SLOWER", "SLOWER": "FASTER"}
    edges = (1 + threshold, 1 / (1 + threshold))
    if any(abs(value - edge) < 1e-9 for value in (low, high) for edge in edges):
        return
    there = decide(intervals(low, high, low, high), threshold)
    back = decide(intervals(1 / high, 1 / low, 1 / high, 1 / low), threshold)
    assert back == mirrored.get(there, there)


def test_no_interval_is_ambiguous():
    found = compare(make_side({SDPA: [100.0, 100.0]}), make_side({SDPA: STEADY}))
    assert found.cells[0].verdict is Verdict.AMBIGUOUS
    assert found.cells[0].remarks == ("an interval needs 3 runs on each side",)


def test_the_warm_up_counts_in_no_figure():
    found = compare(make_side({SDPA: STEADY}), make_side({SDPA: STEADY}))
    assert (found.cells[0].a.speeds, found.cells[0].verdict) == (tuple(STEADY), Verdict.SAME)


def test_an_unstable_cell_changes_only_where_no_runs_overlap():
    # Runs in two stretches of time, as a busy machine gives them; medians 50 % apart.
    calm, busy = [100.0] * 6 + [60.0] * 4, [60.0] * 6 + [67.0] * 4
    (found,) = compare(make_side({SDPA: calm}), make_side({SDPA: busy})).cells
    assert found.verdict is Verdict.AMBIGUOUS
    assert found.ratio.change.low <= found.ratio.same.low <= 0.6
    assert found.ratio.change.high >= found.ratio.same.high >= 67 / 60
    assert found.remarks == ("unstable: the interval spans half of the runs",)
    slow = [value / 10 for value in busy]
    (found,) = compare(make_side({SDPA: calm}), make_side({SDPA: slow})).cells
    assert found.verdict is Verdict.SLOWER


def test_a_few_slow_runs_cost_power_and_not_the_verdict():
    steady, hiccups = [STEADY] * 5, [[*STEADY[:-1], 9.0]] * 5
    (found,) = compare(make_side({SDPA: steady}), make_side({SDPA: hiccups})).cells
    assert not any(remark.startswith("unstable") for remark in found.remarks)
    assert found.ratio.same.low > 0.95


def busy_side(speeds, percent, **changes):
    side = make_side(speeds, **changes)
    cells = [replace(cell, row={**cell.row, "waited_percent": percent}) for cell in side.cells]
    return replace(side, cells=tuple(cells))


@pytest.mark.parametrize("busy", ["A", "B", "AB"])
def test_a_side_on_a_busy_machine_is_never_faster_or_slower(busy):
    quick, slow = {SDPA: [STEADY] * 5}, {SDPA: [slower(STEADY, 90)] * 5}
    a, b = busy_side(quick, 51.0 * ("A" in busy)), busy_side(slow, 51.0 * ("B" in busy))
    (found,) = compare(a, b).cells
    assert found.verdict is Verdict.AMBIGUOUS
    said = [f"the host was busy in {name}: 51% of decode waited for a processor" for name in busy]
    assert [remark for remark in found.remarks if "busy" in remark] == said
    assert compare(busy_side(quick, 4.0), busy_side(slow, 4.0)).cells[0].verdict is Verdict.SLOWER


def test_sides_that_took_turns_are_judged_by_pairs():
    levels = [1.0, 0.3, 0.9, 0.25, 1.1, 0.8, 0.3, 1.0, 0.5, 1.0]
    before = {SDPA: [[100 * level] * 3 for level in levels]}
    after = {SDPA: [[94 * level] * 3 for level in levels]}
    turns = {"environment": {"in_turns": "x"}}
    (found,) = compare(busy_side(before, 40.0, **turns), busy_side(after, 40.0, **turns)).cells
    assert (found.verdict, found.ratio.same.estimate) == (Verdict.SLOWER, pytest.approx(0.94))
    # One side alone was busy: what they differ by may be that.
    (found,) = compare(busy_side(before, 40.0, **turns), busy_side(after, 0.0, **turns)).cells
    assert found.verdict is Verdict.AMBIGUOUS
    (found,) = compare(make_side(before), make_side(after, **turns)).cells
    assert found.verdict is Verdict.AMBIGUOUS


def test_what_may_not_be_quoted_is_a_range_beside_the_estimate_of_its_interval():
    levels = [1.0, 0.3, 0.9, 0.25, 1.1, 0.8, 0.3, 1.0, 0.5, 1.0]
    turns = {"environment": {"in_turns": "x"}}
    a, b = (
        make_side({SDPA: [[speed * level] * 3 for level in levels]}, **turns) for speed in (100, 94)
    )
    found = compare(a, b)
    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table(found))
    assert " 25-110 " in console.file.getvalue()
    assert comparison_document(found)["cells"][0]["ratio"] == pytest.approx(0.94)


def test_processes_are_told_apart_by_their_warm_ups():
    # Steady within, 5 % apart between: what one process a side would call FASTER by 5 %.
    low, high = slower(STEADY, 5), STEADY
    a, b = make_side({SDPA: [low, high, low]}), make_side({SDPA: [high, high, low]})
    (found,) = compare(a, b).cells
    assert found.a.processes == (tuple(low), tuple(high), tuple(low))
    assert (found.verdict, found.ratio.few) == (Verdict.AMBIGUOUS, False)


def test_what_is_known_of_gpus_is_taken_for_no_other_device():
    environment = {"device": {"device": "cpu", "name": None, "driver": None}}
    sides = [
        make_side({SDPA: values}, environment=environment) for values in (STEADY, slower(STEADY, 3))
    ]
    (found,) = compare(*sides).cells
    assert found.verdict is Verdict.AMBIGUOUS
    (found,) = compare(make_side({SDPA: STEADY}), make_side({SDPA: slower(STEADY, 3)})).cells
    assert found.verdict is Verdict.SLOWER


def test_a_wider_band_takes_more_as_the_same():
    a, b = make_side({SDPA: STEADY}), make_side({SDPA: slower(STEADY, 3)})
    assert compare(a, b).cells[0].verdict is Verdict.SLOWER
    assert compare(a, b, threshold=0.05).cells[0].verdict is Verdict.SAME


@pytest.mark.parametrize("threshold", [0.0, -0.01, float("nan")])
def test_a_band_without_width_is_refused(threshold):
    side = make_side({SDPA: STEADY})
    with pytest.raises(UsageError, match="is not above zero"):
        compare(side, side, threshold=threshold)


CPU_BOX = {"device": {"device": "cpu", "name": None, "driver": None}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": CPU_BOX}, "device: NVIDIA GeForce RTX 5090 (cuda) against no GPU (cpu)"),
        (
            {"environment": {"cpu": {"model": "other", "logical_cores": 8}}},
            "CPU: a CPU, 16 cores against other, 8 cores",
        ),
        ({"plan": {"prompt": "Why?"}}, "prompt: Describe this image. against Why?"),
        ({"plan": {"images": []}}, "images: scene.png 8260cc42 against none"),
        ({"plan": {"max_new_tokens": 32}}, "max_new_tokens: 64 against 32"),
        ({"plan": {"dtype": "float16"}}, "dtype: auto against float16"),
        ({"plan": {"load_format": "dummy"}}, "load_format: auto against dummy"),
        ({"num_prompt_tokens": 90}, "num_prompt_tokens: 70 against 90 and 1 more cells"),
    ],
)
def test_unlike_campaigns_are_refused_by_name_unless_forced(changes, said):
    a = make_side({SDPA: STEADY, EAGER: STEADY})
    b = make_side({SDPA: STEADY, EAGER: STEADY}, name="B", **changes)
    with pytest.raises(BenchError) as caught:
        compare(a, b)
    assert caught.value.message == f"A and B are not alike: {said}"
    assert "--force" in caught.value.hint
    forced = compare(a, b, force=True)
    assert (forced.forced, len(forced.cells)) == ((said,), 2)


def test_other_versions_are_changes_not_obstacles():
    newer = {
        "versions": {**ENVIRONMENT["versions"], "torch": "2.13.0", "triton": "3.6"},
        "device": {**ENVIRONMENT["device"], "driver": "590.0", "device": "cuda:1"},
    }
    found = compare(make_side({SDPA: STEADY}), make_side({SDPA: STEADY}, environment=newer))
    assert found.forced == ()
    assert found.changes == (
        "torch 2.11.0 -> 2.13.0",
        "triton None -> 3.6",
        "driver 580.1 -> 590.0",
    )


def test_unlike_models_are_refused_and_forced_ones_meet_by_the_other_axes():
    a = make_side({cell("x"): STEADY, cell("x", cache=Cache.STATIC): STEADY})
    b = make_side({cell("y", cache=Cache.STATIC): slower(STEADY, 5)}, name="B")
    with pytest.raises(BenchError, match="model: x against y"):
        compare(a, b)
    found = compare(a, b, force=True)
    ((pair,), (alone,)) = found.cells, found.only_in_a
    assert (pair.a.row["cache"], pair.b.row["cache"], pair.verdict) == ("static",) * 2 + ("SLOWER",)
    assert alone.row["cache"] == "dynamic"


def test_cells_meet_by_axes_where_ids_differ():
    a, b = make_side({SDPA: STEADY, EAGER: STEADY}), make_side({SDPA: STEADY, EAGER: STEADY})
    for one in b.cells:
        one.row["cell_id"] = "renamed-" + one.row["cell_id"]
    found = compare(a, b)
    assert [pair.a.row["attention"] for pair in found.cells] == ["sdpa", "eager"]
    assert all(pair.a.row["attention"] == pair.b.row["attention"] for pair in found.cells)


def test_cells_of_one_side_only_are_listed():
    found = compare(
        make_side({SDPA: STEADY, EAGER: STEADY}), make_side({SDPA: STEADY, STATIC: STEADY})
    )
    assert [c.row["cell_id"] for c in found.only_in_a] == [EAGER.cell_id]
    assert [c.row["cell_id"] for c in found.only_in_b] == [STATIC.cell_id]
    assert not found.got_slower


def test_nothing_in_common_is_an_error():
    with pytest.raises(BenchError, match="no cell in common"):
        compare(make_side({SDPA: STEADY}), make_side({EAGER: STEADY}))


def test_a_cell_that_lost_its_figure_counts_as_slower():
    found = compare(
        make_side({SDPA: STEADY, EAGER: STEADY, STATIC: "oom"}),
        make_side({SDPA: STEADY, EAGER: "oom", STATIC: "oom"}),
    )
    assert [a.row["cell_id"] for a, _ in found.lost] == [EAGER.cell_id]
    assert len(found.no_figure) == 2
    assert found.got_slower
    gained = compare(make_side({SDPA: "oom"}), make_side({SDPA: STEADY}))
    assert (gained.lost, gained.got_slower) == ([], False)


def test_figures_that_do_not_hold_are_ambiguous():
    broken = make_side({SDPA: slower(STEADY, 20)}, ran_attention="eager")
    (found,) = compare(make_side({SDPA: STEADY}), broken).cells
    assert found.verdict is Verdict.AMBIGUOUS
    assert found.remarks == (
        "B FAIL: attention eager ran, not sdpa",
        "ran_attention sdpa -> eager",
    )


def test_another_text_and_another_scheme_are_remarked():
    other = make_side({SDPA: STEADY}, text_sha256="bb", ran_quantization="int8")
    (found,) = compare(make_side({SDPA: STEADY}), other).cells
    assert found.verdict is Verdict.SAME
    assert found.remarks == ("ran_quantization none -> int8", "the text differs")


@pytest.mark.parametrize(
    ("before", "after", "kernels", "remarked"),
    [
        ("int8", "int8-w8a8", "triton", False),  # labels did not tell yet
        ("int8-w8a8", "int8", "triton", False),
        ("int4-g128", "int8-w8a8", "triton", True),
        ("none", "int8-w8a8", "triton", True),
        ("int8-w8a8", "fp8-e4m3-w8a16", "triton", True),
        ("int8", "int8-w8a8", "torch", True),  # operators, which round no vector
    ],
)
def test_labels_from_before_they_told_of_vectors(before, after, kernels, remarked):
    one = make_side({SDPA: STEADY}, ran_quantization=before, ran_kernels=kernels)
    other = make_side({SDPA: STEADY}, ran_quantization=after, ran_kernels="triton")
    (found,) = compare(one, other).cells
    assert found.remarks == ((f"ran_quantization {before} -> {after}",) if remarked else ())


def test_a_campaign_is_read_from_its_folder(tmp_path):
    side = read_side(write_campaign(tmp_path / "a", {SDPA: STEADY, EAGER: "oom"}))
    assert [one.speeds for one in side.cells] == [tuple(STEADY), ()]
    assert side.cells[1].row["status"] == "oom"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("runs.csv", "100.05", "fast"),
        ("runs.csv", "100.05", "nan"),
        ("runs.csv", "100.05", "-1"),
        ("runs.csv", "decode_tok_per_s", "speed"),
        ("plan.json", '"cells"', '"cell"'),
        ("plan.json", '"attention"', '"a"'),
    ],
)
def test_broken_files_are_one_error(tmp_path, file, old, new):
    folder = write_campaign(tmp_path / "a", {SDPA: STEADY})
    path = folder / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(BenchError, match="is broken") as caught:
        read_side(folder)
    assert caught.value.hint


def test_cells_that_are_no_list_are_one_error(tmp_path):
    folder = write_campaign(tmp_path / "a", {SDPA: STEADY})
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    (folder / "plan.json").write_text(json.dumps({**plan, "cells": 3}), encoding="utf-8")
    with pytest.raises(BenchError, match="is broken"):
        read_side(folder)
