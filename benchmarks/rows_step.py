"""A decode step of many rows beside that of a lone sequence, in one process, in turns.

    python benchmarks/rows_step.py --out rows_step.json [--mode none,fp8,8bit,4bit]
        [--rows 1,2,4,8,32,128,256] [--context 300] [--repeats 5] [--mixed] [--sweep-attention]
        [--check 1,2,4,8]

Steps are the engine's own, greedy, with random weights, each as one CUDA graph: `lone` is the step
of `stream`, the others are steps of the batch, whose rows have pages in no order. Every repeat runs
all of them one after the other, so that what changes on the machine meets all. `us` has the
microseconds of a step of every repeat; `tok_per_s` is rows over their median. `without_attention`
is a step whose attention is left out: what attention costs is the difference. `percent_of_limit` is
how much of the bandwidth, measured first, that of one row takes for what it must read.

`--mixed`: one row of eight is sixteen times as long as the others. `--sweep-attention`: instead,
other cuts of attention for each number of rows, in turns with the one that runs by default.

`--check`: instead, steps that check so many tokens of each row, 32 in all at most, beside plain
ones, with drafts from text. `all_right` and `all_wrong` say how much faster than plain steps they
are where every draft is right, and none.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measured_step import MeasuredStep, Tiles, pretend, text_shape
from qwencli.config import Quantization
from qwencli.engine.cache.paged_kv import pages_for
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.instruments.timing import LARGEST_BUFFER, read_bandwidth
from qwencli.engine.kernels.activation_buffers import ActivationConsumer
from qwencli.engine.kernels.fused_ops import MAX_BATCH_ROWS
from qwencli.engine.kernels.tiles import AttentionTiles
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.ops.decoder_ops import Layer, Step
from qwencli.engine.runner import ModelRunner
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.engine.spec_decode.policy import MOST_VERIFIED
from qwencli.models.memory import decode_bytes

CUDA = torch.device("cuda")
REPLAYS = 40
SLACK = 8
# Of `--sweep-attention`: parts that a row may have, slots of a part at least, and warps.
SPLITS, SHORTEST, WARPS = (4, 16, 32), (64, 128, 256, 512), (4, 8)
# Of `--mixed`: one row of so many is so many times as long.
EVERY, LONG = 8, 16


# How weights are stored, by mode.
SCHEMES = {"none": "none", "fp8": "fp8-e4m3", "8bit": "int8", "4bit": "int4-g128"}


class RowsStep:
    """The batch's step over the model of a lone one; every row has pages of its own."""

    def __init__(
        self, step: MeasuredStep, max_rows: int, short: int, most: int, drafting: bool = False
    ) -> None:
        """Every eighth row has room for `most` tokens, the others for `short`."""
        counts = [pages_for(short if row % EVERY else most) for row in range(max_rows)]
        self._most, self._own = most, step.own
        states = max_rows + 1
        self.runner = ModelRunner(
            step.model, 1 + sum(counts), max_rows, most, False, VisionCache(), states, drafting
        )
        self.runner.state.states.copy_(torch.arange(1, states))
        # As the engine does where memory allows.
        if step.model.dense_copies_bytes:
            step.model.keep_dense_copies()
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1
        for table, own in zip(self.runner.state.tables, order.split(counts), strict=True):
            table[: len(own)] = own.to(torch.int32)
        self.runner.state.limit.fill_(1 << 30)

    def begin(self, context: int, mixed: bool) -> None:
        state = self.runner.state
        for counter in (state.slot, state.position):
            counter.fill_(context)
            if mixed:
                counter[::EVERY] = LONG * context
        state.token.fill_(7)
        state.step.zero_()
        state.done.zero_()
        state.sampler.penalty.fill_(1.0)
        if state.drafts is not None:
            state.drafts.last_slot.fill_(1 << 30)
            state.drafts.ids.zero_()
            state.drafts.input_ids.fill_(7)

    def check(self, rows: int, size: int) -> None:
        """One step that checks `size` tokens of each row."""
        self.runner._advance(SamplerKind.ARGMAX, rows, self._most, size)

    def run(self, kind: SamplerKind, rows: int, tiles: AttentionTiles | None = None) -> None:
        """One step; attention is cut up as `tiles` say, or as by default."""
        default = self._own.row_tiles_of
        if tiles is not None:
            self._own.row_tiles_of = lambda rows: tiles
        self.runner._advance(kind, rows, self._most)
        self._own.row_tiles_of = default

    def tiles(self, rows: int) -> AttentionTiles:
        return self._own.row_tiles_of(rows)

    def run_without_attention(self, kind: SamplerKind, rows: int) -> None:
        """Whoever reads what attention makes finds what was there before."""
        model = self.runner.model
        few, many = model._few_rows_ops, model._many_rows_ops
        size = model.shape.text.q_size

        def nothing(qkv: torch.Tensor, layer: Layer, step: Step) -> torch.Tensor:
            if len(qkv) > MAX_BATCH_ROWS:
                return qkv[:, :size].contiguous()
            attended = self._own._attended[: len(qkv)]
            return pretend(self._own, attended, ActivationConsumer(None, layer.o))

        model._few_rows_ops = replace(few, attend=nothing)
        model._many_rows_ops = replace(many, attend=nothing)
        self.runner._advance(kind, rows, self._most)
        model._few_rows_ops, model._many_rows_ops = few, many


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


