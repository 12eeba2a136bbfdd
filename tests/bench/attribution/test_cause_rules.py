from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.attribution.cause_rules import FLOOR, RULES, judge
from qwencli.bench.attribution.evidence import Evidence, TypicalReadings
from qwencli.bench.causes import MEANINGS, Cause

BLANK = Evidence("gap", span_ms=103.0, lost_ms=100.0, tokens=1)
IDLE_HOST = replace(BLANK, main_cpu_ms=3.0, slept_ms=100.0, switches=1.0, runqueue_ms=0.0)

ms = st.none() | st.floats(0, 1e4)
count = st.none() | st.integers(0, 200).map(float)
evidences = st.builds(
    Evidence,
    scope=st.sampled_from(["gap", "decode", "prefill"]),
    span_ms=st.floats(0.1, 1e4),
    lost_ms=st.floats(0, 1e4),
    tokens=st.integers(1, 200),
    on_gpu=st.booleans(),
    main_cpu_ms=ms, off_cpu_ms=ms, slept_ms=ms, switches=count, other_python_ms=ms,
    runqueue_ms=ms, steal_ms=ms,
    helper_ms=ms, throttled_ms=ms, major_faults=count,
    others_cpu_ms=ms, gc_ms=st.floats(0, 1e4), compile_ms=st.floats(0, 1e4),
    capture_ms=st.floats(0, 1e4), stops=st.integers(0, 3), device_allocs=count,
    alloc_retries=count, extra_syncs=count,
    sm_clock_mhz=st.none() | st.floats(0, 3000), pstate=st.none() | st.floats(0, 12),
    temperature_c=st.none() | st.floats(20, 95),
    throttle=st.frozensets(st.sampled_from(["sw_power_cap", "hw_thermal", "idle"])),
    core_mhz=st.none() | st.floats(0, 6000), extra_cpu_ms=ms,
    device_busy_percent=count, spread=st.floats(0, 1),
    gpu_processes=count, fresh_load=st.booleans(), warming=st.none() | st.floats(-1, 1),
    cpu_loop_us=st.none() | st.floats(0, 50), pointer_chase_us=st.none() | st.floats(0, 5000),
    usual=st.builds(
        TypicalReadings, st.none() | st.floats(0, 3000), st.none() | st.floats(0, 12),
        st.none() | st.floats(20, 95), st.none() | st.floats(0, 600),
        st.frozensets(st.sampled_from(["sw_power_cap", "idle"])), st.none() | st.floats(0, 6000),
        st.none() | st.floats(0, 50), st.none() | st.floats(0, 5000),
    ),
)  # fmt: skip


@given(evidences)
def test_whatever_is_seen_there_is_one_answer_with_words(evidence):
    claim = judge(evidence)
    assert claim.evidence
    assert 0.0 <= claim.confidence <= 1.0
    assert (claim.cause is Cause.UNKNOWN) == (claim.confidence < FLOOR)


@given(evidences)
def test_the_surest_rule_wins(evidence):
    claim = judge(evidence)
    best = max(
        (trust * said[0] for rule, _, trust in RULES if (said := rule(evidence))), default=0.0
    )
    assert claim.confidence == pytest.approx(best if best >= FLOOR else 0.0)


def test_evidence_has_no_figures_that_are_the_noise_of_clocks():
    seen = replace(BLANK, runqueue_ms=60.0, switches=0.0, slept_ms=0.04)
    assert judge(seen).evidence == "60 ms runnable but waiting for a processor"
    away = judge(replace(seen, slept_ms=30.0))
    assert away.evidence.endswith("30 ms away from it without having given it up")


def test_nothing_measured_is_nothing_known():
    assert judge(BLANK).cause is Cause.UNKNOWN
    assert judge(BLANK).evidence == "nothing was recorded at that time"


def test_every_cause_has_a_meaning_and_a_rule():
    assert set(MEANINGS) == set(Cause)
    assert {cause for _, cause, _ in RULES} == set(Cause) - {Cause.UNKNOWN}


