"""Raw rows of one campaign as one record for each measured run, numbers as numbers."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qwencli.errors import BenchError

RawRow = Mapping[str, str]
# A column that is empty is not in it.
Numbers = dict[str, float]

# The columns that attribution looks at; to read all of a long campaign's would take seconds.
_OF_RUN = (
    "ttft_s", "decode_s", "decode_tok_per_s", "load_s", "temperature_c_max",
    "cpu_loop_us", "pointer_chase_us",
)  # fmt: skip
_OF_HOST = (
    "tokens", "main_cpu_ms", "process_cpu_ms", "other_python_ms", "runqueue_ms",
    "voluntary_switches", "system_busy_ms", "steal_ms", "device_allocs", "alloc_retries", "syncs",
    "core_mhz", "main_runqueue_ms", "helper_runqueue_ms", "throttled_ms", "major_faults",
)  # fmt: skip
# Phase -> how long it took, in runs.csv.
_SECONDS = {"prefill": "ttft_s", "decode": "decode_s"}
# Of these, what is no amount that adds up over time.
MEANS = frozenset({"core_mhz"})
_OF_GPU = (
    "sm_clock_mhz", "pstate", "power_w", "temperature_c", "compute_processes",
    "utilization_percent", "other_sm_percent", "max_sm_clock_mhz", "power_limit_percent",
)  # fmt: skip


@dataclass(frozen=True)
class TimedRow:
    """A row of host.csv or gpu.csv; `end_s` on the campaign's clock, a sample has no length."""

    name: str
    start_s: float
    end_s: float
    figures: Numbers = field(default_factory=dict)

    @property
    def span_ms(self) -> float:
        return 1e3 * (self.end_s - self.start_s)

    def part(self, share: float) -> TimedRow:
        """As if all that happened had been spread evenly."""
        share = min(1.0, share)
        start_s = self.end_s - share * (self.end_s - self.start_s)
        figures = {
            name: value if name in MEANS else value * share for name, value in self.figures.items()
        }
        return TimedRow(self.name, start_s, self.end_s, figures)

    def overlap_ms(self, start_s: float, end_s: float) -> float:
        return 1e3 * max(0.0, min(self.end_s, end_s) - max(self.start_s, start_s))


@dataclass
class RunRecord:
    """One measured run. `t_s[i]` is when token i came, `itl_ms[i]` the time from it to the next."""

    cell_id: str
    run: str
    figures: Numbers
    on_gpu: bool = False
    t_s: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    host: list[TimedRow] = field(default_factory=list)
    gpu: list[TimedRow] = field(default_factory=list)

    def interval(self, name: str) -> TimedRow | None:
        return next((moment for moment in self.host if moment.name == name), None)

    def phase(self, name: str) -> TimedRow | None:
        """The row of a phase, with no more in it than the phase itself took.

        A row of the first token ends when the host sees it, which may be some tokens later.
        """
        row, took_s = self.interval(name), self.figures.get(_SECONDS[name])
        if row is None or took_s is None or row.span_ms <= 1e3 * took_s:
            return row
        return row.part(1e3 * took_s / row.span_ms)


def records_by_cell(
    runs: Iterable[RawRow],
    tokens: Iterable[RawRow],
    host: Iterable[RawRow],
    gpu: Iterable[RawRow],
) -> dict[str, list[RunRecord]]:
    """The measured runs of each cell, in the order in which they ran.

    Raises:
        BenchError: a row holds something else than a number where one belongs.
    """
    cells: dict[str, list[RunRecord]] = defaultdict(list)
    by_run: dict[tuple[str, str], RunRecord] = {}
    try:
        for row in runs:
            if row["status"] == "ok":
                record = RunRecord(row["cell_id"], row["run"], numbers(row, _OF_RUN))
                cells[record.cell_id].append(record)
                by_run[record.cell_id, record.run] = record
        for row in tokens:
            if found := by_run.get((row["cell_id"], row["run"])):
                _add_token(found, row)
        for row in host:
            if found := by_run.get((row["cell_id"], row["run"])):
                end = float(row["t_s"])
                start = end - float(row["span_ms"]) / 1e3
                found.host.append(TimedRow(row["event"], start, end, numbers(row, _OF_HOST)))
        for row in gpu:
            if found := by_run.get((row["cell_id"], row["run"])):
                _add_sample(found, row)
    except ValueError as error:
        raise BenchError(f"the campaign's rows are broken: {error}", "measure it again") from error
    for record in by_run.values():
        record.gpu = _busiest(record.gpu)
    return cells


def _add_token(record: RunRecord, row: RawRow) -> None:
    record.t_s.append(float(row["t_s"]))
    if row["itl_ms"]:
        record.itl_ms.append(float(row["itl_ms"]))
    record.on_gpu = record.on_gpu or bool(row["gpu_ms"])


def _add_sample(record: RunRecord, row: RawRow) -> None:
    at = float(row["t_s"])
    figures = numbers(row, _OF_GPU)
    for reason in filter(None, row["throttle_reasons"].split("|")):
        figures[f"throttle:{reason}"] = 1.0
    record.gpu.append(TimedRow(row["gpu_index"], at, at, figures))


def numbers(row: RawRow, names: Iterable[str]) -> Numbers:
    """Of these columns, those that the file has and that are not empty."""
    return {name: float(text) for name in names if (text := row.get(name))}


def _busiest(samples: list[TimedRow]) -> list[TimedRow]:
    """Those of the GPU that drew most power: with several, the others were not the run's."""
    power: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        power[sample.name].append(sample.figures.get("power_w", 0.0))
    if len(power) < 2:
        return samples
    name = max(power, key=lambda name: statistics.fmean(power[name]))
    return [sample for sample in samples if sample.name == name]


# Runs that differ by more than this have no level of their own (`stats.UNSTABLE_RATIO`).
RESTLESS_RATIO = 1.1


def faster_half(records: Sequence[RunRecord], column: str) -> Sequence[RunRecord]:
    """All of a cell's runs, or the half that took least, where a quarter or more took
    RESTLESS_RATIO times as long: a disturbance of half of the runs is in their median.

    Args:
        column: a time of runs.csv.
    """
    known = sorted(
        (record for record in records if record.figures.get(column)),
        key=lambda record: record.figures[column],
    )
    upper = known[-(len(known) // 4 + 1)].figures[column] if known else 0.0
    if len(known) < 2 or upper <= RESTLESS_RATIO * known[0].figures[column]:
        return records
    half = {id(record) for record in known[: (len(known) + 1) // 2]}
    return [record for record in records if id(record) in half]
