"""What the charts of one cell draw, as the JSON object that assets/*.js read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qwencli.bench.attribution.causes import Finding
from qwencli.bench.report.html.packing import keep_extremes, pack_floats
from qwencli.bench.report.html.takes import GpuSamples, Take, number
from qwencli.bench.statistics.itl import percentile, run_limit_ms

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


def points_per_run(total: int, runs: int) -> int:
    """How many of a report's `total` points each of its runs may have."""
    return max(16, min(RUN_POINTS, total // max(1, runs)))


def cell_charts(
    takes: Sequence[Take], token_points: int, gpu_points: int, cause_marks: int = RUN_POINTS
) -> dict[str, Any]:
    """Everything drawn when a cell is opened; `takes` is not empty.

    Args:
        token_points, gpu_points, cause_marks: the most points of one run.
    """
    start = takes[0].start_s
    itl = [value for take in takes if not take.warmup for value in take.itl_ms if value == value]
    return {
        "histogram": histogram(itl),
        "percentiles": {f"p{p}": percentile(itl, p) for p in PERCENTILES if itl},
        "runs": [
            {
                **_run(take, start, token_points, gpu_points),
                "causes": _causes(take, cause_marks),
                "slow": [_cause(f, take.start_s) for f in take.findings if f.scope != "gap"],
            }
            for take in takes
        ],
    }


def _run(take: Take, cell_start_s: float, token_points: int, gpu_points: int) -> dict[str, Any]:
    start = take.start_s
    known = [value for value in take.itl_ms if value == value]
    kept = keep_extremes([take.itl_ms], token_points) if take.itl_ms else []
    return {
        "run": take.row["run"],
        "warmup": take.warmup,
        "start_s": round(start - cell_start_s, 6),
        "tokens": len(take.t_s),
        "index": None if len(kept) == len(take.t_s) else kept,
        "t_s": pack_floats([take.t_s[i] - start for i in kept]),
        "itl_ms": pack_floats([take.itl_ms[i] for i in kept]),
        "gpus": [_gpu(name, gpu, start, gpu_points) for name, gpu in sorted(take.gpus.items())],
        "throttle_reasons": take.row["throttle_reasons"],
        "stall_ms": run_limit_ms(known) if known else None,
        **{name: number(take.row[name]) for name in RUN_NUMBERS},
    }


def _causes(take: Take, most: int) -> list[list[Any]]:
    """The gaps that cost most, in the order of time."""
    gaps = [finding for finding in take.findings if finding.scope == "gap"]
    kept = sorted(gaps, key=lambda finding: -finding.lost_ms)[:most]
    kept.sort(key=lambda finding: finding.t_s)
    return [_cause(finding, take.start_s) for finding in kept]


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
