"""Disturbances that last as long as the cell, from rows as they are on disk."""

from __future__ import annotations

import pytest

from qwencli.bench.attribution.records import records_by_cell
from qwencli.bench.attribution.whole_cell import (
    COLUMNS,
    LIMITS,
    Machine,
    machine_of,
    middle_percent,
    of_process,
    over_limits,
    percentages,
)
from qwencli.bench.causes import Cause
from tests.bench.attribution.made_cell import CELL, RUNS, TOKENS, MadeCell

CPU, GPU = Machine(on_gpu=False, cores=2), Machine(on_gpu=True, cores=16)
SPAN_MS = 297.0


def cell_of(machine, runs=range(1, RUNS + 1), **figures):
    cell = MadeCell(on_gpu=machine.on_gpu)
    for run in runs:
        cell.phase_figures[run, "decode"] = {
            "main_runqueue_ms": 0.0, "helper_runqueue_ms": 0.0, "throttled_ms": 0.0,
            "steal_ms": 0.0, "system_busy_ms": SPAN_MS, "major_faults": 0, **figures,
        }  # fmt: skip
    return cell


def found(cell, machine, busy=None):
    runs, _, host, gpu = cell.rows()
    shares = percentages(records_by_cell(runs, (), host, gpu), {CELL: busy}, machine)[CELL]
    assert tuple(shares) == COLUMNS
    return [(over.limit.cause, over.words) for over in over_limits(shares)]


def test_quiet_cells_are_below_every_limit():
    assert found(cell_of(CPU), CPU) == []
    assert found(cell_of(GPU), GPU, busy=90.0) == []


@pytest.mark.parametrize(
    ("cause", "words", "figures"),
    [
        (Cause.PREEMPTION, "51% of decode waited for a processor",
         {"main_runqueue_ms": 0.51 * SPAN_MS, "runqueue_ms": 0.51 * SPAN_MS}),
        (Cause.HELPER_PREEMPTED, "40% of decode had a helper thread waiting for a processor",
         {"helper_runqueue_ms": 0.4 * SPAN_MS, "runqueue_ms": 0.4 * SPAN_MS}),
        (Cause.CGROUP_THROTTLED,
         "80% of decode was taken by a limit of this control group (cpu.max, docker --cpus)",
         {"main_runqueue_ms": 0.8 * SPAN_MS, "runqueue_ms": 0.8 * SPAN_MS,
          "throttled_ms": 1.6 * SPAN_MS}),
        (Cause.PREEMPTION, "20% of decode was taken by the hypervisor",
         {"steal_ms": 0.2 * SPAN_MS, "system_busy_ms": 0.8 * SPAN_MS}),
        (Cause.PAGE_FAULTS, "30% of decode waited for pages from disk",
         {"major_faults": 99, "main_cpu_ms": 0.7 * SPAN_MS}),
        (Cause.PREEMPTION, "25% of this machine's processors went to other programs",
         {"system_busy_ms": 1.5 * SPAN_MS}),
    ],
)  # fmt: skip
def test_what_slows_every_run_is_named_with_its_share(cause, words, figures):
    assert found(cell_of(CPU, **figures), CPU) == [(cause, words)]


def test_a_process_that_has_just_ended_is_judged_by_rows_that_are_in_no_file():
    waits = {"main_runqueue_ms": 0.51 * SPAN_MS, "runqueue_ms": 0.51 * SPAN_MS}
    for figures, words in (({}, []), (waits, ["51% of decode waited for a processor"])):
        rows = (
            [
                {k: None if v == "" else float(v) if v.replace(".", "").isdigit() else v
                 for k, v in row.items()}
                for row in kind
            ]
            for number, kind in enumerate(cell_of(CPU, **figures).rows()) if number != 1
        )  # fmt: skip
        assert [over.words for over in of_process(*rows, CPU)] == words
    assert of_process([], [], [], CPU) == []


def test_a_limit_of_the_control_group_is_not_other_programs():
    figures = {"main_runqueue_ms": 200.0, "runqueue_ms": 200.0, "throttled_ms": 198.0}
    assert [cause for cause, _ in found(cell_of(CPU, **figures), CPU)] == [Cause.CGROUP_THROTTLED]


def test_a_process_that_is_stopped_again_and_again_is_not_quotable():
    """Of 100 ms it ran 20 all through the cell: each token is as slow as the next."""
    cell = cell_of(CPU, main_cpu_ms=0.2 * SPAN_MS, system_busy_ms=0.2 * SPAN_MS)
    for run in range(1, RUNS + 1):
        for token in range(10, TOKENS, 30):
            cell.event(run, "stop", cell.token_s(run, token), 0.0)
    ((cause, words),) = found(cell, CPU)
    assert cause is Cause.SUSPENDED
    assert words == "80% of decode passed while the process was stopped (SIGSTOP)"


def test_a_quarter_of_the_runs_moves_nothing():
    waits = {"main_runqueue_ms": 150.0, "runqueue_ms": 150.0}
    assert found(cell_of(CPU, runs=range(1, 3), **waits), CPU) == []
    assert found(cell_of(CPU, runs=range(1, 6), **waits), CPU) != []


def test_campaigns_from_before_threads_were_told_apart_have_the_longest_wait():
    cell = MadeCell(on_gpu=False)
    for run in range(1, RUNS + 1):
        cell.phase_figures[run, "decode"] = {"runqueue_ms": 150.0}
    assert [cause for cause, _ in found(cell, CPU)] == [Cause.PREEMPTION]


