"""Where the time of captioning a folder goes: on the GPU by phase and kernel, on the host by phase.

    python benchmarks/batch_phases.py --out phases.json [--quantization fp8] [--model qwen3-vl-4b]
    python benchmarks/batch_phases.py --out prepare.json --prepare-only

The work is that of `captions_per_second`. A run of 1,000 pictures gives captions a second and, for
each phase of a step, the host's time (without what is inside another phase) and the GPU's time from
its first launch to its last. A shorter run under the profiler gives every kernel, put to the phase
in which the host launched it. `alone` are passes one at a time: `eager_ms` as the engine runs them
operator by operator (`host_ms` of it the launching), `graph_ms` the same as one CUDA graph.
`--prepare-only` needs no GPU: pictures a second that threads open, resize and tokenize; and
`contention`, what a small operation of the main thread costs beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.captions_per_second import config_of, request, seconds_of, write_pictures
from qwencli.config import Quantization
from qwencli.engine.cache.paged_kv import PAGE_SIZE, DecodePages, PackedPrompts, pages_for
from qwencli.engine.cache.prefix_cache import digests_of, keys_of, page_keys
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.model_files import open_model
from qwencli.engine.layers.decoder import DeepStack
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.runner import TokenCopy

KERNELS_SHOWN = 40
OPERATIONS = 400  # of a lap of `contention`: about those of a vision tower
GRID, PROMPT, CONTEXT = (1, 32, 32), 272, 300
# Of a step on the host: what holds it, its method, what the result calls it.
HOST_PHASES = (
    ("core", "_take_prepared", "take_prepared"),
    ("scheduler", "schedule", "schedule"),
    ("runner", "rearrange", "rearrange"),
    ("vision", "encode", "vision"),
    ("runner", "prefill", "prefill"),
    ("runner", "decode", "decode"),
    ("core", "_read", "answers"),
)
ON_DEVICE = ("vision", "prefill", "decode")


class Phases:
    """Time of the phases of one thread; a phase stands still while one inside it runs."""

    def __init__(self) -> None:
        self.host_s: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.rows: list[int] = []
        self.prompts: list[int] = []
        self._inside: list[str] = []
        self._since = time.perf_counter()
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        # When each phase became the one that runs, on the clock of the profiler.
        self.turns: list[tuple[int, str]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._inside.append(name)
        self.calls[name] += 1
        self.turns.append((time.time_ns(), name))
        first = self._mark(name)
        try:
            yield
        finally:
            if first is not None:
                self._marks[name].append((first, self._mark(name)))
            self._turn()
            self._inside.pop()
            self.turns.append((time.time_ns(), self._inside[-1] if self._inside else "other"))

    def _mark(self, name: str) -> Any:
        if name not in ON_DEVICE or not torch.cuda.is_available():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _turn(self) -> None:
        now = time.perf_counter()
        self.host_s[self._inside[-1] if self._inside else "other"] += now - self._since
        self._since = now

    def device_ms(self) -> dict[str, float]:
        """From a phase's first launch to its last, as the GPU ran them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spans = {
            name: sum(first.elapsed_time(last) for first, last in marks)
            for name, marks in self._marks.items()
        }
        if "prefill" in spans:  # which the vision tower is inside of
            spans["prefill"] -= spans.get("vision", 0.0)
        return spans

    @contextmanager
    def watching(self, core: Any) -> Iterator[None]:
        """While the block runs, the engine's phases are timed."""
        holders = {
            "core": core,
            "scheduler": core._scheduler,
            "runner": core._runner,
            "vision": core._runner.vision,
        }
        undo: list[Callable[[], None]] = []

        def wrap(holder: Any, method: str, name: str) -> None:
            own = getattr(holder, method, None)
            if own is None:
                return
            had = method in vars(holder)

            def timed(*args: Any, **more: Any) -> Any:
                if threading.current_thread() is not threading.main_thread():
                    return own(*args, **more)
                self._note(name, args)
                with self.phase(name):
                    return own(*args, **more)

            setattr(holder, method, timed)
            undo.append(lambda: setattr(holder, method, own) if had else delattr(holder, method))

        for holder, method, name in HOST_PHASES:
            wrap(holders[holder], method, name)
        wrap(core._inputs, "wait", "wait_for_prepared")
        read = TokenCopy.read

        def waited(copy: TokenCopy) -> list[int]:
            with self.phase("wait_for_gpu"):
                return read(copy)

        TokenCopy.read = waited  # type: ignore[method-assign]
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._turn()
            TokenCopy.read = read  # type: ignore[method-assign]
            for each in undo:
                each()

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "decode":
            self.rows.append(len(args[0]))
        elif name == "prefill":
            self.prompts.append(len(args[0]))


