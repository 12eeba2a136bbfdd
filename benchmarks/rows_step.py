"""A decode step of many rows beside that of a lone sequence, in one process, in turns.

    python benchmarks/rows_step.py --out rows_step.json [--mode none,fp8,8bit,4bit]
        [--rows 1,2,4,8,32,128,256] [--context 300] [--repeats 5]

Steps are the engine's own, greedy, with random weights, each as one CUDA graph: `lone` is the step
of `stream`, the others are steps of the batch, whose rows have pages in no order. Every repeat runs
all of them one after the other, so that what changes on the machine meets all. `us` has the
microseconds of a step of every repeat; `tok_per_s` is rows over their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measured_step import MeasuredStep, Tiles, text_shape
from qwencli.config import Quantization
from qwencli.engine.cache.paged_kv import pages_for
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.runner import ModelRunner

CUDA = torch.device("cuda")
REPLAYS = 40
SLACK = 8


class RowsStep:
    """The batch's step over the model of a lone one; every row has pages of its own."""

    def __init__(self, step: MeasuredStep, max_rows: int, max_seq_len: int) -> None:
        pages = pages_for(max_seq_len)
        self._max_seq_len = max_seq_len
        self.runner = ModelRunner(
            step.model, 1 + max_rows * pages, max_rows, max_seq_len, True, VisionCache()
        )
        order = torch.randperm(max_rows * pages, generator=torch.Generator().manual_seed(0)) + 1
        self.runner.state.tables.copy_(order.view(max_rows, pages).to(torch.int32))
        self.runner.state.limit.fill_(1 << 30)

    def begin(self, context: int) -> None:
        state = self.runner.state
        for counter in (state.slot, state.position):
            counter.fill_(context)
        state.token.fill_(7)
        state.step.zero_()
        state.done.zero_()
        state.sampler.penalty.fill_(1.0)

    def run(self, kind: SamplerKind, rows: int) -> None:
        self.runner._advance(kind, rows, self._max_seq_len)


class Steps:
    """Steps by name, captured, and their times."""

    def __init__(self) -> None:
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, Callable[[], None]]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self.us: dict[str, list[float]] = {}

    def add(self, name: str, begin: Callable[[], None], run: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            begin()
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        self._graphs[name] = graph, begin
        self.us[name] = []

    def measure(self, repeats: int) -> None:
        """One value of each step for each repeat; the first turn of all is not counted."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for repeat in range(repeats + 1):
            for name, (graph, begin) in self._graphs.items():
                begin()
                graph.replay()
                start.record()
                for _ in range(REPLAYS):
                    graph.replay()
                end.record()
                end.synchronize()
                if repeat:
                    self.us[name].append(start.elapsed_time(end) * 1e3 / REPLAYS)


def figures(rows: int, us: Sequence[float]) -> dict[str, Any]:
    middle = statistics.median(us)
    return {
        "rows": rows,
        "tok_per_s": round(rows * 1e6 / middle, 1),
        "step_ms": round(middle / 1e3, 4),
        "max_over_min": round(max(us) / min(us), 4),
        "us": [round(value, 2) for value in us],
    }


def measure(model: str, mode: str, rows: Sequence[int], options: argparse.Namespace) -> Any:
    """All steps of one kind of weights."""
    context, kind = options.context, SamplerKind(options.kind)
    slots = context + 2 * REPLAYS + SLACK
    lone = MeasuredStep(text_shape(model), Quantization(mode), slots, Tiles())
    batch = RowsStep(lone, max(rows), slots)
    steps = Steps()
    steps.add("lone", lambda: lone.begin(context), lambda: lone.run(1))
    for count in rows:
        steps.add(
            str(count), lambda: batch.begin(context), lambda count=count: batch.run(kind, count)
        )
    steps.measure(options.repeats)
    found = {name: figures(int(name) if name.isdigit() else 1, us) for name, us in steps.us.items()}
    result: dict[str, Any] = {"mode": mode, "context": context, "kind": kind.value, "steps": found}
    if "1" in found:
        ratios = [own / one for own, one in zip(steps.us["lone"], steps.us["1"], strict=True)]
        result["one_row_over_lone"] = round(statistics.median(ratios), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--mode", default="none,fp8,8bit,4bit")
    parser.add_argument("--rows", default="1,2,4,8,32,128,256")
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--kind", default=SamplerKind.ARGMAX.value, help="of sampling, by rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    rows = [int(count) for count in options.rows.split(",")]
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results: list[dict[str, Any]] = []
    for mode in options.mode.split(","):
        started = time.perf_counter()
        with torch.inference_mode():
            result = measure(options.model, mode, rows, options)
        result["seconds"] = round(time.perf_counter() - started, 1)
        results.append(result)
        print(json.dumps(result), file=sys.stderr)
        text = json.dumps(about | {"model": options.model, "modes": results}, indent=1)
        Path(options.out).write_text(text, encoding="utf-8")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