def checked(name: str, us: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """What a step that checks drafts gives beside plain ones of the same turns."""
    rows, _, size = name.split()
    share = statistics.median(own / one for own, one in zip(us, plain, strict=True))
    return {
        **figures(int(rows), us),
        "size": int(size),
        "plain_ms": round(statistics.median(plain) / 1e3, 4),
        "all_right": round(int(size) / share, 3),
        "all_wrong": round(1 / share, 3),
    }


def cuts(block: int) -> list[AttentionTiles]:
    return [
        AttentionTiles(block, splits, warps, shortest)
        for splits, shortest, warps in itertools.product(SPLITS, SHORTEST, WARPS)
    ]


def measure(model: str, mode: str, rows: Sequence[int], options: argparse.Namespace) -> Any:
    """All steps of one kind of weights."""
    context, kind, mixed = options.context, SamplerKind(options.kind), options.mixed
    slots = context + (2 * REPLAYS + SLACK) * (MAX_VERIFY_TOKENS if options.check else 1)
    most = slots + (LONG - 1) * context if mixed else slots
    lone = MeasuredStep(text_shape(model), Quantization(mode), most, Tiles())
    batch = RowsStep(lone, max(rows), slots, most, drafting=bool(options.check))
    steps = Steps()

    def begin() -> None:
        batch.begin(context, mixed)

    result: dict[str, Any] = {"mode": mode, "context": context, "kind": kind.value, "mixed": mixed}
    if options.sweep_attention:
        for count in rows:
            default = batch.tiles(count)
            for tiles in (default, *cuts(default.block)):
                name = f"{count} splits {tiles.splits} shortest {tiles.shortest}"
                name += f" warps {tiles.num_warps}{' default' if tiles is default else ''}"
                steps.add(name, begin, functools.partial(batch.run, kind, count, tiles))
        steps.measure(options.repeats)
        for count in rows:
            of_rows = {name: us for name, us in steps.us.items() if int(name.split()[0]) == count}
            best = sorted(of_rows, key=lambda name: statistics.median(of_rows[name]))
            result[str(count)] = {name: figures(count, of_rows[name]) for name in best}
        return result

    if options.check:
        sizes = [int(size) for size in options.check.split(",")]
        for count in rows:
            steps.add(f"{count} plain", begin, functools.partial(batch.run, kind, count))
            for size in (each for each in sizes if each * count <= MOST_VERIFIED):
                own = functools.partial(batch.check, count, size)
                steps.add(f"{count} check {size}", begin, own)
        steps.measure(options.repeats)
        result["checks"] = [
            checked(name, us, steps.us[f"{name.split()[0]} plain"])
            for name, us in steps.us.items()
            if "check" in name
        ]
        return result

    # Some models run in rows alone.
    if lone.model.shape.text.delta is None:
        steps.add("lone", lambda: lone.begin(context), lambda: lone.run(1))
    for count in rows:
        steps.add(str(count), begin, functools.partial(batch.run, kind, count))
        left_out = functools.partial(batch.run_without_attention, kind, count)
        steps.add(f"{count} without_attention", begin, left_out)
    steps.measure(options.repeats)
    result["steps"] = {
        name: figures(int(name.split()[0]) if name != "lone" else 1, us)
        for name, us in steps.us.items()
    }
    if {"1", "lone"} <= steps.us.keys():
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
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--sweep-attention", action="store_true")
    parser.add_argument("--check", default="", help="tokens of each row, by size of step")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    rows = [int(count) for count in options.rows.split(",")]
    bandwidth = read_bandwidth("cuda", LARGEST_BUFFER)
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_bandwidth_bytes_per_s": bandwidth,
    }
    results: list[dict[str, Any]] = []
    for mode in options.mode.split(","):
        started = time.perf_counter()
        with torch.inference_mode():
            result = measure(options.model, mode, rows, options)
        read = decode_bytes(text_shape(options.model), SCHEMES[mode], 2, options.context)
        one = result.get("steps", {}).get("1")
        if read is not None and one is not None:
            result["read_bytes"] = read
            result["percent_of_limit"] = 100 * read / (one["step_ms"] / 1e3) / bandwidth
        result["seconds"] = round(time.perf_counter() - started, 1)
        results.append(result)
        print(json.dumps(result), file=sys.stderr)
        text = json.dumps(about | {"model": options.model, "modes": results}, indent=1)
        Path(options.out).write_text(text, encoding="utf-8")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