def captioning(engine: Any, paths: list[Path], count: int) -> dict[str, Any]:
    phases = Phases()
    with phases.watching(engine._requests()):
        seconds = seconds_of(engine, paths, count)
    device_ms = phases.device_ms()
    return {
        "captions": count,
        "captions_per_s": count / seconds,
        "seconds": seconds,
        "host_ms_a_caption": {
            name: 1e3 * s / count for name, s in sorted(phases.host_s.items(), key=lambda x: -x[1])
        },
        "device_span_ms_a_caption": {name: ms / count for name, ms in device_ms.items()},
        "steps": len(phases.rows),
        "rows_a_decode_step": _spread(phases.rows),
        "prompts_a_prefill": _spread(phases.prompts),
        "calls": dict(phases.calls),
    }


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def profiled(engine: Any, paths: list[Path], count: int) -> dict[str, Any]:
    """Every kernel of a run, by phase and by name."""
    from torch.profiler import ProfilerActivity, profile

    phases = Phases()
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        with phases.watching(engine._requests()):
            seconds = seconds_of(engine, paths, count)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    results: Any = profiler.profiler
    launched: dict[int, int] = {}
    work: list[tuple[int, int, str, int, int]] = []
    for event in results.kineto_results.events():
        name = event.name()
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            start, long_ns = event.start_ns(), event.duration_ns()
            stream = event.device_resource_id()
            work.append((start, long_ns, name, event.correlation_id(), stream))
        elif name.startswith("cu"):
            launched[event.correlation_id()] = event.start_ns()
    if not work:
        return {"captions": count, "note": "no kernels were recorded"}
    times = [at for at, _ in phases.turns]
    by_stream: Counter[int] = Counter()
    for _, long_ns, _, _, stream in work:
        by_stream[stream] += long_ns
    main_stream = by_stream.most_common(1)[0][0]
    by_phase: Counter[str] = Counter()
    kernels: dict[str, Counter[str]] = defaultdict(Counter)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    unmatched = 0
    for _, long_ns, name, correlation, stream in work:
        at = launched.get(correlation)
        if stream != main_stream:
            phase = "preparing_streams"
        elif at is None:
            phase, unmatched = "unmatched", unmatched + 1
        else:
            turn = bisect_right(times, at) - 1
            phase = phases.turns[turn][1] if turn >= 0 else "other"
        by_phase[phase] += long_ns
        kernels[phase][name] += long_ns
        counts[phase][name] += 1
    table = sorted(
        ((ns, phase, name) for phase, names in kernels.items() for name, ns in names.items()),
        reverse=True,
    )
    busy, wall = _union([(start, start + long_ns) for start, long_ns, *_ in work])
    total = sum(by_phase.values())
    return {
        "captions": count,
        "captions_per_s": count / seconds,
        "busy_percent": 100 * busy / wall,
        "kernels_a_caption": len(work) / count,
        "unmatched_launches": unmatched,
        "kernel_ms_a_caption": {name: ns / 1e6 / count for name, ns in by_phase.most_common()},
        "top": [
            {
                "phase": phase,
                "kernel": name[:160],
                "count": counts[phase][name],
                "total_us": ns / 1e3,
                "us_each": ns / 1e3 / counts[phase][name],
                "percent": 100 * ns / total,
            }
            for ns, phase, name in table[:KERNELS_SHOWN]
        ],
    }


