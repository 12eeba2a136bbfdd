"""From rows as they are on disk to causes: recorded-like fixtures, the GPU's among them."""

from __future__ import annotations

import pytest

from qwencli.bench.attribution.attribute import attribute
from qwencli.bench.causes import Cause
from qwencli.errors import BenchError
from tests.bench.attribution.made_cell import TTFT_S, MadeCell

RUN, TOKEN, LOST = 5, 40, 80.0


def test_quiet_runs_have_no_findings():
    assert MadeCell().findings() == []
    assert MadeCell(1.0, on_gpu=False).findings() == []


def gc(cell):
    _, end = cell.slow(RUN, TOKEN, LOST)
    cell.event(RUN, "gc", end - 0.001, 78.0)


def compiling(cell):
    _, end = cell.slow(RUN, TOKEN, LOST)
    cell.event(RUN, "compile", end, 79.0)


def capturing(cell):
    _, end = cell.slow(RUN, TOKEN, LOST, device_allocs=3)
    cell.event(RUN, "graph_capture", end, 79.0)


def stopping(cell):
    _, end = cell.slow(RUN, TOKEN, LOST, main_cpu_ms=3.0, voluntary_switches=1)
    cell.event(RUN, "stop", end + 0.001, 0.0)


def hogging(cell):
    cell.slow(RUN, TOKEN, LOST, main_cpu_ms=3.0, runqueue_ms=LOST, involuntary_switches=2)


def holding(cell):
    cell.slow(RUN, TOKEN, LOST, main_cpu_ms=3.0, other_python_ms=LOST, voluntary_switches=9)


def sleeping(cell):
    cell.slow(RUN, TOKEN, LOST, main_cpu_ms=3.0, voluntary_switches=1)


def allocating(cell):
    cell.slow(RUN, TOKEN, LOST, device_allocs=24, alloc_retries=0)


def retrying(cell):
    cell.slow(RUN, TOKEN, LOST, device_allocs=2, alloc_retries=1)


def sensors(**figures):
    def disturb(cell):
        for token in range(TOKEN, TOKEN + 20):
            cell.slow(RUN, token, 4.0)
        cell.gpu_moments.append((RUN, TOKEN, TOKEN + 19, figures))

    return disturb


GAPS = {
    Cause.GC: [gc],
    Cause.RECOMPILE: [compiling],
    Cause.GRAPH_CAPTURE: [capturing],
    Cause.SUSPENDED: [stopping],
    Cause.PREEMPTION: [hogging],
    Cause.GIL: [holding],
    Cause.IDLE_GAP: [sleeping],
    Cause.ALLOCATOR: [allocating, retrying],
    Cause.CLOCK: [sensors(sm_clock_mhz=1200)],
    Cause.THROTTLE: [
        sensors(sm_clock_mhz=1200, throttle_reasons="sw_power_cap|hw_thermal"),
        sensors(sm_clock_mhz=1200, throttle_reasons="hw_slowdown", pstate=0),
    ],
    Cause.POWER_STATE: [sensors(sm_clock_mhz=1200, pstate=8)],
    Cause.OTHER_GPU_PROCESS: [sensors(compute_processes=2), sensors(power_w=520.0)],
    Cause.UNKNOWN: [sensors()],
}


@pytest.mark.parametrize(
    ("cause", "disturb"), [(cause, one) for cause, many in GAPS.items() for one in many]
)
def test_a_gap_is_given_its_cause(cause, disturb):
    cell = MadeCell()
    disturb(cell)
    (gap,) = cell.findings("gap")
    assert (gap.run, gap.token_index) == (str(RUN), TOKEN)
    assert gap.cause is cause
    assert gap.lost_ms == pytest.approx(80.0, rel=0.1)
    # The run as a whole is slow for it, too.
    (decode,) = cell.findings("decode")
    assert decode.run == str(RUN)


def test_waiting_for_the_device_at_every_token_is_seen_between_runs():
    cell = MadeCell()
    cell.itl[RUN] = [value * 1.2 for value in cell.itl[RUN]]
    for run in cell.itl:
        cell.phase_figures[run, "decode"] = {"syncs": 99.0 if run == RUN else 1.0}
    (found,) = cell.findings()
    assert (found.scope, found.run, found.cause) == ("decode", str(RUN), Cause.HOST_SYNC)


