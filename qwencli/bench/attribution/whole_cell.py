"""What slowed a whole cell down, judged without looking at what is usual in it.

A disturbance that lasts as long as the cell is what is usual there, so that no rule which compares
runs with each other can see it. Here each kind of it is measured in percent of decode and held
against a fixed limit. Above the limit the cell's figure is not to be quoted.

A percentage is the one of the middle half of the runs, by that percentage: the figure that a cell
shows is a median, which a quarter of disturbed runs on either side leaves where it is. How the
limits were found: docs/bench-rules.md, "Limits of a figure".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwencli.bench.attribution.evidence import counters
from qwencli.bench.attribution.records import RunRecord, TimedRow, records_by_cell
from qwencli.bench.causes import POWER_CAP, THROTTLING, Cause
from qwencli.bench.measure.roofline import GPU_BUSY

# The kernel counts what the hypervisor takes in ticks of 10 ms: fewer say nothing.
LEAST_STEAL_MS = 50.0
# A driver rounds the limit that it keeps.
LOWERED_LIMIT_PERCENT = 98.0


@dataclass(frozen=True)
class DisturbanceLimit:
    """`percent` of decode that a cell may lose to one cause.

    Args:
        column: of cells.csv.
        trust: how far such a sign can be trusted, 0 to 1.
        head: of the column in the tables; `words` completes "12% of decode".
    """

    cause: Cause
    column: str
    percent: float
    trust: float
    head: str
    words: str

    @property
    def of_gpu(self) -> bool:
        return self.cause in (Cause.OTHER_GPU_PROCESS, Cause.THROTTLE)


# Each limit lies at least twice above what quiet machines show, and far below what a disturbance
# on purpose does. In order of how directly the figure says what was lost.
LIMITS = (
    DisturbanceLimit(Cause.CGROUP_THROTTLED, "throttled_percent", 5.0, 0.95, "throttled",
          "was taken by a limit of this control group (cpu.max, docker --cpus)"),
    DisturbanceLimit(Cause.SUSPENDED, "stopped_percent", 5.0, 0.9, "stopped",
          "passed while the process was stopped (SIGSTOP)"),
    DisturbanceLimit(Cause.PREEMPTION, "waited_percent", 5.0, 0.95, "waited",
          "waited for a processor"),
    DisturbanceLimit(Cause.HELPER_PREEMPTED, "helper_waited_percent", 5.0, 0.9, "helpers",
          "had a helper thread waiting for a processor"),
    DisturbanceLimit(Cause.PREEMPTION, "stolen_percent", 5.0, 0.8, "stolen",
          "was taken by the hypervisor"),
    DisturbanceLimit(Cause.PAGE_FAULTS, "paged_percent", 5.0, 0.8, "paged",
          "waited for pages from disk"),
    DisturbanceLimit(Cause.OTHER_GPU_PROCESS, "other_gpu_percent", 5.0, 0.8, "GPU shared",
          "went to another program on the GPU"),
    DisturbanceLimit(Cause.THROTTLE, "clock_held_percent", 3.0, 0.8, "clock",
          "was lost to a clock held back against heat or power"),
    DisturbanceLimit(Cause.PROCESSOR, "core_slow_percent", 20.0, 0.7, "core",
          "was lost to a core slower than this campaign's quickest"),
    DisturbanceLimit(Cause.PREEMPTION, "others_cpu_percent", 10.0, 0.6, "others",
          "of this machine's processors went to other programs"),
)  # fmt: skip
COLUMNS = tuple(limit.column for limit in LIMITS)


@dataclass(frozen=True)
class Machine:
    """What of a campaign's machine the limits depend on; `cores` None = not known."""

    on_gpu: bool
    cores: int | None


UNKNOWN_MACHINE = Machine(on_gpu=False, cores=None)


def machine_of(environment: Mapping[str, Any]) -> Machine:
    """As environment.json has it."""
    device, cpu = (environment.get(name) or {} for name in ("device", "cpu"))
    kind = str(device.get("device")).partition(":")[0]
    return Machine(kind not in ("cpu", "None"), cpu.get("logical_cores"))


class BestOfCampaign(NamedTuple):
    """What the quickest cell of the campaign shows: its core, and the highest clock of the GPU."""

    cpu_loop_us: float | None = None
    sm_clock_mhz: float | None = None


@dataclass(frozen=True)
class ExceededLimit:
    """A limit that a cell is above."""

    limit: DisturbanceLimit
    percent: float

    @property
    def words(self) -> str:
        """ "51% of decode waited for a processor" """
        subject = "" if self.limit.words.startswith("of") else " of decode"
        return f"{self.percent:.0f}%{subject} {self.limit.words}"


