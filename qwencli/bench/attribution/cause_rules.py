"""The rules that name a cause: a table of small functions over `Evidence`.

A rule answers how sure it is, 0 to 1, and with which figures, or nothing. Its confidence is the
share of the lost time that its evidence explains, times how far such evidence can be trusted
(`trust` below): a measured duration nearly always, a coincidence less. The surest rule wins; where
none reaches FLOOR the cause is `unknown`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwencli.bench.attribution.evidence import Evidence
from qwencli.bench.causes import THROTTLING, Cause
from qwencli.bench.measure.roofline import GPU_BUSY
from qwencli.output import counted

FLOOR = 0.35
# A clock this much lower than usual counts as lower; governors move it by less all the time.
LOWER_CLOCK = 0.97
WARMER_C = 3.0
MORE_POWER = 1.1
# Work that takes so much longer was slowed down: on a host that does nothing else the loop varies
# by a tenth, the walk by a twentieth (results/2026-11-28-cpu-neighbours).
LONGER_WORK = 1.15
# A call of the driver's allocator takes 0.1 to 3.3 ms in the campaigns of results/; where the calls
# cannot account for what was lost, they were only there.
ALLOCATION_MS = 10.0
# Of what was lost: less time away from the processor is the noise of its clocks.
LEAST_UNSEEN = 0.05


@dataclass(frozen=True)
class Claim:
    cause: Cause
    confidence: float
    evidence: str


Judge = Callable[[Evidence], tuple[float, str] | None]


def _ms(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def _gc(e: Evidence) -> tuple[float, str] | None:
    return e.share(e.gc_ms), f"{_ms(e.gc_ms)} of garbage collection"


def _recompile(e: Evidence) -> tuple[float, str] | None:
    return e.share(e.compile_ms), f"{_ms(e.compile_ms)} of compiling"


def _graph_capture(e: Evidence) -> tuple[float, str] | None:
    return e.share(e.capture_ms), f"{_ms(e.capture_ms)} of capturing graphs"


def _suspended(e: Evidence) -> tuple[float, str] | None:
    if not e.stops:
        return None
    # All of it: where each token is stopped, that is what is usual.
    said = f"stopped {counted(e.stops, 'time')}, {_ms(e.off_cpu_ms)} without running"
    return e.share(e.off_cpu_ms), said


def _waits(e: Evidence) -> tuple[float, float, float]:
    """What the main thread and the helper that waited longest waited for a processor, and what of
    that a limit of the control group took (ms). What the process's own other Python thread had of
    the processor was taken by nobody else; a GPU's work waits for no helper."""
    main = max(0.0, (e.runqueue_ms or 0.0) - (e.other_python_ms or 0.0))
    helper = 0.0 if e.on_gpu else max(0.0, (e.helper_ms or 0.0) - (e.other_python_ms or 0.0))
    return main, helper, min(e.throttled_ms or 0.0, max(main, helper))


def _cgroup_throttled(e: Evidence) -> tuple[float, str] | None:
    *_, throttled = _waits(e)
    return e.share(throttled), f"{_ms(throttled)} taken by a limit of this control group"


def _helper_preempted(e: Evidence) -> tuple[float, str] | None:
    """All threads of a product wait for the one that has no processor."""
    main, helper, throttled = _waits(e)
    if helper <= main:
        return None
    said = (
        f"{_ms(helper)} in which a helper thread waited for a processor, the main one {_ms(main)}"
    )
    return e.share(main + helper - throttled), said


def _paged(e: Evidence) -> tuple[float, str] | None:
    if not e.major_faults or e.major_faults < 1:
        return None
    said = f"{e.major_faults:.0f} pages came from disk, {_ms(e.slept_ms)} without running"
    return e.share(e.slept_ms), said


def _preempted(e: Evidence) -> tuple[float, str] | None:
    waited, helper, throttled = _waits(e)
    if helper > waited:
        return None
    taken = (e.steal_ms or 0.0) + helper - throttled
    said = f"{_ms(waited)} runnable but waiting for a processor"
    if _taken_unseen(e) and (e.slept_ms or 0.0) > max(taken, LEAST_UNSEEN * e.lost_ms):
        taken = e.slept_ms or 0.0
        said += f", {_ms(taken)} away from it without having given it up"
    elif e.steal_ms:
        said += f", {_ms(e.steal_ms)} taken by the hypervisor"
    return e.share(waited + taken), said


def _taken_unseen(e: Evidence) -> bool:
    """A thread that neither runs nor waits has given its processor up, which is counted; where no
    thread has, the whole machine was held up, and its own clock of that lags behind."""
    return e.switches == 0 and not e.stops


def _contended(e: Evidence) -> tuple[float, str] | None:
    """Slow although it ran: other programs share caches, memory and the halves of a core."""
    if e.on_gpu or e.main_cpu_ms is None or e.others_cpu_ms is None:
        return None
    if e.main_cpu_ms < 0.8 * e.span_ms or e.others_cpu_ms < 0.5 * e.span_ms:
        return None
    return 1.0, f"ran all the time beside {_ms(e.others_cpu_ms)} of other programs"


