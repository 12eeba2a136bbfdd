"""Times the kernels of Gated DeltaNet against what the device could do at best.

    python benchmarks/gated_delta.py --out gated_delta.json

Steps of rows: a step reads and writes each row's states once (one that checks drafts only reads
them), and its floor is that traffic at the bandwidth that a copy reaches here. Steps follow each
other in a CUDA graph, each with states of its own, together so large that no cache holds them.
Prompts: the floor is the arithmetic of the chunked delta rule at the rate that torch multiplies
bfloat16 matrices here, or the kernels' own traffic at that bandwidth, whichever takes longer.
Prints a JSON object: the device, what it reaches, and a line each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qwencli.engine.cache.paged_kv import PackedPrompts
from qwencli.engine.kernels import chunked_delta, gated_delta
from qwencli.engine.kernels.chunked_delta import ChunkedDelta
from qwencli.engine.kernels.fused_ops import Launch
from qwencli.engine.kernels.gated_delta import DeltaStep, StateCut
from qwencli.engine.ops import gated_delta as ops

HALF = torch.bfloat16
# Key heads and value heads.
MODELS = {"9b": (16, 32), "27b": (16, 48), "0.8b": (16, 16)}
ROWS_IN_ALL = 512  # whose states are a GB
DIM, RING = 128, 12
DRAFTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="9b", help="whose shapes")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="of a prompt")
    parser.add_argument(
        "--together", type=int, nargs="+", default=[1, 16], help="prompts in a pass"
    )
    parser.add_argument(
        "--cuts", nargs="+", help="of a step's states: programs of a head and their warps, as 4x8"
    )
    parser.add_argument("--columns", type=int, nargs="+", help="of a scan's programs")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="where the JSON goes; stdout without it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a CUDA device, and there is none")
    device = torch.device("cuda")
    k_heads, v_heads = MODELS[options.model]
    layer = layer_of(k_heads, v_heads, device)
    copied, multiplied = copy_rate(device), matrix_rate(device)
    lines: list[dict[str, Any]] = []
    with torch.inference_mode():
        for rows in options.rows:
            chosen = gated_delta.IN_PARTS
            for cut in options.cuts or [f"{chosen.parts}x{chosen.num_warps}"]:
                parts, warps = map(int, cut.split("x"))
                count = max(2, ROWS_IN_ALL // rows)
                as_said = StateCut(parts, warps)
                lines += steps(layer, rows, count, as_said, copied, options.repeats)
        for tokens in options.tokens:
            for together in options.together:
                for columns in options.columns or [chunked_delta.COLUMNS]:
                    chunked_delta.COLUMNS = columns
                    lines += prompts(
                        layer, tokens, together, columns, copied, multiplied, options.repeats
                    )
    found = {
        "device": torch.cuda.get_device_name(),
        "model": options.model,
        "copy_bytes_per_s": copied,
        "matrix_flops_per_s": multiplied,
        "lines": lines,
    }
    text = json.dumps(found, indent=1)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n")


def layer_of(k_heads: int, v_heads: int, device: torch.device) -> ops.GatedDelta:
    channels = (2 * k_heads + v_heads) * DIM
    return ops.GatedDelta(
        k_heads, v_heads, DIM, DIM,
        torch.randn(channels, ops.TAPS, device=device, dtype=HALF) * 0.5,
        torch.rand(v_heads, device=device).mul(16).log(),
        torch.rand(v_heads, device=device),
        torch.ones(DIM, device=device),
        1e-6,
    )  # fmt: skip


def inputs_of(layer: ops.GatedDelta, tokens: int) -> ops.DeltaInputs:
    channels, values = len(layer.conv), layer.v_heads * DIM
    wide = torch.randn(tokens, channels + values, device=layer.conv.device, dtype=HALF)
    gates = torch.randn(tokens, 2 * layer.v_heads, device=layer.conv.device, dtype=HALF)
    return ops.DeltaInputs(
        wide[:, :channels], wide[:, channels:], gates[:, layer.v_heads :], gates[:, : layer.v_heads]
    )


def steps(
    layer: ops.GatedDelta, rows: int, layers: int, cut: StateCut, copied: float, repeats: int
) -> Iterator[dict[str, Any]]:
    device = layer.conv.device
    step = DeltaStep(Launch.on(device).options, cut)
    conv = torch.zeros(layers, rows, RING, len(layer.conv), device=device, dtype=HALF)
    recurrent = torch.zeros(layers, rows, layer.v_heads, DIM, DIM, device=device)
    states = [ops.DeltaState(conv[n], recurrent[n]) for n in range(layers)]
    which = ops.DeltaRows(
        torch.arange(rows, device=device),
        torch.full((rows,), 9, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
    )
    one, several = inputs_of(layer, rows), inputs_of(layer, rows * (1 + DRAFTS))
    keys, values = (layer.k_heads, layer.k_dim), (layer.v_heads, layer.v_dim)
    updates = ops.DeltaUpdates.empty(layers, rows, 1 + DRAFTS, keys, values, device)
    accepted = torch.full((rows,), 2, device=device)
    state_bytes = recurrent.nbytes // layers

    def decode() -> None:
        for state in states:
            step.decode(one, layer, state, which)

    def verify() -> None:
        for index, state in enumerate(states):
            step.verify(several, layer, state, which, updates.of_layer(index))

    def adopt() -> None:
        gated_delta.adopt_accepted(updates, recurrent, which.slots, which.positions, accepted)

    small = (one.qkv.nbytes + 2 * one.z.nbytes) // 2
    for name, work, moved in (
        ("decode", decode, 2 * state_bytes + small),
        ("verify", verify, state_bytes + (1 + DRAFTS) * small),
        ("adopt", adopt, 2 * state_bytes),
    ):
        seconds = graph_seconds(work, repeats) / layers
        floor = moved / copied
        yield {
            "kernel": name, "rows": rows, "layers": layers,
            "cut": f"{cut.parts}x{cut.num_warps}",
            "tokens": 1 if name == "decode" else 1 + DRAFTS,
            "layer_us": seconds * 1e6, "floor_us": floor * 1e6,
            "floor_percent": 100 * floor / seconds,
        }  # fmt: skip


def prompts(
    layer: ops.GatedDelta, tokens: int, together: int, columns: int, copied: float,
    multiplied: float, repeats: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    device, total = layer.conv.device, tokens * together
    inputs = inputs_of(layer, total)
    state = ops.DeltaState(
        torch.zeros(together, RING, len(layer.conv), device=device, dtype=HALF),
        torch.zeros(together, layer.v_heads, DIM, DIM, device=device),
    )
    starts = torch.arange(0, total + 1, tokens, device=device, dtype=torch.int32)
    packed = PackedPrompts([tokens] * together, [0] * together, starts, starts, None, False)
    slots = torch.arange(together, device=device)
    run = ChunkedDelta()
    chunks, heads, size = together * -(-tokens // ops.CHUNK), layer.v_heads, ops.CHUNK
    # Products of a chunk and head: keys and queries with keys, the inverse (4), keys and queries
    # with the state, T, scores with delta, the state's update.
    flops = 2 * size * (2 * size * DIM + 4 * size * size + 3 * DIM * DIM + 2 * size * DIM)
    moved = (
        4 * inputs.qkv.nbytes + 3 * inputs.z.nbytes
        + chunks * heads * (2 * 2 * (DIM * DIM + size * size) + 2 * 2 * size * DIM)
    )  # fmt: skip
    floor = max(chunks * heads * flops / multiplied, moved / copied)

    def work() -> None:
        run(inputs, layer, state, packed, slots)

    seconds = graph_seconds(work, repeats)
    line = {
        "kernel": "prefill", "tokens": tokens, "together": together, "columns": columns,
        "layer_us": seconds * 1e6, "floor_us": floor * 1e6,
            "floor_percent": 100 * floor / seconds,
        "flops": chunks * heads * flops, "moved_bytes": moved, "us_by_kernel": by_kernel(work),
    }  # fmt: skip
    yield line


def by_kernel(work: Callable[[], None]) -> dict[str, float]:
    """Microseconds of each kernel of one pass, as the profiler has them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return {each.key: each.device_time_total for each in profile.key_averages()}


def copy_into(place: torch.Tensor, source: torch.Tensor) -> None:
    place.copy_(source)


def multiply_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.mm(a, b, out=out)


def graph_seconds(work: Callable[[], None], repeats: int) -> float:
    """The median of replays of `work` in a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(3):
        graph.replay()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy of a GB reads and writes together."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    place = torch.empty_like(source)
    return 2 * source.nbytes / graph_seconds(lambda: copy_into(place, source), 20)


def matrix_rate(device: torch.device) -> float:
    """Operations a second of products of bfloat16 matrices of 8,192 by 8,192."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=HALF) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / graph_seconds(lambda: multiply_into(out, a, b), 10)


if __name__ == "__main__":
    main()
