"""Puts together what was observed during one slow stretch of one run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qwencli.bench.attribution.baseline import Baseline, counters, reasons
from qwencli.bench.attribution.causes import Scope, Stretch
from qwencli.bench.attribution.evidence import Evidence
from qwencli.bench.attribution.records import Moment, Numbers, RunRecord
from qwencli.bench.measure.roofline import DRIVER_MEAN_S

# A sensor sample speaks for this long before and after itself: the sampler's interval.
NEAR_S = 0.05
# Signals are noted when the interpreter next runs, a little after the process does.
LATE_S = 0.02
# A gap that is most of a run has the whole decode as its evidence.
WHOLE_RUN = 0.8


def observe(
    record: RunRecord, usual: Baseline, stretch: Stretch, device_busy_percent: float | None
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
        core_loop_us=record.figures.get("core_loop_us"),
        memory_walk_us=record.figures.get("memory_walk_us"),
        gpu_processes=max(_column(near, "compute_processes"), default=None),
        fresh_load="load_s" in record.figures and usual.loads < 0.5,
        device_busy_percent=device_busy_percent,
        spread=_spread(record, usual, stretch),
        warming=usual.warming,
        usual=usual.gpu,
    )


def _spread(record: RunRecord, usual: Baseline, stretch: Stretch) -> float:
    if stretch.scope != "decode" or usual.token is None or stretch.lost_ms <= 0:
        return 0.0
    slower_ms = statistics.median(record.itl_ms) - usual.token.ms
    return min(1.0, max(0.0, slower_ms * len(record.itl_ms) / stretch.lost_ms))


def _host_rows(record: RunRecord, stretch: Stretch) -> list[Moment]:
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


def _ordinary(usual: Baseline, scope: Scope, host: Sequence[Moment]) -> Numbers:
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


def _column(samples: Sequence[Moment], name: str) -> list[float]:
    return [sample.figures[name] for sample in samples if name in sample.figures]


def _mean(samples: Sequence[Moment], name: str) -> float | None:
    values = _column(samples, name)
    return statistics.fmean(values) if values else None
