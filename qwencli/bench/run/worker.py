"""One process of a campaign: loads one cell's engine and measures its runs.

It has no generation path of its own: it times the `Engine.stream` that `caption` uses.

    stdin     one JSON line, the WorkerSpec; then held open. It closing means that the campaign
              is gone, and the worker ends at once.
    stdout    JSON lines: {"type": "run", ...} after each run; then {"type": "sampler", ...} and
              {"type": "probes", ...} around the runs that show what probes cost, and
              {"type": "rows", ...} for what else is measured beside; {"type": "trace", ...} with
              what was traced, where it was asked for; {"type": "end", ...}, with "of_model" where
              no other mode would have fared better
    stderr    the log; whatever libraries print to stdout goes there as well
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from qwencli.bench.measure import probe_overhead
from qwencli.bench.measure.host_probe import HostProbe, TokenProbe
from qwencli.bench.plan.campaign_plan import WorkerSpec, load_spec
from qwencli.bench.run.post_run_checks import PostRunChecks, post_run_checks
from qwencli.bench.statistics.slow_tokens import run_latency
from qwencli.bench.storage.columns import RUNS
from qwencli.config import EngineConfig, EngineName, LoadMode, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.engine.instruments.kernel_trace import trace_kernels
from qwencli.engine.machine.child_process import end_with_parent
from qwencli.engine.machine.device import memory_stats, reset_peak_memory
from qwencli.engine.protocol import Engine
from qwencli.engine.resolve import resolve_device
from qwencli.errors import (
    MissingDependencyError,
    ModelFileError,
    OutOfMemoryError,
    QwenCliError,
    UnsupportedModeError,
)
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.results import GenerationResult, Speculation
from qwencli.tracing import active, tracing

MakeEngine = Callable[[EngineConfig], Engine]
Emit = Callable[[dict[str, Any]], None]
# Of a trace, in one message.
EVENTS_TOLD = 2000
# Called with the number of each run before it is measured; whether it loaded the model anew.
Prepare = Callable[[int], bool]

# What an expected error means for the cell; the first class that fits. Others: "failed".
_STATUS: tuple[tuple[type[QwenCliError], str], ...] = (
    (UnsupportedModeError, "skipped"),
    (MissingDependencyError, "skipped"),
    (OutOfMemoryError, "oom"),
)


def run_cell(
    spec: WorkerSpec,
    emit: Emit,
    make_engine: MakeEngine = create_engine,
    checks: PostRunChecks = post_run_checks,
    prepare: Prepare = lambda run: False,
) -> None:
    """Measure one cell; expected errors become its end, unexpected ones are raised."""
    with tracing() if spec.profile else nullcontext() as trace:
        end = _end_of(_measure_all(spec, make_engine, checks, prepare), emit)
    events = trace.events if trace is not None else []
    for start in range(0, len(events), EVENTS_TOLD):
        emit({"type": "trace", "events": events[start : start + EVENTS_TOLD]})
    emit(end)


def _end_of(messages: Iterator[dict[str, Any]], emit: Emit) -> dict[str, Any]:
    try:
        for message in messages:
            emit(message)
    except QwenCliError as error:
        status = next((name for kind, name in _STATUS if isinstance(error, kind)), "failed")
        reason = f"{error.message} ({error.hint})" if error.hint else error.message
        of_model = isinstance(error, ModelFileError)
        return {"type": "end", "status": status, "reason": reason, "of_model": of_model}
    except MemoryError:
        return {"type": "end", "status": "oom", "reason": "the host ran out of memory"}
    return {"type": "end", "status": "ok", "reason": None}


def _measure_all(
    spec: WorkerSpec, make_engine: MakeEngine, checks: PostRunChecks, prepare: Prepare
) -> Iterator[dict[str, Any]]:
    request = build_request(spec)
    engine = make_engine(spec.config)
    here = active() is not None and spec.config.engine is not EngineName.REMOTE
    kernels = trace_kernels(resolve_device(spec.config.device)) if here else None
    try:
        engine.load()
        if spec.purpose == "reference":
            yield from checks(engine, spec, request, {})
            return
        probe = TokenProbe(_device_here(engine))
        # Run 0 pays for lazy start-up, is recorded, and counts in no statistic.
        message = measure_run(engine, request, 0, probe, fresh=True)
        if kernels is not None:
            kernels.close()  # what it costs would be in the runs that count
        runs_left = spec.purpose == "runs"
        if runs_left:
            yield message
        progress = spec.progress.plus(message["row"])
        while runs_left and spec.turn.reached(progress, progress.process_runs[-1]) is None:
            run = progress.runs + 1
            reload = spec.load_mode is LoadMode.RELOAD or run in spec.reload_before
            if reload:
                engine.close()
                engine.load()
            fresh = prepare(run) or reload
            message = measure_run(engine, request, run, probe, fresh=fresh)
            yield message
            progress = progress.plus(message["row"])
        remote = spec.config.engine is EngineName.REMOTE
        if spec.roofline and not remote and spec.max_new_tokens > 3 * probe_overhead.STRETCH:
            yield from _probe_messages(engine, request, probe)
        yield from checks(engine, spec, request, message["row"])
    finally:
        engine.close()


def _probe_messages(
    engine: Engine, request: GenerationRequest, probe: TokenProbe
) -> Iterator[dict[str, Any]]:
    """Ask for the sampler on and off in turns; after each run, its rows of probes.csv."""
    end = time.perf_counter() + probe_overhead.BUDGET_S
    for run in range(1, probe_overhead.RUNS + 1):
        sampler = "on" if run % 2 else "off"
        yield {"type": "sampler", "on": sampler == "on"}
        with probe, HostProbe():
            result = probe_overhead.drain_in_turns(probe, engine.stream(request), run)
        found = probe_overhead.pairs(result.itl_ms, run)
        rows = [{"sampler": sampler, **asdict(pair)} for pair in found]
        yield {"type": "probes", "rows": rows}
        if time.perf_counter() > end:
            break
    yield {"type": "sampler", "on": True}


def build_request(spec: WorkerSpec) -> GenerationRequest:
    """Greedy, exactly `max_new_tokens` long, and with vision and prefill done anew.

    Every run of every cell does equal work: an engine that recognises the request of the run
    before would answer from its cache, and TTFT would measure that.
    """
    images: tuple[ImagePart, ...] = ()
    if spec.images:
        from qwencli.engine.frontend.images import open_image

        images = tuple(open_image(path) for path in spec.images)
    return GenerationRequest(
        messages=(user_message(spec.prompt, images),),
        sampling=SamplingOptions(do_sample=False, max_new_tokens=spec.max_new_tokens),
        ignore_eos=True,
        bypass_caches=True,
    )


def measure_run(
    engine: Engine, request: GenerationRequest, run: int, probe: TokenProbe, *, fresh: bool
) -> dict[str, Any]:
    """One run as a message: its row, its tokens, what the host did, and its span on the clock (s).

    `load_s` stands only in the run that a load came before (`fresh`).
    """
    device = _device_here(engine)
    reset_peak_memory(device)
    start_s = time.perf_counter()
    # The probe outside: what it measures of the host when the run has ended is no part of it.
    with probe, HostProbe() as host:
        result = probe.drain(engine.stream(request))
    end_s = time.perf_counter()
    trace = active()
    if trace is not None:
        trace.add_answer(f"run {run}", result)
    memory = memory_stats(device)
    row = {
        "run": run,
        "status": "ok" if run else "warmup",
        **_result_columns(result),
        "load_s": engine.load_s if fresh else None,
        **run_latency(result.itl_ms),
        **(asdict(memory) if memory else {}),
        **host.row(),
        **probe.cpu_calibration(),
    }
    return {
        "type": "run",
        "start_s": start_s,
        "end_s": end_s,
        "row": row,
        "tokens": _tokens(result),
        "host": probe.rows(host.collections),
    }


def _device_here(engine: Engine) -> str:
    """What can be watched of an engine from here; a server's own device cannot."""
    ran = engine.effective
    return "cpu" if ran.engine == EngineName.REMOTE else ran.device