HOT = frozenset({"hw_thermal"})
SLOW_CLOCK = {"sm_clock_mhz": 1400.0, "usual": TypicalReadings(2800.0, 0.0, 60.0)}
CASES = [
    (Cause.GC, BLANK, {"gc_ms": 95.0, "main_cpu_ms": 100.0}),
    (Cause.RECOMPILE, BLANK, {"compile_ms": 95.0, "gc_ms": 20.0}),
    (Cause.GRAPH_CAPTURE, BLANK, {"capture_ms": 98.0, "gc_ms": 40.0, "device_allocs": 2.0}),
    (Cause.SUSPENDED, IDLE_HOST, {"stops": 1, "off_cpu_ms": 98.0}),
    # Each token of the cell is stopped: no gap slept longer than is usual there.
    (Cause.SUSPENDED, BLANK, {"stops": 1, "off_cpu_ms": 80.0, "slept_ms": 0.0}),
    (Cause.PREEMPTION, BLANK, {"runqueue_ms": 90.0, "main_cpu_ms": 10.0}),
    (Cause.PREEMPTION, BLANK, {"steal_ms": 100.0, "main_cpu_ms": 5.0}),
    (Cause.PREEMPTION, BLANK, {"runqueue_ms": 30.0, "helper_ms": 28.0, "main_cpu_ms": 40.0}),
    (Cause.HELPER_PREEMPTED, BLANK, {"runqueue_ms": 2.0, "helper_ms": 80.0, "main_cpu_ms": 99.0}),
    (Cause.CGROUP_THROTTLED, BLANK, {"runqueue_ms": 90.0, "throttled_ms": 180.0}),
    (Cause.PREEMPTION, BLANK, {"runqueue_ms": 90.0, "throttled_ms": 10.0}),
    (Cause.PAGE_FAULTS, IDLE_HOST, {"major_faults": 20.0}),
    (Cause.PREEMPTION, IDLE_HOST, {"switches": 0.0}),
    (Cause.PREEMPTION, BLANK, {"main_cpu_ms": 102.0, "others_cpu_ms": 100.0}),
    (Cause.GIL, IDLE_HOST, {"other_python_ms": 98.0}),
    (Cause.GIL, BLANK, {"other_python_ms": 98.0, "runqueue_ms": 97.0, "slept_ms": 1.0}),
    (Cause.IDLE_GAP, IDLE_HOST, {}),
    (
        Cause.PROCESSOR,
        BLANK,
        {
            "span_ms": 200.0, "main_cpu_ms": 200.0, "device_busy_percent": 20.0,
            "core_mhz": 2100.0, "usual": TypicalReadings(core_mhz=5400.0),
        },
    ),
    (
        Cause.PROCESSOR,
        BLANK,
        {
            "scope": "decode", "span_ms": 200.0, "main_cpu_ms": 200.0, "spread": 1.0,
            "cpu_loop_us": 8.0, "usual": TypicalReadings(cpu_loop_us=4.0),
        },
    ),
    (
        Cause.PROCESSOR,
        BLANK,
        {
            "scope": "decode", "main_cpu_ms": 200.0, "extra_cpu_ms": 99.0, "spread": 1.0,
            "pointer_chase_us": 300.0, "usual": TypicalReadings(pointer_chase_us=200.0),
        },
    ),
    (
        Cause.PROCESSOR,
        BLANK,
        {"device_busy_percent": 20.0, "spread": 1.0, "main_cpu_ms": 103.0, "extra_cpu_ms": 99.0},
    ),
    (Cause.ALLOCATOR, BLANK, {"device_allocs": 12.0, "main_cpu_ms": 99.0, "on_gpu": True}),
    (Cause.ALLOCATOR, BLANK, {"alloc_retries": 1.0, "main_cpu_ms": 99.0, "on_gpu": True}),
    (Cause.HOST_SYNC, BLANK, {"extra_syncs": 1.0, "main_cpu_ms": 99.0, "on_gpu": True}),
    (Cause.CLOCK, BLANK, {"span_ms": 200.0, **SLOW_CLOCK}),
    (Cause.THROTTLE, BLANK, {"span_ms": 200.0, "throttle": HOT, **SLOW_CLOCK}),
    (Cause.POWER_STATE, BLANK, {"span_ms": 200.0, "pstate": 8.0, **SLOW_CLOCK}),
    (
        Cause.THERMAL_DRIFT,
        BLANK,
        {"scope": "decode", "span_ms": 200.0, "temperature_c": 84.0, "warming": 0.95, **SLOW_CLOCK},
    ),
    (
        Cause.OTHER_GPU_PROCESS,
        BLANK,
        {"on_gpu": True, "gpu_processes": 2.0, "main_cpu_ms": 99.0, "sm_clock_mhz": 2800.0},
    ),
    (Cause.RELOAD, BLANK, {"scope": "prefill", "fresh_load": True, "capture_ms": 90.0}),
]  # fmt: skip


@pytest.mark.parametrize(("cause", "base", "changes"), CASES)
def test_each_cause_by_its_own_sign(cause, base, changes):
    claim = judge(replace(base, **changes))
    assert claim.cause is cause
    assert claim.confidence >= FLOOR


SLOW_MEMORY = replace(
    BLANK, scope="decode", main_cpu_ms=200.0, extra_cpu_ms=99.0, spread=1.0,
    pointer_chase_us=300.0, usual=TypicalReadings(pointer_chase_us=200.0),
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"on_gpu": True},  # nobody knows who waited for whom
        {"on_gpu": True, "device_busy_percent": 95.0},  # the host waited
        {"spread": 0.1},  # a few tokens were late, and not all of them
        {"pointer_chase_us": 220.0}, {"pointer_chase_us": None}, {"usual": TypicalReadings()},
        {"extra_cpu_ms": 9.0},
    ],
)  # fmt: skip
def test_where_slower_memory_is_no_cause(changes):
    assert judge(SLOW_MEMORY).cause is Cause.PROCESSOR
    assert judge(replace(SLOW_MEMORY, **changes)).cause is Cause.UNKNOWN


def test_a_sign_that_explains_little_is_not_a_cause():
    assert judge(replace(BLANK, gc_ms=20.0, main_cpu_ms=100.0)).cause is Cause.UNKNOWN


def test_a_lower_clock_explains_only_as_much_as_it_slows():
    slightly = replace(BLANK, sm_clock_mhz=2700.0, usual=TypicalReadings(2800.0), main_cpu_ms=103.0)
    assert judge(slightly).cause is Cause.UNKNOWN


def test_a_throttle_reason_that_is_always_there_explains_nothing():
    usual = TypicalReadings(2800.0, throttle=frozenset({"sw_power_cap"}))
    always = replace(BLANK, throttle=frozenset({"sw_power_cap"}), sm_clock_mhz=2800.0, usual=usual)
    assert judge(always).cause is Cause.UNKNOWN


def test_a_program_beside_is_not_blamed_while_the_host_was_late():
    late = replace(IDLE_HOST, on_gpu=True, gpu_processes=2.0)
    assert judge(late).cause is Cause.IDLE_GAP


def test_few_allocations_do_not_explain_a_long_loss():
    """Five calls stood for 850 ms of a decode, whose core was slow."""
    lost = replace(BLANK, lost_ms=850.0, span_ms=5400.0, device_allocs=5.0)
    assert judge(lost).cause is not Cause.ALLOCATOR
    assert judge(replace(lost, lost_ms=30.0)).cause is Cause.ALLOCATOR
