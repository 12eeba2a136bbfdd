"""Where the time of a decode step goes, kernel by kernel, and which tiles serve each matrix best.

    python benchmarks/decode_step.py --model qwen3-vl-4b --quantization none,8bit,fp8,4bit \
        --out decode_step.json [--search]

The step is the engine's own, greedy, with random weights, as one CUDA graph. What a kernel costs
is what the step takes less without it: kernels overlap, so the parts need not add up to the whole.
`--search` compiles the candidates for every matrix in parallel and times each inside the whole
step, the others being the best so far.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from qwencli.config import KVDType, Quantization
from qwencli.engine.kernels.fused_ops import FusedOps, TileChoice, fused_ops
from qwencli.engine.kernels.tiles import GemvTiles, MatrixKind, Storage, default_tiles
from qwencli.engine.kernels.vectors import Reader
from qwencli.engine.limits import LARGEST_BUFFER, read_bandwidth
from qwencli.engine.native import weights
from qwencli.engine.native.attention import AttentionPlan
from qwencli.engine.native.decoder_ops import Choice, DecoderOps, Layer, Matrix
from qwencli.engine.native.decoding import DecodeState
from qwencli.engine.native.kv_quantized import KV_SCHEMES
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.sampler import SamplerKind
from qwencli.models.memory import native_kv_bytes
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape

CUDA = torch.device("cuda")
REPLAYS, ROUNDS = 40, 5
SEARCH_REPLAYS, SEARCH_ROUNDS = 20, 4
SLACK = 64
# A thread's share of a program's weights: fewer leave the memory idle, more spill.
FEWEST_REGISTERS, MOST_REGISTERS = 4, 96
# Rows of a program that is left out.
SHARE_ROWS = 8
# Lanes that share a row's words, and rows from which a matrix has programs enough of a row each.
FEWEST_LANES, FEW_ROWS = 8, 4096
# Tiles that this GPU's registers or shared memory cannot hold are left out of a search.
UNFIT = (OutOfResources, PTXASError)
IN_WORDS = (Storage.INT8, Storage.FP8, Storage.INT4)
BITS = {Storage.FLOAT: 16, Storage.BYTES: 8, Storage.INT8: 8, Storage.FP8: 8, Storage.INT4: 4}


class Tiles:
    """The tiles a step uses: chosen ones, else the default. Remembers what it was asked."""

    def __init__(self) -> None:
        self.chosen: dict[MatrixKind, GemvTiles] = {}
        self.asked: dict[MatrixKind, None] = {}

    def __call__(self, matrix: MatrixKind) -> GemvTiles:
        self.asked[matrix] = None
        return self.chosen.get(matrix, default_tiles(matrix))


def text_shape(model: str) -> ModelShape:
    config = resolve_model(model).hub_config
    assert config is not None, "built-in models carry their shape"
    return replace(read_shape(config), vision=None)


class MeasuredStep:
    """A model of random weights, and the time of its decode step."""

    def __init__(
        self,
        shape: ModelShape,
        quantization: Quantization,
        slots: int,
        tiles_of: TileChoice,
        kv_dtype: KVDType = KVDType.AUTO,
    ) -> None:
        loaded = weights.dummy(shape, torch.bfloat16, CUDA, quantization)
        fused = functools.partial(fused_ops, own_attention=True, tiles_of=tiles_of)
        self.model = QwenModel(shape, loaded, slots, fused=fused, kv=KV_SCHEMES[kv_dtype])
        self.state = DecodeState(self.model, self.model.static_cache(), slots)
        self.kernels: DecoderOps = self.model.step_ops
        self.own: FusedOps = self.kernels.norm_qkv.__self__  # type: ignore[attr-defined]

    def us(self, context: int, replays: int = REPLAYS, rounds: int = ROUNDS) -> list[float]:
        """Microseconds of a step at `context` tokens, one value a round."""
        graph = self._capture(context)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(rounds):
            self._begin(context)
            graph.replay()
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / replays)
        return times

    def without(self, name: str) -> None:
        """Leave one group of kernels out; "" = none."""
        own = self.own

        def residual(x: torch.Tensor, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
            after = (
                Reader(layer.mlp_norm, layer.gate_up)
                if name == "o_residual"
                else Reader(layer.next_norm, layer.next_matrix)
            )
            return _pretend(own, hidden, after)

        stand_ins: dict[str, Callable[..., Any]] = {
            "norm_qkv": lambda hidden, layer: own._qkv[:1],
            "attend": lambda qkv, layer, step: _pretend(
                own, own._attended[:1], Reader(None, layer.o)
            ),
            "o_residual": residual,
            "norm_gate_up": lambda hidden, layer: _pretend(
                own, own._activated[:1], Reader(None, layer.down)
            ),
            "down_residual": residual,
            "choose": _choose_nothing,
        }
        changed = {name: stand_ins[name]} if name else {}
        self.model.step_ops = replace(self.kernels, **changed)  # type: ignore[arg-type]

    def _begin(self, context: int) -> None:
        self.state.slot.fill_(context)
        self.state.position.fill_(context)
        self.state.token.fill_(7)
        self.state.done.zero_()

    def _capture(self, context: int) -> torch.cuda.CUDAGraph:
        plan = AttentionPlan(len(self.state.slots), None)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self._begin(context)
            self.state.advance(SamplerKind.GREEDY, plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.state.advance(SamplerKind.GREEDY, plan)
        return graph


def _pretend(own: FusedOps, x: torch.Tensor, reader: Reader) -> torch.Tensor:
    """`x` as if a kernel had handed it over: whoever reads it finds what was there before."""
    own._vectors.handed(x, own._vectors.offer(reader, SHARE_ROWS, x.shape[1] // SHARE_ROWS))
    return x


def _choose_nothing(hidden: torch.Tensor, norm: object, head: Matrix, choice: Choice) -> None:
    """The step still moves on, so that attention reads what it would read."""
    for count in (choice.slot, choice.position):
        count.add_(1)


def bytes_of(matrix: Matrix) -> int:
    return matrix.nbytes


def roofline(step: MeasuredStep, context: int, bandwidth: float) -> dict[str, Any]:
    """Bytes, time and share of the read bandwidth of each group of kernels, and of the step."""
    decoder = step.model.decoder
    layer: Layer = decoder.layers[0]
    layers = len(decoder.layers)
    kv = native_kv_bytes(step.model.shape, step.model.kv is not None, 2) * context
    read = {
        "norm_qkv": layers * bytes_of(layer.qkv),
        "attend": kv,
        "o_residual": layers * bytes_of(layer.o),
        "norm_gate_up": layers * bytes_of(layer.gate_up),
        "down_residual": layers * bytes_of(layer.down),
        "choose": bytes_of(decoder.head),
    }
    whole = step.us(context)
    step_us = statistics.median(whole)
    parts = {}
    for name, size in read.items():
        step.without(name)
        us = step_us - statistics.median(step.us(context))
        parts[name] = {
            "launches": 2 if name == "choose" else layers,
            "bytes": size,
            "us": us,
            "percent_of_bandwidth": 100 * size / (us * 1e-6) / bandwidth,
        }
    step.without("")
    total = sum(read.values())
    return {
        "context": context,
        "step_us": whole,
        "bytes": total,
        "tok_per_s": 1e6 / step_us,
        "percent_of_limit": 100 * total / (step_us * 1e-6) / bandwidth,
        "parts": parts,
    }


def candidates(matrix: MatrixKind) -> Iterator[GemvTiles]:
    """Tiles of which each thread reads 16 bytes of a row at a time, or 32."""
    bits = BITS[matrix.storage]
    row_bytes = matrix.columns * bits // 8
    streams = 2 if matrix.gated else 1
    in_words = matrix.storage in IN_WORDS
    # A program that hands its rows over makes whole blocks of them.
    rows_of_one = (8, 16, 4) if matrix.storage is not Storage.INT4 else (8, 16)
    if in_words and matrix.rows > FEW_ROWS:
        rows_of_one = (*rows_of_one, 2, 1)
    for rows, warps, wide in itertools.product(
        rows_of_one if in_words else (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2)
    ):
        block = int(warps * 32 * 16 * wide)
        if in_words:
            block //= rows  # of each row: a thread's words are of one row
        if block < 16 * FEWEST_LANES:
            continue
        held = streams * rows * -(-row_bytes // block) * block / (warps * 32 * 4)
        if (
            not FEWEST_REGISTERS <= held <= MOST_REGISTERS
            or block > 2 * row_bytes
            or matrix.rows // rows < 64
        ):
            continue
        yield GemvTiles(block * 8 // bits, rows, warps)


def compile_all(model: str, quantization: Quantization, tiles: list[GemvTiles]) -> float:
    """Compile every matrix kind's kernel for its candidates among `tiles`; runs in a process."""
    started = time.perf_counter()
    shape = text_shape(model)
    shape = replace(shape, text=replace(shape.text, num_layers=1))
    chosen = Tiles()
    with torch.inference_mode():
        step = MeasuredStep(shape, quantization, 512, chosen)
        step.us(256, 1, 1)
        for tile in tiles:
            kinds = [kind for kind in chosen.asked if tile in set(candidates(kind))]
            chosen.chosen = dict.fromkeys(kinds, tile)
            try:
                step.us(256, 1, 1)
            except UNFIT as error:
                print(f"{tile}: {error}", file=sys.stderr)
    return time.perf_counter() - started