def test_a_gpu_waits_for_no_helper_and_shares_no_processor():
    figures = {"helper_runqueue_ms": 150.0, "system_busy_ms": 9 * SPAN_MS}
    assert found(cell_of(GPU, **figures), GPU) == []


def test_a_clock_held_back_counts_by_what_it_costs():
    cell = cell_of(GPU)
    cell.gpu_figures[1] = {"sm_clock_mhz": 2800}
    for run in range(2, RUNS + 1):
        cell.gpu_figures[run] = {"sm_clock_mhz": 2660, "throttle_reasons": "sw_power_cap"}
    assert found(cell, GPU) == [
        (Cause.THROTTLE, "5% of decode was lost to a clock held back against heat or power")
    ]
    for run in range(2, RUNS + 1):
        cell.gpu_figures[run]["sm_clock_mhz"] = 2780
    assert found(cell, GPU) == []
    # A lower clock by choice is none that is held back.
    for run in range(2, RUNS + 1):
        cell.gpu_figures[run] = {"sm_clock_mhz": 1400, "throttle_reasons": "none"}
    assert found(cell, GPU) == []


@pytest.mark.parametrize(
    ("held", "lost"),
    [
        ({"throttle_reasons": "sw_thermal"}, [25]),
        ({"throttle_reasons": "sw_power_cap", "power_limit_percent": 60.0}, [25]),
        ({"throttle_reasons": "sw_power_cap", "power_limit_percent": 100.0}, []),
        ({"throttle_reasons": "sw_power_cap"}, []),  # campaigns from before limits were read
        ({"throttle_reasons": "none", "power_limit_percent": 60.0}, []),
    ],
)
def test_what_holds_all_cells_alike_is_told_by_the_card(held, lost):
    cell = cell_of(GPU)
    for run in range(1, RUNS + 1):
        cell.gpu_figures[run] = {"sm_clock_mhz": 1485, "max_sm_clock_mhz": 1980, **held}
    words = [f"{n}% of decode was lost to a clock held back against heat or power" for n in lost]
    assert [said for _, said in found(cell, GPU)] == words


def test_another_program_counts_by_what_it_computes_and_not_by_its_memory():
    cell = cell_of(GPU)
    for run in range(1, RUNS + 1):
        cell.gpu_figures[run] = {"compute_processes": 2, "other_sm_percent": 0.0}
    assert found(cell, GPU) == []
    for run in range(1, RUNS + 1):
        cell.gpu_figures[run]["other_sm_percent"] = 35.0
    assert found(cell, GPU) == [
        (Cause.OTHER_GPU_PROCESS, "35% of decode went to another program on the GPU")
    ]


def two_cells(machine, slower):
    cell = cell_of(machine)
    for run in range(1, RUNS + 1):
        cell.run_columns[run] = {"cpu_loop_us": 4.0 * slower}
    runs, _, host, gpu = cell.rows()
    quick = [{**row, "cell_id": "quick", "cpu_loop_us": "4.0"} for row in runs]
    quick_host = [{**row, "cell_id": "quick"} for row in host]
    return records_by_cell([*runs, *quick], (), [*host, *quick_host], gpu)


@pytest.mark.parametrize(
    ("machine", "busy", "slower", "blamed"),
    [(CPU, None, 1.5, True), (CPU, None, 1.1, False), (GPU, 40.0, 1.5, True),
     (GPU, 90.0, 1.5, False), (GPU, None, 1.5, False)],
)  # fmt: skip
def test_a_core_is_held_against_the_campaigns_quickest_where_the_host_decides(
    machine, busy, slower, blamed
):
    shares = percentages(two_cells(machine, slower), {CELL: busy}, machine)
    assert [over.limit.cause for over in over_limits(shares[CELL])] == [Cause.PROCESSOR] * blamed
    assert over_limits(shares["quick"]) == []


def test_a_whole_cell_has_rows_of_its_own():
    cell = cell_of(CPU, main_runqueue_ms=0.51 * SPAN_MS, runqueue_ms=0.51 * SPAN_MS)
    (row,) = cell.findings("cell", disturbed={"waited_percent": 51.0})
    assert (row.cause, row.run, row.token_index) == (Cause.PREEMPTION, "", None)
    assert row.lost_ms == pytest.approx(0.51 * row.span_ms)
    assert row.evidence == "51% of decode waited for a processor; the limit is 5%"


def test_text_of_a_file_and_numbers_are_the_same_to_a_limit():
    assert over_limits({"waited_percent": "51.0", "paged_percent": ""}) == over_limits(
        {"waited_percent": 51.0, "paged_percent": None}
    )
    assert over_limits({limit.column: limit.percent for limit in LIMITS}) == []


def test_the_middle_half_is_what_counts():
    assert middle_percent([]) is None
    assert middle_percent([(1.0, 4.0)]) == 25.0
    assert middle_percent([(99.0, 100.0), (1.0, 100.0), (3.0, 100.0), (0.0, 100.0)]) == 2.0


def test_what_an_environment_says_of_its_machine():
    assert machine_of({"device": {"device": "cuda:0"}, "cpu": {"logical_cores": 16}}) == GPU
    assert machine_of({"device": {"device": "cpu"}, "cpu": {"logical_cores": 2}}) == CPU
    assert machine_of({}) == Machine(on_gpu=False, cores=None)
