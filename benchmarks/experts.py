"""Times the feed-forward of layers with experts against reading the chosen experts' weights.

    python benchmarks/experts.py --out experts.json [--model 35b-a3b] [--mode int4 fp8]
        [--rows 1 8 64 2048] [--sweep]

A pass goes through as many layers as `--layers`, each with weights of its own and rows that choose
other experts, in a CUDA graph; `us` is the time of one layer, one value a repeat. The floor is the
weights of the experts that were chosen, each once, at the bandwidth that a copy reaches here.
`--sweep`: other cuts of few rows' products, in turns with those that run by default.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qwencli.engine.kernels import moe
from qwencli.engine.kernels.fused_ops import MAX_BATCH_ROWS, Launch
from qwencli.engine.ops.decoder_ops import Matrix, RMSNorm
from qwencli.engine.ops.moe import Routing, choose_experts
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme, quantize

HALF = torch.bfloat16
# Hidden size, experts, chosen ones, width, and whether one more is shared.
MODELS = {"30b-a3b": (2048, 128, 8, 768, 0), "35b-a3b": (2048, 256, 8, 512, 1)}
MODES = {"none": None, "int8": Scheme.INT8, "fp8": Scheme.FP8, "int4": Scheme.INT4}
# Of `--sweep`: rows of a program's matrices, and its warps.
ROWS, WARPS = (4, 8, 16), (2, 4, 8)


def layer_of(model: str, scheme: Scheme | None, device: torch.device) -> Any:
    hidden, count, top_k, width, shared = MODELS[model]

    def matrix(rows: int, columns: int) -> Matrix:
        weight = torch.empty(rows, columns, dtype=HALF, device=device).normal_(0.0, 0.02)
        return weight.t() if scheme is None else quantize(weight, scheme)

    router = torch.randn(count + shared, hidden, dtype=HALF, device=device) * 0.02
    stacked = count + shared
    return SimpleNamespace(
        mlp_norm=RMSNorm(torch.ones(hidden, dtype=HALF, device=device), 1e-6),
        gate_up=matrix(stacked * 2 * width, hidden),
        down=matrix(stacked * hidden, width),
        routing=Routing(router, count, top_k, True, shared),
    )


def bytes_of(matrix: Matrix) -> int:
    return matrix.nbytes if isinstance(matrix, QuantizedTensor) else matrix.numel() * 2


def floor_bytes(layer: Any, hidden: torch.Tensor) -> float:
    """Of the experts that these rows choose, and the router."""
    routing = layer.routing
    x = layer.mlp_norm(hidden)
    _, experts = choose_experts(torch.mm(x, routing.router.t()), routing)
    share = len(experts.unique()) / routing.stacked
    return share * (bytes_of(layer.gate_up) + bytes_of(layer.down)) + routing.router.numel() * 2


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * min(times(lambda: to.copy_(source), 5)))


def times(work: Any, repeats: int) -> list[float]:
    """Microseconds of each run; the first one is not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(repeats + 1):
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return found[1:]


def captured(way: Any, layers: list[Any], inputs: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
    def run() -> None:
        for layer, hidden in zip(layers, inputs, strict=True):
            way(hidden, layer)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="35b-a3b")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=["int4"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 64, 256, 2048])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a CUDA device, and there is none")
    device = torch.device("cuda")
    rate, lines = copy_rate(device), []
    default = moe.GATE_UP_ROWS, moe.DOWN_ROWS, moe.WARPS
    cuts = [default, *itertools.product(ROWS, ROWS, WARPS)] if options.sweep else [default]
    with torch.inference_mode():
        for mode in options.mode:
            layers = [layer_of(options.model, MODES[mode], device) for _ in range(options.layers)]
            kernels = moe.ExpertKernels(MAX_BATCH_ROWS, device, Launch.on(device).options, "tf32")
            for rows in options.rows:
                few = rows <= MAX_BATCH_ROWS
                width = MODELS[options.model][0]
                inputs = [torch.randn(rows, width, device=device).to(HALF) for _ in layers]
                pairs = zip(layers, inputs, strict=True)
                floor = statistics.mean(floor_bytes(*pair) for pair in pairs) / rate * 1e6
                for cut in cuts if few else [default]:
                    moe.GATE_UP_ROWS, moe.DOWN_ROWS, moe.WARPS = cut
                    graph = captured(kernels.few if few else kernels.many, layers, inputs)
                    us = [each / len(layers) for each in times(graph.replay, options.repeats)]
                    line = {"mode": mode, "rows": rows, "cut": cut, "us": us, "floor_us": floor}
                    line["median_us"] = statistics.median(us)
                    print(mode, rows, cut, round(line["median_us"], 2), round(floor, 2))
                    lines.append(line)
            del layers
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    about |= {"model": options.model, "bytes_per_s": rate, "layers": options.layers}
    options.out.write_text(json.dumps({**about, "lines": lines}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
