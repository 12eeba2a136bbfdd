"""What is usual in one cell: the level that gaps and slow runs are measured against."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qwencli.bench.attribution.evidence import Usual
from qwencli.bench.attribution.records import Moment, Numbers, RunRecord, quicker
from qwencli.bench.statistics.drift import ALPHA, drift
from qwencli.bench.statistics.slow_tokens import UsualToken, usual_token

# Counters of host.csv of which a phase of a run has a usual amount.
COUNTERS = (
    "main_cpu_ms", "runqueue_ms", "helper_runqueue_ms", "throttled_ms", "steal_ms",
    "other_python_ms", "others_cpu_ms", "off_cpu_ms", "syncs",
)  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """Of a cell.

    Args:
        token: None where no run has two tokens.
        decode_tokens: how many tokens a decode makes.
        phases: phase -> median of each counter over the cell's runs.
        warming: correlation of GPU temperature with the order of runs; None where speed does not
            fall or there are too few runs to say.
        loads: share of runs before which the model was loaded.
    """

    token: UsualToken | None
    gpu: Usual
    decode_tokens: float = 0.0
    phases: dict[str, Numbers] = field(default_factory=dict)
    warming: float | None = None
    loads: float = 0.0


def baseline(records: Sequence[RunRecord]) -> Baseline:
    """Of the measured runs of one cell (not empty). Where they differ so much that none is usual,
    the quicker half says what is."""
    everything, records = records, quicker(records, "decode_s")
    samples = [sample for record in records for sample in record.gpu]
    decodes = [moment for record in records if (moment := record.interval("decode"))]
    return Baseline(
        token=usual_token(record.itl_ms for record in records),
        gpu=Usual(
            sm_clock_mhz=_median(samples, "sm_clock_mhz"),
            pstate=_median(samples, "pstate"),
            temperature_c=_median(samples, "temperature_c"),
            power_w=_median(samples, "power_w"),
            core_mhz=_median(decodes, "core_mhz"),
            core_loop_us=_median(records, "core_loop_us"),
            memory_walk_us=_median(records, "memory_walk_us"),
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


def counters(moment: Moment) -> Numbers:
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


def reasons(samples: Iterable[Moment]) -> frozenset[str]:
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


def _median(samples: Sequence[Moment] | Sequence[RunRecord], column: str) -> float | None:
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
