"""Raw rows of one campaign, sorted into what each run did: tokens and sensor samples in time.

A resumed cell has warmed up more than once, so `run` alone does not name one row of runs.csv: the
n-th row of a run goes with the n-th stretch of its tokens and samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qwencli.bench.attribution.causes import Finding
from qwencli.bench.report.html.packing import MISSING
from qwencli.errors import BenchError

RawRow = Mapping[str, str]

GENERATED = ("ok", "warmup")


@dataclass
class GpuSamples:
    """What one GPU's sensors said; equal lengths, NaN where a sensor could not be read."""

    t_s: list[float] = field(default_factory=list)
    sm_clock_mhz: list[float] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    throttle_reasons: list[str] = field(default_factory=list)


@dataclass
class Take:
    """One run that generated. Times are seconds on the campaign's clock."""

    row: RawRow
    t_s: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    gpus: dict[str, GpuSamples] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def warmup(self) -> bool:
        return self.row["status"] == "warmup"

    @property
    def start_s(self) -> float:
        """When the request was made: TTFT before the first token."""
        if not self.t_s:
            return min((gpu.t_s[0] for gpu in self.gpus.values()), default=0.0)
        return self.t_s[0] - (number(self.row["ttft_s"]) or 0.0)


def number(text: str) -> float | None:
    """A CSV field; None when it is empty.

    Raises:
        BenchError: it is not a number.
    """
    if not text:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise BenchError(
            f"the campaign's rows are broken: {text!r} is not a number", "measure it again"
        ) from error


def takes_by_cell(
    runs: Iterable[RawRow],
    tokens: Iterable[RawRow],
    gpu: Iterable[RawRow],
    findings: Iterable[Finding] = (),
) -> dict[str, list[Take]]:
    """The runs that generated, of each cell, in the order in which they ran."""
    cells: dict[str, list[Take]] = defaultdict(list)
    by_run: dict[tuple[str, str], list[Take]] = defaultdict(list)
    for row in runs:
        if row["status"] in GENERATED:
            take = Take(row)
            cells[row["cell_id"]].append(take)
            by_run[row["cell_id"], row["run"]].append(take)
    _add_tokens(by_run, tokens)
    _add_samples(by_run, gpu)
    for finding in findings:  # of measured runs alone, whose number is theirs alone
        for take in by_run.get((finding.cell_id, finding.run), ()):
            take.findings.append(finding)
    return cells


def _add_tokens(by_run: Mapping[tuple[str, str], list[Take]], tokens: Iterable[RawRow]) -> None:
    key, last, take = ("", ""), -1, None
    begun: dict[tuple[str, str], int] = defaultdict(int)
    for token in tokens:
        index, this = int(token["token_index"]), (token["cell_id"], token["run"])
        if this != key or index <= last:
            take = _nth(by_run.get(this, []), begun[this])
            begun[this] += 1
        key, last = this, index
        if take is not None:
            take.t_s.append(_or_missing(token["t_s"]))
            take.itl_ms.append(_or_missing(token["itl_ms"]))


def _add_samples(by_run: Mapping[tuple[str, str], list[Take]], gpu: Iterable[RawRow]) -> None:
    """A stretch ends where another run's samples, or an earlier clock (a reboot), begin."""
    key, last, take = ("", ""), 0.0, None
    begun: dict[tuple[str, str], int] = defaultdict(int)
    for sample in gpu:
        time, this = _or_missing(sample["t_s"]), (sample["cell_id"], sample["run"])
        if this != key or time < last:
            take = _nth(by_run.get(this, []), begun[this])
            begun[this] += 1
        key, last = this, time
        if take is not None:
            samples = take.gpus.setdefault(sample["gpu_index"], GpuSamples())
            samples.t_s.append(time)
            samples.sm_clock_mhz.append(_or_missing(sample["sm_clock_mhz"]))
            samples.power_w.append(_or_missing(sample["power_w"]))
            samples.throttle_reasons.append(sample["throttle_reasons"])


def _nth(takes: list[Take], number: int) -> Take | None:
    return takes[number] if number < len(takes) else None


def _or_missing(text: str) -> float:
    value = number(text)
    return MISSING if value is None else value