def test_a_run_whose_host_took_longer_for_the_same_work():
    """Where the device waits for the host. Where the host waits for the device its thread spins,
    and its time says nothing."""
    cell = MadeCell()
    cell.itl[RUN] = [value * 1.3 for value in cell.itl[RUN]]
    (found,) = cell.findings(device_busy_percent=20.0)
    assert (found.scope, found.run, found.cause) == ("decode", str(RUN), Cause.PROCESSOR)
    assert found.evidence.startswith("the main thread ran 38")
    (found,) = cell.findings(device_busy_percent=95.0)
    assert found.cause is Cause.UNKNOWN
    (found,) = cell.findings()
    assert found.cause is Cause.UNKNOWN


def test_a_core_at_a_lower_clock_is_told_by_its_clock():
    cell = MadeCell()
    cell.itl[RUN] = [value * 1.6 for value in cell.itl[RUN]]
    for run in cell.itl:
        cell.phase_figures[run, "decode"] = {"core_mhz": 3250.0 if run == RUN else 5200.0}
    (found,) = cell.findings(device_busy_percent=20.0)
    assert (found.cause, found.confidence) == (Cause.PROCESSOR, pytest.approx(0.75))
    assert found.evidence.startswith("the main thread's core at 3250 MHz, usually 5200")


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_run_beside_programs_that_use_the_memory(on_gpu):
    """Told by fixed work after it; a device that waits is wanted where there is one."""
    cell = MadeCell(on_gpu=on_gpu)
    cell.itl[RUN] = [value * 1.9 for value in cell.itl[RUN]]
    for run, columns_of in cell.run_columns.items():
        columns_of["cpu_loop_us"] = 4.4
        columns_of["pointer_chase_us"] = 282.0 if run == RUN else 191.0
    (found,) = cell.findings(device_busy_percent=20.0 if on_gpu else None)
    assert (found.scope, found.run, found.cause) == ("decode", str(RUN), Cause.PROCESSOR)
    assert found.evidence.startswith("others used the caches and memory that cores share: a fixed ")
    assert "walk there took 1.48 times as long as usual; the main thread ran 56" in found.evidence


def test_a_part_of_a_decode_has_its_clock_whole():
    cell = MadeCell()
    for token in range(TOKEN, TOKEN + 6):
        cell.itl[RUN][token - 1] += 5.0
    for run in cell.itl:
        cell.phase_figures[run, "decode"] = {"core_mhz": 5200.0}
    (gap,) = cell.findings("gap", device_busy_percent=20.0)
    assert gap.cause is Cause.UNKNOWN


def test_where_nothing_was_measured_the_driver_knows_of_long_runs():
    for itl_ms, cause in ((30.0, Cause.PROCESSOR), (3.0, Cause.UNKNOWN)):
        cell = MadeCell(itl_ms)
        cell.itl[RUN] = [value * 1.3 for value in cell.itl[RUN]]
        cell.gpu_figures = {run: {"utilization_percent": 20} for run in cell.itl}
        (found,) = cell.findings()
        assert found.cause is cause


def test_one_late_token_is_not_the_processors_doing():
    cell = MadeCell()
    cell.slow(RUN, TOKEN, LOST)
    assert {found.cause for found in cell.findings(device_busy_percent=20.0)} == {Cause.UNKNOWN}


@pytest.mark.parametrize(("processors", "cause"), [(1, Cause.PREEMPTION), (20, Cause.UNKNOWN)])
def test_of_what_the_hypervisor_takes_a_program_has_its_part(processors, cause):
    """On a machine where twenty run, what it took is seldom one program's."""
    cell = MadeCell()
    stolen = {"steal_ms": LOST, "system_busy_ms": 3.0 + (processors - 1) * LOST}
    cell.slow(RUN, TOKEN, LOST, main_cpu_ms=LOST if processors > 1 else 3.0, **stolen)
    (gap,) = cell.findings("gap")
    assert gap.cause is cause


def test_a_gap_that_nobody_looked_at_has_its_part_of_the_decode_as_evidence():
    """And no time slept but what the whole decode slept."""
    cell = MadeCell()
    for token in range(TOKEN, TOKEN + 6):
        cell.itl[RUN][token - 1] += 5.0
    (gap,) = cell.findings("gap")
    assert gap.cause is Cause.UNKNOWN


def test_a_load_before_the_run_explains_its_late_first_token():
    cell = MadeCell()
    cell.run_columns[RUN] = {"ttft_s": 0.4, "load_s": 3.0}
    (found,) = cell.findings()
    assert (found.scope, found.run, found.cause) == ("prefill", str(RUN), Cause.RELOAD)