def over_limits(row: Mapping[str, Any]) -> list[ExceededLimit]:
    """The limits that a cell is above, what cost it most first.

    Args:
        row: of cells.csv, or any mapping with some of COLUMNS; numbers or their text.
    """
    found = [
        ExceededLimit(limit, float(value))
        for limit in LIMITS
        if (value := row.get(limit.column)) not in (None, "") and float(value) > limit.percent
    ]
    # What other programs had is the weakest sign: it says nothing of what that cost.
    return sorted(found, key=lambda one: (one.limit is LIMITS[-1], -one.percent))


def percentages(
    cells: Mapping[str, Sequence[RunRecord]],
    device_busy_percent: Mapping[str, float | None],
    machine: Machine,
) -> dict[str, dict[str, float | None]]:
    """Cell -> COLUMNS; None = not measured here.

    Args:
        cells: the measured runs of each.
        device_busy_percent: how much of the time a cell's device works, where measured.
    """
    best = _best_of(cells.values())
    return {
        cell: _of_cell(records, best, device_busy_percent.get(cell), machine)
        for cell, records in cells.items()
    }


def of_process(
    runs: Iterable[Mapping[str, Any]],
    host: Iterable[Mapping[str, Any]],
    gpu: Iterable[Mapping[str, Any]],
    machine: Machine,
) -> list[ExceededLimit]:
    """The limits that a process was above whose rows are not in files yet, as far as its own runs
    tell: not whether other cells of the campaign had a quicker core or a higher clock.

    Args:
        runs, host, gpu: rows of one cell, as for the files of these names.
    """
    records = records_by_cell(*map(_texts, (runs, (), host, gpu)))
    return [
        over for found in percentages(records, {}, machine).values() for over in over_limits(found)
    ]


def _texts(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]


def _best_of(cells: Iterable[Sequence[RunRecord]]) -> BestOfCampaign:
    cells = list(cells)
    loops = [loop for records in cells if (loop := _median(records, "cpu_loop_us"))]
    clocks = [
        clock
        for records in cells
        for record in records
        for sample in record.gpu
        if (clock := sample.figures.get("sm_clock_mhz"))
    ]
    return BestOfCampaign(min(loops, default=None), max(clocks, default=None))


def _of_cell(
    records: Sequence[RunRecord], best: BestOfCampaign, busy: float | None, machine: Machine
) -> dict[str, float | None]:
    decodes = [(record, decode) for record in records if (decode := record.interval("decode"))]
    on_gpu, cores = machine.on_gpu, machine.cores

    def middle(part_ms: Callable[[RunRecord, TimedRow], float | None]) -> float | None:
        return middle_percent(
            [
                (part, decode.span_ms)
                for record, decode in decodes
                if (part := part_ms(record, decode)) is not None and decode.span_ms > 0
            ]
        )

    found = {
        "throttled_percent": middle(_throttled_ms),
        "stopped_percent": middle(_stopped_ms),
        "waited_percent": middle(_waited_ms),
        # A GPU's work does not wait for the pools of its host.
        "helper_waited_percent": None if on_gpu else middle(_helper_waited_ms),
        "stolen_percent": _stolen_percent([decode for _, decode in decodes]),
        "paged_percent": middle(_paged_ms),
        "other_gpu_percent": middle(_other_gpu_ms),
        "clock_held_percent": middle(lambda run, decode: _held_ms(run, decode, best)),
        "core_slow_percent": (
            None
            if on_gpu and (busy is None or busy >= GPU_BUSY)
            else middle(lambda run, decode: _slow_core_ms(run, decode, best))
        ),
        "others_cpu_percent": None if on_gpu or not cores else _per(cores, middle(_others_ms)),
    }
    # Threads that waited in turns can have waited longer than there was time.
    return {name: None if share is None else min(100.0, share) for name, share in found.items()}


def middle_percent(parts: Sequence[tuple[float, float]]) -> float | None:
    """What the parts are of their spans, in percent, over the middle half of the pairs by that."""
    ordered = sorted(parts, key=lambda pair: pair[0] / pair[1])
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    if not kept:
        return None
    return 100 * sum(part for part, _ in kept) / sum(span for _, span in kept)


def _throttled_ms(run: RunRecord, decode: TimedRow) -> float | None:
    """No more than a thread waited: the limit's own count is over all processors."""
    figures = decode.figures
    if "throttled_ms" not in figures:
        return None
    waited = max(figures.get("runqueue_ms", decode.span_ms), 0.0)
    return min(figures["throttled_ms"], waited)