def search(
    step: MeasuredStep, tiles: Tiles, context: int, model: str, quantization: Quantization
) -> list[dict[str, Any]]:
    """Find each matrix's tiles; leaves the best in `tiles`. Returns all that was tried."""
    step.us(context, 1, 1)
    kinds = list(tiles.asked)
    wanted = sorted({tile for kind in kinds for tile in candidates(kind)}, key=str)
    workers = min(12, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        shares = [wanted[i::workers] for i in range(workers)]
        took = list(pool.map(functools.partial(compile_all, model, quantization), shares))
    print(f"{quantization}: {len(wanted)} tiles compiled in {max(took):.0f} s", file=sys.stderr)
    tried = []
    for kind in kinds:
        found = []
        for tile in dict.fromkeys([default_tiles(kind), *candidates(kind)]):
            tiles.chosen[kind] = tile
            try:
                us = statistics.median(step.us(context, SEARCH_REPLAYS, SEARCH_ROUNDS))
            except UNFIT as error:
                print(f"{kind} {tile}: {error}", file=sys.stderr)
                continue
            found.append((us, tile))
        us, best = min(found, key=lambda pair: pair[0])
        tiles.chosen[kind] = best
        tried.append(
            {
                "matrix": asdict(kind),
                "default_us": found[0][0],
                "best_us": us,
                "best": asdict(best),
                "tried": sorted([(round(us, 1), str(tile)) for us, tile in found])[:8],
            }
        )
        print(json.dumps(tried[-1]), file=sys.stderr)
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--quantization", default="none,8bit,fp8,4bit")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--context", default="512")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    contexts = [int(context) for context in options.context.split(",")]
    bandwidth = read_bandwidth("cuda", LARGEST_BUFFER)
    rows = []
    axes = (options.model, options.quantization, options.kv_dtype)
    for name, mode, kv in itertools.product(*(axis.split(",") for axis in axes)):
        tiles, quantization = Tiles(), Quantization(mode)
        with torch.inference_mode():
            slots = max(contexts) + 2 * REPLAYS + SLACK
            step = MeasuredStep(text_shape(name), quantization, slots, tiles, KVDType(kv))
            row: dict[str, Any] = {"model": name, "quantization": mode, "kv_dtype": kv}
            row["default"] = [roofline(step, context, bandwidth) for context in contexts]
            print(json.dumps(row), file=sys.stderr)
            if options.search:
                row["search"] = search(step, tiles, contexts[0], name, quantization)
                row["searched"] = [roofline(step, context, bandwidth) for context in contexts]
            rows.append(row)
            del step
        torch.cuda.empty_cache()
        with Path(options.out).open("w", encoding="utf-8") as file:
            json.dump(
                {
                    "gpu": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "read_bandwidth_bytes_per_s": bandwidth,
                    "rows": rows,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