def _union(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """Nanoseconds in which something ran, and from the first to the last."""
    busy = end = 0
    for start, stop in sorted(spans):
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - min(start for start, _ in spans)


def best_ms(found: dict[str, float]) -> float:
    return min(ms for name, ms in found.items() if name != "host_ms")


def timed(work: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """Milliseconds of the median pass operator by operator, and as one CUDA graph."""
    for _ in range(2):
        work()
    cuda = torch.cuda.is_available()
    spans, hosts = [], []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        hosts.append(time.perf_counter() - started)
        if cuda:
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - started)
    found = {
        "eager_ms": 1e3 * statistics.median(spans),
        "host_ms": 1e3 * statistics.median(hosts),
    }
    if cuda:
        found["graph_ms"] = _replayed(work, repeats)
    return found


def _replayed(work: Callable[[], object], repeats: int) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    graph.replay()
    marks[0].record()
    for _ in range(repeats):
        graph.replay()
    marks[1].record()
    marks[1].synchronize()
    return marks[0].elapsed_time(marks[1]) / repeats


@torch.inference_mode()
def vision_alone(model: QwenModel, pictures: int) -> dict[str, float]:
    assert model.vision is not None
    grids = [GRID] * pictures
    count = pictures * GRID[1] * GRID[2]
    patches = torch.randn(
        count, model.vision.shape.patch_elements, device=model.device, dtype=model.dtype
    )
    found = timed(lambda: model.encode_images(patches, grids))
    return found | {"ms_a_picture": best_ms(found) / pictures}


@torch.inference_mode()
def prefill_alone(model: QwenModel, cache: Any, prompts: int) -> dict[str, float]:
    """The layers and the heads of the last tokens, pictures encoded before."""
    device, total = model.device, prompts * PROMPT
    image = PROMPT - 16
    hidden = torch.randn(total, model.shape.text.hidden_size, device=device, dtype=model.dtype)
    places = torch.cat([torch.arange(image) + n * PROMPT + 8 for n in range(prompts)]).to(device)
    features = torch.randn(len(places), hidden.shape[1], device=device, dtype=model.dtype)
    starts = torch.arange(prompts + 1, dtype=torch.int32, device=device) * PROMPT
    packed = PackedPrompts(
        lengths=[PROMPT] * prompts,
        contexts=[0] * prompts,
        starts=starts,
        context_starts=starts,
        slots=None,
        flash=model.flash_decode,
    )
    positions = torch.arange(PROMPT, device=device).repeat(prompts).expand(3, -1)
    room = pages_for(PROMPT) * PAGE_SIZE
    slots = torch.cat([torch.arange(PROMPT) + PAGE_SIZE + n * room for n in range(prompts)])
    slots = slots.to(device)
    last = starts[1:].to(torch.int64) - 1
    layers = 0 if model.shape.vision is None else len(model.shape.vision.deepstack_layers)
    deepstack = DeepStack(places, [features] * layers)

    def work() -> None:
        out = model.prefill_packed(hidden.clone(), positions, slots, cache, packed, deepstack)
        model.prompt_logits(out.index_select(0, last))

    found = timed(work)
    return found | {"ms_a_prompt": best_ms(found) / prompts}


@torch.inference_mode()
def decode_alone(runner: Any, rows: int) -> dict[str, float]:
    """A step at a context of `CONTEXT` tokens, its logits, and the choice of its tokens alone."""
    model: QwenModel = runner.model
    device, count = model.device, min(runner._pages, pages_for(CONTEXT + 1))
    tables = (torch.arange(rows * count, dtype=torch.int32, device=device) + 1).view(rows, count)
    tokens = torch.ones(rows, dtype=torch.int64, device=device)
    places = torch.full_like(tokens, CONTEXT)
    pages = DecodePages(tables, places, CONTEXT + 1)
    ops = model.row_ops(rows)

    def step() -> torch.Tensor:
        return model.decoder.logits(model.decode_rows(tokens, places, runner.cache, pages), ops)

    found = timed(step)
    # Rows that nobody uses are over and stay as they are.
    logits = step().clone()
    chosen = timed(lambda: runner._choose(logits, SamplerKind.ARGMAX))
    best = best_ms(found)
    return found | {"tok_per_s": 1e3 * rows / best, "choose_ms": best_ms(chosen)}


def alone(engine: Any, note: Callable[[str, Any], None]) -> None:
    runner = engine._requests()._runner
    parts: list[tuple[str, Callable[..., dict[str, float]], tuple[Any, ...], tuple[int, ...]]] = [
        ("vision", vision_alone, (runner.model,), (1, 8, 16, 32)),
        ("prefill", prefill_alone, (runner.model, runner.cache), (1, 4, 16, 32)),
        ("decode", decode_alone, (runner,), (1, 8, 32, 128, 256)),
    ]
    for name, measure, args, sizes in parts:
        found = {}
        for size in sizes:
            if name == "decode" and size > runner.max_rows:
                continue
            try:
                found[size] = measure(*args, size)
            except RuntimeError as error:  # the rest is worth having without it
                found[size] = {"error": str(error)[:200]}
            note(name, dict(found))


def prepare_rate(paths: list[Path], model: str, threads: int, count: int) -> dict[str, Any]:
    """Pictures a second from file to prompt, by threads of one process."""
    files = open_model(config_of(Quantization.NONE, model))
    spent: Counter[str] = Counter()

    def prepare(number: int) -> None:
        started = time.thread_time()
        asked = request(paths[number % len(paths)])
        opened = time.thread_time()
        files.prompts.build(asked.messages)
        spent["open"] += int(1e9 * (opened - started))
        spent["build"] += int(1e9 * (time.thread_time() - opened))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(prepare, range(threads)))
        spent.clear()
        started = time.perf_counter()
        list(pool.map(prepare, range(count)))
        seconds = time.perf_counter() - started
    cpu_ms = {name: ns / 1e6 / count for name, ns in spent.items()}
    return {"threads": threads, "pictures_per_s": count / seconds, "cpu_ms_a_picture": cpu_ms}