def test_loads_that_slow_a_little_each_time_are_found_as_a_group():
    cell = MadeCell()
    for run in cell.itl:
        late = 0.012 if run in (2, 4, 7) else 0.0
        # 4 ms of noise in either direction
        ttft = {"ttft_s": 0.06 + late + 0.004 * (-1) ** run}
        cell.run_columns[run] = {**ttft, **({"load_s": 3.0} if late else {})}
    found = cell.findings()
    assert {one.cause for one in found} == {Cause.RELOAD}
    assert {"2", "4"} <= {one.run for one in found} <= {"2", "4", "7"}


def test_half_of_the_runs_may_be_slow():
    """As on an H200 whose host took the core away for runs 3 and 4 of four."""
    cell = MadeCell()
    for run in (3, 4, 6, 8):
        cell.itl[run] = [1.3 * ms for ms in cell.itl[run]]
        span = sum(cell.itl[run])
        cell.phase_figures[run, "decode"] = {"main_cpu_ms": span}
    found = cell.findings("decode", device_busy_percent=40.0)
    assert {one.run: one.cause for one in found} == dict.fromkeys("3468", Cause.PROCESSOR)


def test_a_prefill_has_no_more_of_the_host_than_it_took():
    cell = MadeCell()
    for run in cell.itl:
        cell.run_columns[run] = {"ttft_s": 0.093 if run == RUN else TTFT_S}
        # The host saw the first token some tokens late.
        late = 0.148 if run == RUN else 0.06
        end = cell.start_s(run) + 0.02
        cell.event(run, "prefill", end, 1e3 * late, main_cpu_ms=1e3 * late, tokens=1)
    (found,) = cell.findings("prefill", device_busy_percent=40.0)
    assert "main thread 93 ms on a processor" in found.evidence


def test_where_every_run_loads_a_load_explains_nothing():
    cell = MadeCell()
    for run in cell.itl:
        cell.run_columns[run] = {"load_s": 3.0, **({"ttft_s": 0.4} if run == RUN else {})}
    (found,) = cell.findings()
    assert found.cause is Cause.UNKNOWN


def test_runs_that_grow_slower_with_the_heat_drift():
    cell = MadeCell()
    for run in cell.itl:
        clock = 2800 - 100 * run
        cell.itl[run] = [3.0 * 2800 / clock] * len(cell.itl[run])
        cell.gpu_figures[run] = {"temperature_c": 55 + 4 * run, "sm_clock_mhz": clock}
        cell.run_columns[run] = {"temperature_c_max": 55 + 4 * run}
    last = cell.findings("decode")[-1]
    assert last.run == str(len(cell.itl))
    assert last.cause is Cause.THERMAL_DRIFT


def test_a_run_on_a_busy_machine_is_slow_though_it_never_waited():
    cell = MadeCell(1.0, on_gpu=False)
    cell.itl[RUN] = [value * 1.5 for value in cell.itl[RUN]]
    for run, itl in cell.itl.items():
        busy = 1.9 if run == RUN else 1.01
        figures = {"system_busy_ms": busy * sum(itl), "process_cpu_ms": sum(itl)}
        cell.phase_figures[run, "decode"] = figures
    (found,) = cell.findings()
    assert (found.scope, found.cause) == ("decode", Cause.PREEMPTION)
    assert found.confidence <= 0.5


def test_old_campaigns_without_host_rows_say_that_nothing_was_recorded():
    cell = MadeCell()
    cell.slow(RUN, TOKEN, LOST)
    runs, tokens, _, _ = cell.rows()
    found = attribute(runs, tokens, [], [])
    assert {one.cause for one in found} == {Cause.UNKNOWN}
    assert found[0].evidence == "nothing was recorded at that time"


def test_broken_rows_are_one_clear_error():
    runs, tokens, host, gpu = MadeCell().rows()
    tokens[3]["t_s"] = "soon"
    with pytest.raises(BenchError, match="broken"):
        attribute(runs, tokens, host, gpu)


def test_of_several_gpus_the_one_at_work_is_asked():
    cell = MadeCell()
    sensors(sm_clock_mhz=1200)(cell)
    runs, tokens, host, gpu = cell.rows()
    other = [{**row, "gpu_index": "1", "sm_clock_mhz": "300", "power_w": "20"} for row in gpu]
    found = attribute(runs, tokens, host, [*gpu, *other])
    assert {one.cause for one in found if one.scope == "gap"} == {Cause.CLOCK}
