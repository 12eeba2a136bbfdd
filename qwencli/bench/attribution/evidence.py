"""What was observed during one slow stretch of a run, beside what is usual in its cell.

`baseline` says what is usual, `observe` puts together everything that the rules may look at.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qwencli.bench.attribution.records import Numbers, RunRecord, TimedRow, faster_half
from qwencli.bench.causes import Scope, SlowInterval
from qwencli.bench.measure.roofline import DRIVER_MEAN_S
from qwencli.bench.statistics.slow_tokens import TypicalToken, typical_token
from qwencli.bench.statistics.stationarity import ALPHA, drift

# Counters of host.csv of which a phase of a run has a usual amount.
COUNTERS = (
    "main_cpu_ms", "runqueue_ms", "helper_runqueue_ms", "throttled_ms", "steal_ms",
    "other_python_ms", "others_cpu_ms", "off_cpu_ms", "syncs",
)  # fmt: skip
# A sensor sample speaks for this long before and after itself: the sampler's interval.
NEAR_S = 0.05
# Signals are noted when the interpreter next runs, a little after the process does.
LATE_S = 0.02
# A gap that is most of a run has the whole decode as its evidence.
WHOLE_RUN = 0.8


@dataclass(frozen=True)
class TypicalReadings:
    """What the rest of the cell looks like; None = not measured."""

    sm_clock_mhz: float | None = None
    pstate: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttle: frozenset[str] = frozenset()
    core_mhz: float | None = None
    cpu_loop_us: float | None = None
    pointer_chase_us: float | None = None


@dataclass(frozen=True)
class Evidence:
    """One slow stretch. Times in ms; None = not measured here, which no rule takes for zero.

    Args:
        lost_ms: how much longer than usual the stretch took.
        main_cpu_ms: processor time of the main thread.
        off_cpu_ms: the main thread neither ran nor waited for a processor. slept_ms: of that, what
            is beyond the usual.
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
        cpu_loop_us, pointer_chase_us: fixed work on that core within the run or right after it
            (`cpu_calibration`).
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
    off_cpu_ms: float | None = None
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
    cpu_loop_us: float | None = None
    pointer_chase_us: float | None = None
    gpu_processes: float | None = None
    fresh_load: bool = False
    device_busy_percent: float | None = None
    spread: float = 0.0
    warming: float | None = None
    usual: TypicalReadings = TypicalReadings()

    def share(self, part_ms: float | None) -> float:
        """How much of what was lost a part explains, 0 to 1."""
        if not part_ms or part_ms < 0 or self.lost_ms <= 0:
            return 0.0
        return min(1.0, part_ms / self.lost_ms)


@dataclass(frozen=True)
class Baseline:
    """What is usual in a cell.

    Args:
        token: None where no run has two tokens.
        decode_tokens: how many tokens a decode makes.
        phases: phase -> median of each counter over the cell's runs.
        warming: correlation of GPU temperature with the order of runs; None where speed does not
            fall or there are too few runs to say.
        loads: share of runs before which the model was loaded.
    """

    token: TypicalToken | None
    gpu: TypicalReadings
    decode_tokens: float = 0.0
    phases: dict[str, Numbers] = field(default_factory=dict)
    warming: float | None = None
    loads: float = 0.0


def baseline(records: Sequence[RunRecord]) -> Baseline:
    """What is usual in the measured runs of one cell (not empty). Where they differ so much that
    none is usual, the faster half says what is."""
    everything, records = records, faster_half(records, "decode_s")
    samples = [sample for record in records for sample in record.gpu]
    decodes = [moment for record in records if (moment := record.interval("decode"))]
    return Baseline(
        token=typical_token(record.itl_ms for record in records),
        gpu=TypicalReadings(
            sm_clock_mhz=_median(samples, "sm_clock_mhz"),
            pstate=_median(samples, "pstate"),
            temperature_c=_median(samples, "temperature_c"),
            power_w=_median(samples, "power_w"),
            core_mhz=_median(decodes, "core_mhz"),
            cpu_loop_us=_median(records, "cpu_loop_us"),
            pointer_chase_us=_median(records, "pointer_chase_us"),
            throttle=frozenset(
                name
                for name in reasons(samples)
                if 2 * sum(f"throttle:{name}" in s.figures for s in samples) > len(samples)
            ),
        ),
        decode_tokens=statistics.median(len(record.itl_ms) for record in records),
        phases={name: _phase(records, name) for name in ("prefill", "decode")},
        warming=_warming(everything),
        loads=statistics.fmean("load_s" in record.figures for record in everything),
    )