def _gil(e: Evidence) -> tuple[float, str] | None:
    if e.other_python_ms is None or e.slept_ms is None:
        return None
    said = f"another Python thread ran {_ms(e.other_python_ms)} while the main one did not"
    return e.share(min(e.other_python_ms, e.slept_ms + (e.runqueue_ms or 0.0))), said


def _allocator_retried(e: Evidence) -> tuple[float, str] | None:
    if not e.alloc_retries or e.alloc_retries < 0:
        return None
    failed = counted(round(e.alloc_retries), "allocation")
    return 1.0, f"{failed} failed until cached memory was given back"


def _allocated(e: Evidence) -> tuple[float, str] | None:
    if not e.device_allocs or e.device_allocs < 1:
        return None
    calls = counted(round(e.device_allocs), "allocation or free", "allocations and frees")
    return e.share(ALLOCATION_MS * e.device_allocs), f"{calls} in the driver"


def _synchronised(e: Evidence) -> tuple[float, str] | None:
    if e.extra_syncs is None or e.extra_syncs < 0.5 * e.tokens:
        return None
    return (
        1.0,
        f"{counted(round(e.extra_syncs), 'wait')} for the device more than usual in "
        + counted(e.tokens, "token"),
    )


def _clock_share(e: Evidence) -> float:
    """The share of the loss that a lower clock explains if time goes with its inverse."""
    clock, usual = e.sm_clock_mhz, e.usual.sm_clock_mhz
    if not clock or not usual or clock >= LOWER_CLOCK * usual:
        return 0.0
    return e.share(e.span_ms * (1.0 - clock / usual))


def _clock_figures(e: Evidence) -> str:
    return f"SM clock {e.sm_clock_mhz or 0:.0f} MHz, usually {e.usual.sm_clock_mhz or 0:.0f}"


def _throttled(e: Evidence) -> tuple[float, str] | None:
    reasons = (e.throttle - e.usual.throttle) & THROTTLING
    if not reasons:
        return None
    return _clock_share(e), f"throttled by {', '.join(sorted(reasons))}; {_clock_figures(e)}"


def _power_state(e: Evidence) -> tuple[float, str] | None:
    if e.pstate is None or e.usual.pstate is None or e.pstate <= e.usual.pstate:
        return None
    said = f"power state P{e.pstate:.0f}, usually P{e.usual.pstate:.0f}; {_clock_figures(e)}"
    return max(0.5, _clock_share(e)), said


def _lower_clock(e: Evidence) -> tuple[float, str] | None:
    return _clock_share(e), _clock_figures(e)


def _thermal_drift(e: Evidence) -> tuple[float, str] | None:
    if e.scope == "gap" or e.warming is None or e.temperature_c is None:
        return None
    usual = e.usual.temperature_c
    if usual is None or e.temperature_c < usual + WARMER_C or e.warming < 0.7:
        return None
    said = (
        f"{e.temperature_c:.0f} C, usually {usual:.0f}, rising with the runs; {_clock_figures(e)}"
    )
    return _clock_share(e), said


def _other_gpu_process(e: Evidence) -> tuple[float, str] | None:
    """By exclusion: the host was neither late nor asleep, and the clock explains little. And
    somebody else is there, or the GPU draws more power for fewer tokens."""
    unexplained = 1.0 - _clock_share(e)
    if not e.on_gpu or unexplained < 0.5:
        return None
    if e.main_cpu_ms is not None and e.main_cpu_ms < 0.5 * e.span_ms:
        return None
    signs = []
    if e.gpu_processes and e.gpu_processes >= 2:
        signs.append(f"{e.gpu_processes:.0f} programs on the GPU")
    if e.power_w and e.usual.power_w and e.power_w >= MORE_POWER * e.usual.power_w:
        signs.append(f"{e.power_w:.0f} W, usually {e.usual.power_w:.0f}")
    if not signs:
        return None
    return unexplained, f"{', '.join(signs)}; the host waited for it; {_clock_figures(e)}"


def _slept(e: Evidence) -> tuple[float, str] | None:
    if _taken_unseen(e):
        return None
    return e.share(e.slept_ms), f"{_ms(e.slept_ms)} in which the main thread slept"


def _device_waited(e: Evidence) -> bool:
    return e.device_busy_percent is not None and e.device_busy_percent < GPU_BUSY


def _host_bound(e: Evidence) -> bool:
    return _device_waited(e) or not e.on_gpu


def _lower_core_clock(e: Evidence) -> tuple[float, str] | None:
    """What is usual is known of decoding."""
    clock, usual = e.core_mhz, e.usual.core_mhz
    if e.scope == "prefill" or not _host_bound(e) or not e.main_cpu_ms:
        return None
    if not clock or not usual or clock >= LOWER_CLOCK * usual:
        return None
    said = f"the main thread's core at {clock:.0f} MHz, usually {usual:.0f}; {_host_figures(e)}"
    return e.share(e.main_cpu_ms * (1.0 - clock / usual)), said


