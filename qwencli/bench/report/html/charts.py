"""What the charts of one cell draw, as the JSON object that assets/*.js read.

Raw rows are first sorted into what each run did: tokens and sensor samples in time. A resumed cell
has warmed up more than once, so `run` alone does not name one row of runs.csv: the n-th row of a
run goes with the n-th stretch of its tokens and samples. Long series are thinned, their extremes
kept, and packed as text that a browser turns back into a typed array.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwencli.bench.causes import Finding
from qwencli.bench.report.cell_statistics import generate_s
from qwencli.bench.statistics.slow_tokens import percentile, run_limit_ms
from qwencli.errors import BenchError

RawRow = Mapping[str, str]

GENERATED = ("ok", "warmup")
MISSING = float("nan")
# Points of the whole report. With these a report of 100 cells x 20 runs (and a warm-up each) x 256
# tokens is drawn token by token, and runs of any length keep it below 15 MB.
TOKEN_POINTS = 540_000
GPU_POINTS = 200_000
# Gaps of the whole report whose causes are drawn; of more, those that cost most.
CAUSE_MARKS = 20_000
# More than this in one run is more than a screen has columns.
RUN_POINTS = 2_000

PERCENTILES = (50, 90, 99)
BINS = 80
LEAST_MS = 0.01  # tokens that arrive together are 0 ms apart; a logarithmic axis has no 0

RUN_NUMBERS = (
    "decode_tok_per_s", "load_s", "preprocess_s", "vision_encode_s", "prefill_s", "ttft_s",
    "decode_s", "e2e_s", "itl_p50_ms", "itl_p99_ms", "itl_max_ms", "stall_count",
    "sm_clock_mhz_mean", "sm_clock_mhz_min", "power_w_mean", "temperature_c_max",
    "fragmentation_percent", "num_alloc_retries", "main_thread_cpu_percent", "gc_pause_ms",
    "involuntary_switches",
)  # fmt: skip
UNTHROTTLED = ("", "none")


@dataclass
class GpuSamples:
    """What one GPU's sensors said; equal lengths, NaN where a sensor could not be read."""

    t_s: list[float] = field(default_factory=list)
    sm_clock_mhz: list[float] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    throttle_reasons: list[str] = field(default_factory=list)


@dataclass
class RunTrace:
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


def traces_by_cell(
    runs: Iterable[RawRow],
    tokens: Iterable[RawRow],
    gpu: Iterable[RawRow],
    findings: Iterable[Finding] = (),
) -> dict[str, list[RunTrace]]:
    """The runs that generated, of each cell, in the order in which they ran."""
    cells: dict[str, list[RunTrace]] = defaultdict(list)
    by_run: dict[tuple[str, str], list[RunTrace]] = defaultdict(list)
    for row in runs:
        if row["status"] in GENERATED:
            trace = RunTrace(row)
            cells[row["cell_id"]].append(trace)
            by_run[row["cell_id"], row["run"]].append(trace)
    _add_tokens(by_run, tokens)
    _add_samples(by_run, gpu)
    for finding in findings:  # of measured runs alone, whose number is theirs alone
        for trace in by_run.get((finding.cell_id, finding.run), ()):
            trace.findings.append(finding)
    return cells


def _add_tokens(by_run: Mapping[tuple[str, str], list[RunTrace]], tokens: Iterable[RawRow]) -> None:
    key, last, trace = ("", ""), -1, None
    begun: dict[tuple[str, str], int] = defaultdict(int)
    for token in tokens:
        index, this = int(token["token_index"]), (token["cell_id"], token["run"])
        if this != key or index <= last:
            trace = _nth(by_run.get(this, []), begun[this])
            begun[this] += 1
        key, last = this, index
        if trace is not None:
            trace.t_s.append(_or_missing(token["t_s"]))
            trace.itl_ms.append(_or_missing(token["itl_ms"]))