def contention(paths: list[Path], model: str, threads: int, seconds: float) -> dict[str, Any]:
    """Small operations of the main thread, each of which takes the interpreter's lock back, beside
    threads that prepare pictures up to their digests and the keys of their pages."""
    files = open_model(config_of(Quantization.NONE, model))
    over = threading.Event()
    made = [0] * threads

    def prepare(thread: int) -> None:
        while not over.is_set():
            prompt = files.prompts.build(request(paths[made[thread] % len(paths)]).messages)
            page_keys(keys_of(prompt, digests_of(prompt)), PAGE_SIZE)
            made[thread] += 1

    values = torch.zeros(16)
    workers = [threading.Thread(target=prepare, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    laps = []
    started = time.perf_counter()
    while (lap := time.perf_counter()) - started < seconds:
        for _ in range(OPERATIONS):
            values.add_(1)
        laps.append((time.perf_counter() - lap) / OPERATIONS)
    taken = time.perf_counter() - started
    over.set()
    for worker in workers:
        worker.join()
    return {
        "threads": threads,
        "us_an_operation": {"median": 1e6 * statistics.median(laps), "best": 1e6 * min(laps)},
        "mean_us": 1e6 * statistics.fmean(laps),
        "pictures_per_s": sum(made) / taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--profiled", type=int, default=256)
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    about: dict[str, Any] = {
        "model": options.model,
        "quantization": options.quantization,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }

    def note(name: str, found: Any) -> None:
        """Written at once: what there is stays if the run is cut short."""
        about[name] = found
        Path(options.out).write_text(json.dumps(about, indent=1), encoding="utf-8")
        short = {key: value for key, value in found.items() if key != "top"}
        print(f"{name}: {json.dumps(short, default=str)}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder))
        counts = sorted({1, 2, min(8, os.cpu_count() or 1), os.cpu_count() or 1})
        rates = {n: prepare_rate(paths, options.model, n, 100 * min(n, 4)) for n in counts}
        note("prepare", rates)
        crowds = [0, *(n for n in counts if n <= 8)]
        note("contention", {n: contention(paths, options.model, n, 2.0) for n in crowds})
        if options.prepare_only:
            return
        config = replace(
            config_of(Quantization(options.quantization), options.model), device=options.device
        )
        with create_engine(config) as engine:
            note("first", captioning(engine, paths, 16))
            note("warming", captioning(engine, paths, min(300, options.pictures)))
            note("captions", captioning(engine, paths, options.pictures))
            note("profiled", profiled(engine, paths, options.profiled))
            for row in about["profiled"].get("top", ()):
                print(
                    f"{row['percent']:5.1f}% {row['total_us']:10.0f} us {row['count']:6d} x "
                    f"{row['us_each']:8.1f}  {row['phase']:9s} {row['kernel'][:90]}",
                    file=sys.stderr,
                )
            alone(engine, lambda name, found: note(f"alone_{name}", found))


if __name__ == "__main__":
    main()
