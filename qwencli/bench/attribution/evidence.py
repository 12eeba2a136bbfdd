"""What was observed during one slow stretch of time: everything the rules may look at."""

from __future__ import annotations

from dataclasses import dataclass

from qwencli.bench.attribution.causes import Scope


@dataclass(frozen=True)
class Usual:
    """What the rest of the cell looks like; None = not measured."""

    sm_clock_mhz: float | None = None
    pstate: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttle: frozenset[str] = frozenset()
    core_mhz: float | None = None
    core_loop_us: float | None = None
    memory_walk_us: float | None = None


@dataclass(frozen=True)
class Evidence:
    """One slow stretch. Times in ms; None = not measured here, which no rule takes for zero.

    Args:
        lost_ms: how much longer than usual the stretch took.
        main_cpu_ms: processor time of the main thread.
        slept_ms: the main thread neither ran nor waited for a processor, beyond what is usual.
        switches: times a thread of this process gave its processor up by itself.
        other_python_ms: processor time of this process's other Python threads.
        runqueue_ms: the main thread was runnable, but waiting for a processor (before threads were
            told apart: the thread that waited longest); `helper_ms` likewise, of the other threads
            the one that waited longest.
        throttled_ms: what a processor limit of the control group took, over all processors.
        steal_ms: what the hypervisor took of the processors, one program's part of it.
        extra_cpu_ms: processor time of the main thread beyond what is usual.
        others_cpu_ms: processor time of all other programs. This and the seven above: beyond what
            is usual for this phase or for so many tokens; the waits of a gap are all of them.
        major_faults: pages that had to come from disk.
        gc_ms, compile_ms, capture_ms: the part of the stretch spent so.
        stops: times the process went on after a stop signal.
        device_allocs, alloc_retries: driver allocations and frees, and failed attempts.
        extra_syncs: waits for the device beyond what these tokens usually have.
        sm_clock_mhz, power_w: mean over the stretch; `pstate` its highest number;
            `temperature_c` its highest; `throttle` all reasons seen.
        core_mhz: clock of the processor core that the main thread ran on, mean.
        core_loop_us, memory_walk_us: fixed work on that core within the run or right after it
            (`host_pace`).
        gpu_processes: programs with memory on the GPU, this one included.
        fresh_load: the model was loaded just before this run and not before others.
        device_busy_percent: how much of the time the device works, in this cell or at this time.
        spread: how much of what was lost lies in the run's typical token, 0 to 1.
        warming: correlation of GPU temperature with the number of the run, where speed falls.
    """

    scope: Scope
    span_ms: float
    lost_ms: float
    tokens: int
    on_gpu: bool = False
    main_cpu_ms: float | None = None
    extra_cpu_ms: float | None = None
    slept_ms: float | None = None
    switches: float | None = None
    other_python_ms: float | None = None
    runqueue_ms: float | None = None
    helper_ms: float | None = None
    throttled_ms: float | None = None
    major_faults: float | None = None
    steal_ms: float | None = None
    others_cpu_ms: float | None = None
    gc_ms: float = 0.0
    compile_ms: float = 0.0
    capture_ms: float = 0.0
    stops: int = 0
    device_allocs: float | None = None
    alloc_retries: float | None = None
    extra_syncs: float | None = None
    sm_clock_mhz: float | None = None
    pstate: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttle: frozenset[str] = frozenset()
    core_mhz: float | None = None
    core_loop_us: float | None = None
    memory_walk_us: float | None = None
    gpu_processes: float | None = None
    fresh_load: bool = False
    device_busy_percent: float | None = None
    spread: float = 0.0
    warming: float | None = None
    usual: Usual = Usual()

    def share(self, part_ms: float | None) -> float:
        """How much of what was lost a part explains, 0 to 1."""
        if not part_ms or part_ms < 0 or self.lost_ms <= 0:
            return 0.0
        return min(1.0, part_ms / self.lost_ms)
