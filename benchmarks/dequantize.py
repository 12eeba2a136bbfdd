"""What it takes to read a layer's quantized matrices back, by our kernel and by plain operators.

    python benchmarks/dequantize.py --model qwen3-vl-4b --out dequantize.json

Times are those of a CUDA graph, so no host is in them. Bytes are those read and those written; a
copy of as many on the same device is the limit. The two ways are first held to equal bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwencli.config import Quantization
from qwencli.engine.kernels.dequantize import dequantize
from qwencli.engine.loading import weights
from qwencli.engine.quant.quantized_tensor import QuantizedTensor
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape

CUDA = torch.device("cuda")
# More than any cache holds.
LAYERS = 6
ROUNDS = 20
MODES = tuple(mode for mode in Quantization if mode is not Quantization.NONE)


def milliseconds(work: Callable[[], None]) -> float:
    """Median time of `work`, captured once and replayed."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measured(shape: ModelShape, mode: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    loaded = weights.dummy(shape, dtype, CUDA, mode)
    matrices = [m for name, m in loaded.matrices.items() if name != weights.HEAD]
    del loaded
    moved = sum(m.nbytes + m.rows * m.columns * dtype.itemsize for m in matrices)

    def all_by(way: Callable[[QuantizedTensor, torch.dtype], torch.Tensor]) -> Callable[[], None]:
        def work() -> None:
            for matrix in matrices:
                way(matrix, dtype)

        return work

    def copy() -> None:
        target.copy_(source)

    source = torch.ones(moved // 2, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    for matrix in matrices:
        assert torch.equal(dequantize(matrix, dtype), matrix.dequantize(dtype)), "bits differ"
    kernel, plain = (milliseconds(all_by(way)) for way in (dequantize, QuantizedTensor.dequantize))
    return {
        "mode": mode.value,
        "scheme": matrices[0].label,
        "bytes_per_layer": moved // LAYERS,
        "kernel_ms_per_layer": kernel / LAYERS,
        "plain_ms_per_layer": plain / LAYERS,
        "kernel_bytes_per_s": moved / kernel * 1e3,
        "copy_bytes_per_s": moved / milliseconds(copy) * 1e3,
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = resolve_model(arguments.model).hub_config
    assert config is not None, "built-in models carry their shape"
    shape = read_shape(config)
    few = replace(shape, vision=None, text=replace(shape.text, num_layers=LAYERS))
    rows = [measured(few, mode, torch.bfloat16) for mode in MODES]
    found = {"device": torch.cuda.get_device_name(), "model": arguments.model, "rows": rows}
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