def _result_columns(result: GenerationResult) -> dict[str, Any]:
    return {
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_image_tokens": result.num_image_tokens,
        "num_new_tokens": result.num_new_tokens,
        **{name: value for name, value in asdict(result.timings).items() if name in RUNS},
        "ran_attention": result.effective.attention,
        "ran_quantization": result.effective.quantization,
        "ran_cache": result.effective.cache,
        "ran_kernels": result.effective.kernels,
        "ran_kv_dtype": result.effective.kv_dtype,
        "ran_speculate": result.effective.speculate,
        "ran_threads": result.effective.threads,
        **_speculation_columns(result.speculation),
        "text_sha256": result.text_sha256,
    }


def _speculation_columns(speculation: Speculation | None) -> dict[str, Any]:
    if speculation is None:
        return {}
    return {
        "num_drafted": speculation.num_drafted,
        "num_accepted": speculation.num_accepted,
        "accept_percent": speculation.accept_percent,
        "speculation_gain": speculation.net_gain,
    }


def _tokens(result: GenerationResult) -> list[dict[str, Any]]:
    itl = (None, *result.itl_ms)
    gpu = result.token_gpu_ms or (None,) * len(result.token_t_s)
    ids = result.token_ids or (None,) * len(result.token_t_s)
    columns = zip(ids, result.token_t_s, itl, gpu, strict=True)
    return [
        {"token_index": index, "token_id": token, "t_s": t_s, "itl_ms": itl_ms, "gpu_ms": gpu_ms}
        for index, (token, t_s, itl_ms, gpu_ms) in enumerate(columns)
    ]


def main(
    make_engine: MakeEngine = create_engine,
    checks: PostRunChecks = post_run_checks,
    prepare: Prepare = lambda run: False,
) -> int:
    """Run as a process, speaking the protocol above."""
    # Rows get a descriptor of their own; from here on everything else that prints goes to the log.
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # A library that crashes leaves no other word of where.
    faulthandler.enable()
    spec = load_spec(_read_line(0))
    threading.Thread(target=end_with_parent, daemon=True).start()

    def emit(message: dict[str, Any]) -> None:
        rows.write(json.dumps(message) + "\n")
        rows.flush()

    run_cell(spec, emit, make_engine, checks, prepare)
    return 0


def _read_line(descriptor: int) -> str:
    # Unbuffered: a thread that waits in sys.stdin at the end would hold up the interpreter.
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            break
        line += piece
    return line.decode()


if __name__ == "__main__":
    sys.exit(main())