def _add_samples(by_run: Mapping[tuple[str, str], list[RunTrace]], gpu: Iterable[RawRow]) -> None:
    """A stretch ends where another run's samples, or an earlier clock (a reboot), begin."""
    key, last, trace = ("", ""), 0.0, None
    begun: dict[tuple[str, str], int] = defaultdict(int)
    for sample in gpu:
        time, this = _or_missing(sample["t_s"]), (sample["cell_id"], sample["run"])
        if this != key or time < last:
            trace = _nth(by_run.get(this, []), begun[this])
            begun[this] += 1
        key, last = this, time
        if trace is not None:
            samples = trace.gpus.setdefault(sample["gpu_index"], GpuSamples())
            samples.t_s.append(time)
            samples.sm_clock_mhz.append(_or_missing(sample["sm_clock_mhz"]))
            samples.power_w.append(_or_missing(sample["power_w"]))
            samples.throttle_reasons.append(sample["throttle_reasons"])


def _nth(traces: list[RunTrace], number: int) -> RunTrace | None:
    return traces[number] if number < len(traces) else None


def _or_missing(text: str) -> float:
    value = number(text)
    return MISSING if value is None else value


def pack_floats(values: Sequence[float]) -> str:
    """Base64 of little-endian 32-bit floats: 5.3 characters a value, seven digits, NaN = missing.

    Written decimals need about as many characters, and the browser must parse each of them.
    """
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def keep_extremes(series: Sequence[Sequence[float]], most: int) -> list[int]:
    """Indices of the points to draw: all of them, or about `most` of them.

    The points are cut into stretches of equal length, and of each stretch the lowest and the
    highest value of every series stay, and so do the first and the last point: the worst stall of
    each stretch is drawn, which taking every n-th point would miss.

    Args:
        series: one or more series of one length; missing values are NaN.
        most: at least 2 for each series.
    """
    length = len(series[0])
    if length <= most:
        return list(range(length))
    stretches = max(1, most // (2 * len(series)))
    kept = {0, length - 1}
    for number in range(stretches):
        stretch = range(length * number // stretches, length * (number + 1) // stretches)
        for values in series:
            known = [i for i in stretch if values[i] == values[i]]
            if known:
                kept.add(min(known, key=values.__getitem__))
                kept.add(max(known, key=values.__getitem__))
    return sorted(kept)


def points_per_run(total: int, runs: int) -> int:
    """How many of a report's `total` points each of its runs may have."""
    return max(16, min(RUN_POINTS, total // max(1, runs)))


def cell_charts(
    traces: Sequence[RunTrace],
    token_points: int,
    gpu_points: int,
    cause_marks: int = RUN_POINTS,
    *,
    as_origin: bool = False,
    quotable: bool = True,
) -> dict[str, Any]:
    """Everything drawn when a cell is opened; `traces` is not empty.

    Args:
        token_points, gpu_points, cause_marks: the most points of one run.
        as_origin: with the time of the whole generate(), and its speed.
        quotable: whether the median of the runs is a figure to show.
    """
    start = traces[0].start_s
    itl = [
        value for trace in traces if not trace.warmup for value in trace.itl_ms if value == value
    ]
    return {
        "quotable": quotable,
        "histogram": histogram(itl),
        "percentiles": {f"p{p}": percentile(itl, p) for p in PERCENTILES if itl},
        "runs": [
            {
                **_run(trace, start, token_points, gpu_points),
                **_whole_answer(trace.row if as_origin else {}),
                "causes": _causes(trace, cause_marks),
                "slow": [_cause(f, trace.start_s) for f in trace.findings if f.scope != "gap"],
            }
            for trace in traces
        ],
    }


def _run(
    trace: RunTrace, cell_start_s: float, token_points: int, gpu_points: int
) -> dict[str, Any]:
    start = trace.start_s
    known = [value for value in trace.itl_ms if value == value]
    kept = keep_extremes([trace.itl_ms], token_points) if trace.itl_ms else []
    return {
        "run": trace.row["run"],
        "warmup": trace.warmup,
        "start_s": round(start - cell_start_s, 6),
        "tokens": len(trace.t_s),
        "index": None if len(kept) == len(trace.t_s) else kept,
        "t_s": pack_floats([trace.t_s[i] - start for i in kept]),
        "itl_ms": pack_floats([trace.itl_ms[i] for i in kept]),
        "gpus": [_gpu(name, gpu, start, gpu_points) for name, gpu in sorted(trace.gpus.items())],
        "throttle_reasons": trace.row["throttle_reasons"],
        "stall_ms": run_limit_ms(known) if known else None,
        **{name: number(trace.row[name]) for name in RUN_NUMBERS},
    }


def _whole_answer(row: RawRow) -> dict[str, float | None]:
    seconds = generate_s(row)
    tokens = int(row["num_new_tokens"]) if seconds else None
    speed = tokens / seconds if tokens and seconds else None
    return {"generate_s": seconds, "generate_tokens": tokens, "generate_tok_per_s": speed}


def _causes(trace: RunTrace, most: int) -> list[list[Any]]:
    """The gaps that cost most, in the order of time."""
    gaps = [finding for finding in trace.findings if finding.scope == "gap"]
    kept = sorted(gaps, key=lambda finding: -finding.lost_ms)[:most]
    kept.sort(key=lambda finding: finding.t_s)
    return [_cause(finding, trace.start_s) for finding in kept]


def _cause(finding: Finding, start_s: float) -> list[Any]:
    """From, to (s from the start of the run), cause, ms lost, confidence, evidence."""
    end = finding.t_s - start_s
    return [
        round(end - finding.span_ms / 1e3, 5),
        round(end, 5),
        finding.cause.value,
        round(finding.lost_ms, 2),
        round(finding.confidence, 2),
        finding.evidence,
    ]


def _gpu(name: str, samples: GpuSamples, start: float, most: int) -> dict[str, Any]:
    kept = keep_extremes([samples.sm_clock_mhz, samples.power_w], most)
    return {
        "gpu_index": name,
        "t_s": pack_floats([samples.t_s[i] - start for i in kept]),
        "sm_clock_mhz": pack_floats([samples.sm_clock_mhz[i] for i in kept]),
        "power_w": pack_floats([samples.power_w[i] for i in kept]),
        "throttled": throttled(samples, start, most),
    }


def throttled(samples: GpuSamples, start_s: float, most: int) -> list[tuple[float, float, str]]:
    """Stretches (from, to, reasons) in which the GPU was throttled, in seconds from `start_s`.

    Those that lie closer together than one part in `most` of the run are joined.
    """
    if not samples.t_s:
        return []
    gap_s = (samples.t_s[-1] - samples.t_s[0]) / most
    stretches: list[tuple[float, float, str]] = []
    before = ""
    for time, reasons in zip(samples.t_s, samples.throttle_reasons, strict=True):
        at = round(time - start_s, 4)
        if reasons not in UNTHROTTLED:
            joined = stretches and (reasons == before or at - stretches[-1][1] <= gap_s)
            since, _, said = stretches.pop() if joined else (at, at, reasons)
            stretches.append((since, at, said if reasons in said else f"{said} {reasons}"))
        before = reasons
    return stretches


def histogram(itl_ms: Sequence[float]) -> dict[str, Any] | None:
    """Counts over BINS bins of equal width on a logarithmic axis; None for no values.

    Counted here, over all tokens, because the browser may hold fewer (`keep_extremes`).
    """
    if not itl_ms:
        return None
    low = max(LEAST_MS, min(itl_ms))
    high = max(low * 1.01, max(itl_ms))
    width = math.log(high / low) / BINS
    counts = [0] * BINS
    for value in itl_ms:
        position = math.log(value / low) / width if value > low else 0.0
        counts[min(BINS - 1, int(position))] += 1
    return {"low_ms": low, "high_ms": high, "counts": counts}