def _slower_core(e: Evidence) -> tuple[float, str] | None:
    longer = _times_longer(e.cpu_loop_us, e.usual.cpu_loop_us)
    if longer is None or not _host_bound(e) or not e.main_cpu_ms:
        return None
    said = f"a fixed loop on its core took {longer:.2f} times as long as usual; {_host_figures(e)}"
    return _evenly(e, e.main_cpu_ms * (1.0 - 1.0 / longer)), said


def _slower_memory(e: Evidence) -> tuple[float, str] | None:
    """How much a run loses to slower caches depends on what it does: as much as it ran longer."""
    longer = _times_longer(e.pointer_chase_us, e.usual.pointer_chase_us)
    if longer is None or not _host_bound(e) or e.extra_cpu_ms is None:
        return None
    said = (
        "others used the caches and memory that cores share: a fixed walk there took "
        f"{longer:.2f} times as long as usual; {_host_figures(e)}"
    )
    return _evenly(e, e.extra_cpu_ms), said


def _times_longer(took: float | None, usual: float | None) -> float | None:
    """None where it is not known, or no longer than it may be on a quiet host."""
    if not took or not usual or took < LONGER_WORK * usual:
        return None
    return took / usual


def _evenly(e: Evidence, part_ms: float) -> float:
    """The share of what lies evenly over a run: what lies in one place leaves another sign."""
    return min(e.share(part_ms), e.spread) if e.scope == "decode" else e.share(part_ms)


def _host_figures(e: Evidence) -> str:
    ran = f"the main thread ran {_ms(e.main_cpu_ms)}"
    if e.extra_cpu_ms is not None and e.main_cpu_ms is not None:
        ran += f", usually {_ms(e.main_cpu_ms - e.extra_cpu_ms)}"
    busy = e.device_busy_percent
    return ran if busy is None else f"{ran}; the device worked {busy:.0f}% of the time"


def _slower_processor(e: Evidence) -> tuple[float, str] | None:
    """By exclusion: the main thread needed more processor time for the same work while the device
    waited for it. Evenly over the run: what takes time in one place leaves a sign there."""
    if not _device_waited(e) or e.main_cpu_ms is None or e.extra_cpu_ms is None:
        return None
    return min(e.share(e.extra_cpu_ms), e.spread), _host_figures(e)


def _reloaded(e: Evidence) -> tuple[float, str] | None:
    if e.scope == "gap" or not e.fresh_load:
        return None
    return 1.0, "the first run after a load; the others kept the model"


# Rule, cause, trust.
RULES: tuple[tuple[Judge, Cause, float], ...] = (
    (_gc, Cause.GC, 0.98),
    (_recompile, Cause.RECOMPILE, 0.98),
    (_suspended, Cause.SUSPENDED, 0.95),
    (_graph_capture, Cause.GRAPH_CAPTURE, 0.94),
    (_reloaded, Cause.RELOAD, 0.96),
    (_cgroup_throttled, Cause.CGROUP_THROTTLED, 0.94),
    (_paged, Cause.PAGE_FAULTS, 0.85),
    (_preempted, Cause.PREEMPTION, 0.93),
    (_helper_preempted, Cause.HELPER_PREEMPTED, 0.93),
    (_gil, Cause.GIL, 0.90),
    (_allocator_retried, Cause.ALLOCATOR, 0.90),
    (_allocated, Cause.ALLOCATOR, 0.80),
    (_thermal_drift, Cause.THERMAL_DRIFT, 0.88),
    (_throttled, Cause.THROTTLE, 0.85),
    (_power_state, Cause.POWER_STATE, 0.82),
    (_lower_clock, Cause.CLOCK, 0.75),
    (_lower_core_clock, Cause.PROCESSOR, 0.75),
    (_slower_core, Cause.PROCESSOR, 0.74),
    (_slower_memory, Cause.PROCESSOR, 0.73),
    (_synchronised, Cause.HOST_SYNC, 0.70),
    (_other_gpu_process, Cause.OTHER_GPU_PROCESS, 0.60),
    (_slept, Cause.IDLE_GAP, 0.65),
    (_slower_processor, Cause.PROCESSOR, 0.55),
    (_contended, Cause.PREEMPTION, 0.50),
)


def judge(evidence: Evidence) -> Claim:
    """The surest claim; `unknown` with what was measured where none is sure enough."""
    claims = []
    for rule, cause, trust in RULES:
        found = rule(evidence)
        if found and found[0] > 0:
            claims.append(Claim(cause, trust * found[0], found[1]))
    best = max(claims, key=lambda claim: claim.confidence, default=None)
    if best is not None and best.confidence >= FLOOR:
        return best
    return Claim(Cause.UNKNOWN, 0.0, _what_is_known(evidence))


def _what_is_known(e: Evidence) -> str:
    if e.main_cpu_ms is None:
        return "nothing was recorded at that time"
    waited = f", {_ms(e.runqueue_ms)} waiting for a processor" if e.runqueue_ms is not None else ""
    helper = f", a helper {_ms(e.helper_ms)}" if e.helper_ms else ""
    return f"main thread {_ms(e.main_cpu_ms)} on a processor{waited}{helper}; no other sign"