def counters(moment: TimedRow) -> Numbers:
    """The counters of a phase or of a slow token's row that have been measured."""
    found = {name: moment.figures[name] for name in COUNTERS if name in moment.figures}
    span_ms, figures = moment.span_ms, moment.figures
    if "main_runqueue_ms" in figures:  # runqueue_ms is the longest of all threads
        found["runqueue_ms"] = figures["main_runqueue_ms"]
    if "main_cpu_ms" in figures:
        slept = span_ms - figures["main_cpu_ms"] - found.get("runqueue_ms", 0.0)
        found["off_cpu_ms"] = max(0.0, slept)
    if "steal_ms" in found and "system_busy_ms" in figures:
        found["steal_ms"] *= _part_of_one(span_ms, figures["system_busy_ms"] + found["steal_ms"])
    if "system_busy_ms" in figures and "process_cpu_ms" in figures:
        found["others_cpu_ms"] = max(0.0, figures["system_busy_ms"] - figures["process_cpu_ms"])
    return found


def _part_of_one(span_ms: float, wanted_ms: float) -> float:
    """What one program that always wants to run has of all the processor time that was wanted."""
    return min(1.0, span_ms / wanted_ms) if wanted_ms > 0 else 1.0


def reasons(samples: Iterable[TimedRow]) -> frozenset[str]:
    """All throttle reasons seen."""
    return frozenset(
        name.partition(":")[2]
        for sample in samples
        for name in sample.figures
        if name.startswith("throttle:")
    )


def _phase(records: Sequence[RunRecord], name: str) -> Numbers:
    seen = [counters(moment) for record in records if (moment := record.phase(name))]
    return {
        counter: statistics.median(values)
        for counter in COUNTERS
        if (values := [numbers[counter] for numbers in seen if counter in numbers])
    }


def _median(samples: Sequence[TimedRow] | Sequence[RunRecord], column: str) -> float | None:
    values = [sample.figures[column] for sample in samples if column in sample.figures]
    return statistics.median(values) if values else None


def _warming(records: Sequence[RunRecord]) -> float | None:
    known = [
        (record.figures["temperature_c_max"], record.figures["decode_tok_per_s"])
        for record in records
        if {"temperature_c_max", "decode_tok_per_s"} <= record.figures.keys()
    ]
    found = drift([speed for _, speed in known])
    if found is None or found.p_value > ALPHA or found.slope >= 0:
        return None
    return _correlation([heat for heat, _ in known])


def _correlation(values: Sequence[float]) -> float | None:
    try:
        return statistics.correlation(values, range(len(values)))
    except statistics.StatisticsError:  # all equal
        return None


def observe(
    record: RunRecord, usual: Baseline, stretch: SlowInterval, device_busy_percent: float | None
) -> Evidence:
    """Everything known about that time.

    Args:
        device_busy_percent: measured for the whole cell; None = not, and then the driver's word
            counts for stretches that are long enough.
    """
    start_s, end_s = stretch.start_s, stretch.end_s
    host = _host_rows(record, stretch)
    ordinary = _ordinary(usual, stretch.scope, host)
    figures = _sum([{**row.figures, **counters(row)} for row in host])

    def beyond(name: str) -> float | None:
        return None if name not in figures else max(0.0, figures[name] - ordinary.get(name, 0.0))

    def waited(name: str) -> float | None:
        """A gap is late against a token that waited for nothing, however usual waits are here."""
        return figures.get(name) if stretch.scope == "gap" else beyond(name)

    def spent(event: str) -> float:
        return sum(m.overlap_ms(start_s, end_s) for m in record.host if m.name == event)

    near = [s for s in record.gpu if start_s - NEAR_S <= s.end_s <= end_s + NEAR_S]
    if device_busy_percent is None and end_s - start_s >= DRIVER_MEAN_S:
        device_busy_percent = _mean(near, "utilization_percent")
    return Evidence(
        scope=stretch.scope,
        span_ms=stretch.span_ms,
        lost_ms=stretch.lost_ms,
        tokens=stretch.tokens,
        on_gpu=record.on_gpu,
        main_cpu_ms=figures.get("main_cpu_ms"),
        extra_cpu_ms=beyond("main_cpu_ms"),
        off_cpu_ms=waited("off_cpu_ms"),
        slept_ms=beyond("off_cpu_ms"),
        switches=figures.get("voluntary_switches"),
        other_python_ms=_other_python(record, stretch.scope, figures, beyond("other_python_ms")),
        runqueue_ms=waited("runqueue_ms"),
        helper_ms=waited("helper_runqueue_ms"),
        throttled_ms=waited("throttled_ms"),
        major_faults=figures.get("major_faults"),
        steal_ms=waited("steal_ms"),
        others_cpu_ms=beyond("others_cpu_ms"),
        gc_ms=spent("gc"),
        compile_ms=spent("compile"),
        capture_ms=spent("graph_capture"),
        stops=sum(m.name == "stop" and start_s <= m.end_s <= end_s + LATE_S for m in record.host),
        device_allocs=figures.get("device_allocs"),
        alloc_retries=figures.get("alloc_retries"),
        extra_syncs=beyond("syncs"),
        sm_clock_mhz=_mean(near, "sm_clock_mhz"),
        power_w=_mean(near, "power_w"),
        pstate=max(_column(near, "pstate"), default=None),
        temperature_c=max(_column(near, "temperature_c"), default=None),
        throttle=reasons(near),
        core_mhz=_mean(host, "core_mhz"),
        cpu_loop_us=record.figures.get("cpu_loop_us"),
        pointer_chase_us=record.figures.get("pointer_chase_us"),
        gpu_processes=max(_column(near, "compute_processes"), default=None),
        fresh_load="load_s" in record.figures and usual.loads < 0.5,
        device_busy_percent=device_busy_percent,
        spread=_spread(record, usual, stretch),
        warming=usual.warming,
        usual=usual.gpu,
    )


