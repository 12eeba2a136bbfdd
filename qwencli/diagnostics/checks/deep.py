"""The deep check: a short run of the real engine, and what bounds it."""

from __future__ import annotations

import statistics

from qwencli.config import Quantization
from qwencli.diagnostics.advice import TYPICAL_CONTEXT, advise
from qwencli.diagnostics.decode_work import token_bytes
from qwencli.diagnostics.finding import Confidence, Finding, failed, passed, warned
from qwencli.diagnostics.machine import Machine, how_it_ended
from qwencli.engine.instruments.probes.answers import EngineRun
from qwencli.engine.instruments.probes.ask import Outcome
from qwencli.models.memory import kv_cache_bytes

UNSTABLE_RATIO = 1.1
# Of a step's time the GPU works less than this: the host is the brake.
LEAST_BUSY_SHARE = 0.7
# Of the measured bandwidth a step uses more than this: memory is the brake, as it should be.
BANDWIDTH_BOUND_SHARE = 0.6
# Of the expected speed; the expectation knows neither attention's own work nor other programs.
LEAST_EXPECTED_SHARE = 0.5


def engine_run(machine: Machine) -> Finding:
    """Only the real engine shows what all of this comes to."""
    answer = machine.probe("engine")
    if answer.outcome is not Outcome.OK:
        return failed("the engine cannot run", how_it_ended(answer), "act on its message")
    run: EngineRun = answer.value
    speed = statistics.median(run.tok_per_s)
    modes = (run.engine, run.quantization, run.attention, run.cache, run.kernels)
    runs = ", ".join(f"{tok:.1f}" for tok in run.tok_per_s)
    evidence = [
        f"{', '.join(modes)}: {speed:.1f} tok/s (runs {runs}), first token {run.ttft_ms:.0f} ms, "
        f"token p50 {run.itl_p50_ms:.2f} ms, p99 {run.itl_p99_ms:.2f} ms, load {run.load_s:.1f} s"
    ]
    if run.peak_allocated_bytes is not None:
        evidence.append(f"peak {run.peak_allocated_bytes / 1e9:.2f} GB")
    what, cause, host_bound = _bound(machine, run)
    evidence += cause
    ratio = max(run.tok_per_s) / max(min(run.tok_per_s), 1e-9)
    if ratio > UNSTABLE_RATIO:
        return warned(
            f"runs of one engine differ {ratio:.2f}x; {what}",
            "; ".join(evidence),
            "run `qwencli bench` and `qwencli diagnose explain` on its folder",
            Confidence.MEDIUM,
        )
    expected = advise(machine).expected_tok_per_s
    if expected and run.engine == "native" and speed < LEAST_EXPECTED_SHARE * expected:
        return warned(
            f"the engine reaches {speed / expected:.0%} of the expected speed; {what}",
            "; ".join(evidence),
            "look at launch-rate, bandwidth, clocks and gpu-processes above",
            Confidence.MEDIUM,
        )
    if host_bound:
        return warned(
            f"{speed:.1f} tok/s; {what}",
            "; ".join(evidence),
            "use --engine native --cache static-graph",
        )
    return passed(f"{speed:.1f} tok/s; {what}", "; ".join(evidence))


def _bound(machine: Machine, run: EngineRun) -> tuple[str, list[str], bool]:
    """What bounds a decode step, the figures that say so, and whether it is the host."""
    figures: list[str] = []
    measured, share = machine.measured("bandwidth"), None
    if measured and run.quantization == Quantization.NONE and machine.device.startswith("cuda"):
        shape = machine.shape
        size = token_bytes(shape) + kv_cache_bytes(shape, TYPICAL_CONTEXT)
        share = size / (run.itl_p50_ms / 1e3) / measured.read_bytes_per_s
        figures.append(f"memory is read at {share:.0%} of the measured bandwidth")
    if run.gpu_busy_ms is None or run.kernels_per_token is None:
        return "what bounds it is not known without a profiler", figures, False
    busy = run.gpu_busy_ms / run.itl_p50_ms
    figures.append(
        f"{run.kernels_per_token:.0f} kernels take {run.gpu_busy_ms:.2f} ms of a token's "
        f"{run.itl_p50_ms:.2f}{' (they overlap)' if busy > 1 else ''}"
        + (f"; attention by {', '.join(run.attention_kernels)}" if run.attention_kernels else "")
    )
    if busy < LEAST_BUSY_SHARE:
        return f"bound by the host: the GPU waits {1 - busy:.0%} of the time", figures, True
    if share is not None and share >= BANDWIDTH_BOUND_SHARE:
        return "bound by memory bandwidth, as it should be", figures, False
    return "bound by its kernels: the GPU is busy, but not with reading weights", figures, False