def _stopped_ms(run: RunRecord, decode: TimedRow) -> float | None:
    """The main thread neither ran nor waited for a processor, and went on after a stop signal."""
    away = counters(decode).get("off_cpu_ms")
    if away is None:
        return None
    ends = (moment.end_s for moment in run.host if moment.name == "stop")
    return away if any(decode.start_s <= end <= decode.end_s for end in ends) else 0.0


def _waited_ms(run: RunRecord, decode: TimedRow) -> float | None:
    """The main thread's wait; campaigns from before threads were told apart have the longest."""
    figures = decode.figures
    waited = figures.get("main_runqueue_ms", figures.get("runqueue_ms"))
    if waited is None:
        return None
    # What the process's own other Python thread had was taken by nobody else.
    own = figures.get("other_python_ms", 0.0)
    return max(0.0, waited - (_throttled_ms(run, decode) or 0.0) - own)


def _helper_waited_ms(run: RunRecord, decode: TimedRow) -> float | None:
    waited = decode.figures.get("helper_runqueue_ms")
    return None if waited is None else max(0.0, waited - (_throttled_ms(run, decode) or 0.0))


def _stolen_percent(decodes: Sequence[TimedRow]) -> float | None:
    """Over all runs, since a single one has too few ticks."""
    stolen = [ms for decode in decodes if (ms := counters(decode).get("steal_ms")) is not None]
    if not stolen:
        return None
    total = sum(decode.span_ms for decode in decodes)
    return 100 * sum(stolen) / total if sum(stolen) >= LEAST_STEAL_MS and total else 0.0


def _paged_ms(run: RunRecord, decode: TimedRow) -> float | None:
    """The main thread slept and pages came from disk."""
    faults = decode.figures.get("major_faults")
    if faults is None:
        return None
    return counters(decode).get("off_cpu_ms") if faults else 0.0


def _other_gpu_ms(run: RunRecord, decode: TimedRow) -> float | None:
    known = [s.figures["other_sm_percent"] for s in _samples(run, decode, "other_sm_percent")]
    return decode.span_ms * statistics.fmean(known) / 100 if known else None


def _held_ms(run: RunRecord, decode: TimedRow, best: BestOfCampaign) -> float | None:
    """The time that a lower clock costs while the driver holds it back, if time goes with its
    inverse."""
    samples = _samples(run, decode, "sm_clock_mhz")
    if not samples or not best.sm_clock_mhz:
        return None
    highest = best.sm_clock_mhz
    lost = [1 - s.figures["sm_clock_mhz"] / _free_clock_mhz(s, highest) for s in samples]
    return decode.span_ms * statistics.fmean(lost)


def _free_clock_mhz(sample: TimedRow, highest: float) -> float:
    """What a clock would be that nothing holds: itself where nothing does, else the campaign's
    highest. Where heat, the supply or a power limit below the card's own holds it, no cell may have
    been free: then it is the highest that the card has. At its own limit a card runs all its life.
    """
    figures = sample.figures
    held = {reason for reason in THROTTLING if f"throttle:{reason}" in figures}
    if not held:
        return figures["sm_clock_mhz"]
    lowered = figures.get("power_limit_percent", 100.0) < LOWERED_LIMIT_PERCENT
    if held != {POWER_CAP} or lowered:
        return max(highest, figures.get("max_sm_clock_mhz", 0.0))
    return highest


def _samples(run: RunRecord, decode: TimedRow, column: str) -> list[TimedRow]:
    return [
        sample
        for sample in run.gpu
        if decode.start_s <= sample.end_s <= decode.end_s and column in sample.figures
    ]


def _slow_core_ms(run: RunRecord, decode: TimedRow, best: BestOfCampaign) -> float | None:
    loop, ran = run.figures.get("cpu_loop_us"), decode.figures.get("main_cpu_ms")
    if not loop or ran is None or not best.cpu_loop_us:
        return None
    return max(0.0, ran * (1 - best.cpu_loop_us / loop))


def _others_ms(run: RunRecord, decode: TimedRow) -> float | None:
    return counters(decode).get("others_cpu_ms")


def _per(cores: int, percent: float | None) -> float | None:
    return None if percent is None else percent / cores


def _median(records: Sequence[RunRecord], column: str) -> float | None:
    values = [record.figures[column] for record in records if column in record.figures]
    return statistics.median(values) if values else None