def _spread(record: RunRecord, usual: Baseline, stretch: SlowInterval) -> float:
    if stretch.scope != "decode" or usual.token is None or stretch.lost_ms <= 0:
        return 0.0
    slower_ms = statistics.median(record.itl_ms) - usual.token.ms
    return min(1.0, max(0.0, slower_ms * len(record.itl_ms) / stretch.lost_ms))


def _host_rows(record: RunRecord, stretch: SlowInterval) -> list[TimedRow]:
    """The rows whose counters speak for the stretch."""
    start_s, end_s = stretch.start_s, stretch.end_s
    decode = record.interval("decode")
    if stretch.scope != "gap":
        phase = record.phase(stretch.scope)
        return [phase] if phase else []
    rows = [m for m in record.host if m.name == "token" and m.overlap_ms(start_s, end_s) > 0]
    if decode is None or (rows and end_s - start_s < WHOLE_RUN * (decode.end_s - decode.start_s)):
        return rows
    # What is left to say of tokens that were not slow enough, one by one, to be looked at.
    return [decode.part((end_s - start_s) / (decode.end_s - decode.start_s))]


def _other_python(
    record: RunRecord, scope: Scope, figures: Numbers, seen_ms: float | None
) -> float | None:
    """Time of other Python threads, with what a token's row missed of it.

    The kernel tells of a thread that is running what it had when it was last switched, and makes
    up for it in a later row; its process' time is exact. So the time of other threads counts as
    far as the whole decode says that it was Python's and no other row can have had it.
    """
    decode = record.interval("decode")
    if scope != "gap" or seen_ms is None or decode is None:
        return seen_ms
    rows = [m.figures for m in record.host if m.name == "token"]
    placed_ms = sum(min(row.get("other_python_ms", 0.0), _threads_ms(row)) for row in rows)
    missed_ms = max(0.0, decode.figures.get("other_python_ms", 0.0) - placed_ms)
    return max(seen_ms, min(_threads_ms(figures), seen_ms + missed_ms))


def _threads_ms(figures: Numbers) -> float:
    """Processor time of all threads but the main one."""
    return figures.get("process_cpu_ms", 0.0) - figures.get("main_cpu_ms", 0.0)


def _ordinary(usual: Baseline, scope: Scope, host: Sequence[TimedRow]) -> Numbers:
    """What the rows would have held on an ordinary day."""
    if scope != "gap":
        return usual.phases.get(scope, {})
    decode = usual.phases.get("decode", {})
    share = sum(row.figures.get("tokens", 0.0) for row in host) / max(1.0, usual.decode_tokens)
    return {name: value * min(1.0, share) for name, value in decode.items()}


def _sum(rows: Sequence[Numbers]) -> Numbers:
    total: Numbers = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _column(samples: Sequence[TimedRow], name: str) -> list[float]:
    return [sample.figures[name] for sample in samples if name in sample.figures]


def _mean(samples: Sequence[TimedRow], name: str) -> float | None:
    values = _column(samples, name)
    return statistics.fmean(values) if values else None
