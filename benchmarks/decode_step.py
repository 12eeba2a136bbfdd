"""Where the time of a decode step goes, kernel by kernel, and which tiles serve each matrix best.

    python benchmarks/decode_step.py --model qwen3-vl-4b --quantization none,8bit,fp8,4bit \
        --out decode_step.json [--tokens 1,2,4,8] [--search]

The step is the engine's own, greedy, with random weights, as one CUDA graph; of several tokens, the
one that checks drafts. What a kernel costs is what the step takes less without it: kernels overlap,
so the parts need not add up to the whole. `tok_per_s` are steps a second: how many tokens a step of
several gives depends on the text. `--search` compiles the candidates for every matrix in parallel
and times each inside the whole step, the others being the best so far; several tokens after
several others take their tiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measured_step import REPLAYS, MeasuredStep, Tiles, text_shape
from benchmarks.step_search import search
from qwencli.config import KVDType, Quantization
from qwencli.engine.instruments.timing import LARGEST_BUFFER, read_bandwidth
from qwencli.engine.ops.decoder_ops import Layer, Matrix
from qwencli.models.memory import native_kv_bytes

SLACK = 64


def bytes_of(matrix: Matrix) -> int:
    return matrix.nbytes


def roofline(step: MeasuredStep, context: int, bandwidth: float, tokens: int = 1) -> dict[str, Any]:
    """Bytes, time and share of the read bandwidth of each group of kernels, and of the step.

    Those of several tokens read what those of one do; `over_one_token` is what they cost more.
    """
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
    whole = step.us(context, tokens)
    step_us = statistics.median(whole)
    parts = {}
    for name, size in read.items():
        step.without(name)
        us = step_us - statistics.median(step.us(context, tokens))
        parts[name] = {
            "launches": 2 if name == "choose" else layers,
            "bytes": size,
            "us": us,
            "percent_of_bandwidth": 100 * size / (us * 1e-6) / bandwidth,
        }
    step.without("")
    one_us = step_us if tokens == 1 else statistics.median(step.us(context))
    total = sum(read.values())
    return {
        "context": context,
        "step_us": whole,
        "bytes": total,
        "tok_per_s": 1e6 / step_us,
        "over_one_token": step_us / one_us,
        "percent_of_limit": 100 * total / (step_us * 1e-6) / bandwidth,
        "parts": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--quantization", default="none,8bit,fp8,4bit")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--context", default="512")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    contexts = [int(context) for context in options.context.split(",")]
    sizes = [int(tokens) for tokens in options.tokens.split(",")]
    bandwidth = read_bandwidth("cuda", LARGEST_BUFFER)
    rows: list[dict[str, Any]] = []
    axes = (options.model, options.quantization, options.kv_dtype)
    for name, mode, kv in itertools.product(*(axis.split(",") for axis in axes)):
        tiles, quantization = Tiles(), Quantization(mode)
        with torch.inference_mode():
            slots = max(contexts) + 2 * REPLAYS + SLACK
            step = MeasuredStep(text_shape(name), quantization, slots, tiles, KVDType(kv))
            for tokens in sizes:
                row: dict[str, Any] = {"model": name, "quantization": mode, "kv_dtype": kv}
                row["tokens"] = tokens
                rows.append(row)
                row["default"] = [roofline(step, at, bandwidth, tokens) for at in contexts]
                print(json.dumps(row), file=sys.stderr)
                save(Path(options.out), bandwidth, rows)
                if options.search:
                    if tokens == 1 or not tiles.reuse(tokens):
                        row["search"] = search(step, tiles, contexts[0], tokens, name, quantization)
                    row["searched"] = [roofline(step, at, bandwidth, tokens) for at in contexts]
                    save(Path(options.out), bandwidth, rows)
            del step
        torch.cuda.empty_cache()


def save(out: Path, bandwidth: float, rows: list[dict[str, Any]]) -> None:
    """All rows so far: what there is stays if the run is cut short."""
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_bandwidth_bytes_per_s": bandwidth,
    }
    out.write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
