"""What the products and the attention of a batch take alone, by rows and by way to compute them.

    python benchmarks/batch_products.py --out products.json [--model qwen3-vl-4b]

Which chunk of prompts fills the GPU best, what a step of rows costs beside prompts and together
with them, whether GELU inside a product is for free, which of torch's attention kernels is the
fastest for pictures side by side, and what 8 bits would save. Each way is a CUDA graph that goes
through several copies of its weights, so none stays in the cache. Takes about half a minute.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwencli.engine.ops.attention import flash_segments, flash_varlen
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape

CUDA, TYPE = torch.device("cuda"), torch.bfloat16
COPIES, REPLAYS = 4, 5
# Prompts of 272 tokens, from one to fifteen, and rows of a step alone and beside seven of them.
TEXT_ROWS = (32, 128, 256, 272, 544, 1088, 1632, 1904, 2160, 2176, 2720, 3264, 4080)
# Pictures of 512x512.
VISION_ROWS = tuple(1024 * pictures for pictures in (1, 2, 4, 7, 8, 16, 32))
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def us_of(work: Callable[[], object], calls: int) -> float:
    """Microseconds of one of the `calls` in `work`, as a graph."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    first.record()
    for _ in range(REPLAYS):
        graph.replay()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3 / REPLAYS / calls


def eight_bit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rows rounded to e4m3 in front of the product, with a scale a row; weights are so already."""
    return torch._scaled_mm(
        x.to(torch.float8_e4m3fn),
        weight.t(),
        scale_a=scales(len(x)),
        scale_b=scales(len(weight)).view(1, -1),
        out_dtype=TYPE,
    )


@functools.cache
def scales(count: int) -> torch.Tensor:
    return torch.ones(count, 1, device=CUDA)


EIGHT_BIT = "fp8_with_rounding"
WAYS: dict[str, Way] = {
    "linear": F.linear,
    "gelu_after": lambda x, w, b: torch.ops.aten.gelu_(F.linear(x, w, b), approximate="tanh"),
    "gelu_inside": lambda x, w, b: torch._addmm_activation(b, x, w.t(), use_gelu=True),
    "residual_inside": lambda x, w, b: x.new_empty(len(x), len(w)).addmm_(x, w.t()),
    EIGHT_BIT: eight_bit,
}


def products(matrices: dict[str, tuple[int, int, tuple[str, ...]]], rows: tuple[int, ...]) -> Any:
    found: list[dict[str, Any]] = []
    for name, (outputs, inputs, ways) in matrices.items():
        weights = [torch.randn(outputs, inputs, device=CUDA, dtype=TYPE) for _ in range(COPIES)]
        rounded = [weight.to(torch.float8_e4m3fn) for weight in weights]
        bias = torch.randn(outputs, device=CUDA, dtype=TYPE)
        for count in rows:
            x = torch.randn(count, inputs, device=CUDA, dtype=TYPE)
            line: dict[str, Any] = {"matrix": name, "rows": count}
            for way in ways:
                copies = rounded if way == EIGHT_BIT else weights
                try:
                    us = us_of(lambda: [WAYS[way](x, w, bias) for w in copies], COPIES)  # noqa: B023
                except (RuntimeError, ValueError, TypeError) as error:
                    line[way] = str(error)[:120]
                    continue
                tflops = 2 * count * outputs * inputs / us / 1e6
                line[way] = {"us": round(us, 2), "tflops": round(tflops, 1)}
            found.append(line)
            print(json.dumps(line), file=sys.stderr)
    return found


def attention(heads: int, dim: int, lengths: tuple[int, ...]) -> Any:
    """Pictures of 1,024 patches side by side."""
    found: list[dict[str, Any]] = []
    for pictures in lengths:
        qkv = torch.randn(pictures * 1024, 3 * heads, dim, device=CUDA, dtype=TYPE)
        q, k, v = (x.transpose(1, 2) for x in qkv.view(pictures, 1024, 3, heads, dim).unbind(2))
        starts = torch.arange(pictures + 1, device=CUDA, dtype=torch.int32) * 1024
        line: dict[str, Any] = {"pictures": pictures, "heads": heads, "dim": dim}

        def under(backend: SDPBackend) -> None:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v)  # noqa: B023

        ways: dict[str, Callable[[], object]] = {
            "default": lambda: F.scaled_dot_product_attention(q, k, v),  # noqa: B023
            "flash": lambda: under(SDPBackend.FLASH_ATTENTION),
            "cudnn": lambda: under(SDPBackend.CUDNN_ATTENTION),
            "segments": lambda: flash_segments(qkv, starts, 1024),  # noqa: B023
        }
        for way, work in ways.items():
            try:
                us = us_of(work, 1)
            except RuntimeError as error:
                line[way] = str(error)[:120]
                continue
            tflops = 4 * pictures * 1024 * 1024 * heads * dim / us / 1e6
            line[way] = {"us": round(us, 1), "tflops": round(tflops, 1)}
        found.append(line)
        print(json.dumps(line), file=sys.stderr)
    return found


def prompt_attention(heads: int, kv_heads: int, dim: int) -> Any:
    """Prompts of 272 tokens side by side."""
    found = []
    for prompts in (1, 4, 7, 15):
        qkv = torch.randn(prompts * 272, heads + 2 * kv_heads, dim, device=CUDA, dtype=TYPE)
        q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)
        starts = torch.arange(prompts + 1, device=CUDA, dtype=torch.int32) * 272
        us = us_of(lambda: flash_varlen(q, k, v, starts, starts, 272, 272), 1)  # noqa: B023
        found.append({"prompts": prompts, "us": round(us, 1)})
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    config = resolve_model(options.model, offline=True).hub_config
    assert config is not None, "built-in models carry their shape"
    shape = read_shape(config)
    text, vision = shape.text, shape.vision
    assert vision is not None, "a model that sees"
    plain = ("linear", "residual_inside", EIGHT_BIT)
    qkv = text.q_size + 2 * text.kv_size
    decoder = {
        "qkv": (qkv, text.hidden_size, plain),
        "o": (text.hidden_size, text.q_size, plain),
        "gate_up": (2 * text.intermediate_size, text.hidden_size, plain),
        "down": (text.hidden_size, text.intermediate_size, plain),
    }
    hidden, wide = vision.hidden_size, vision.intermediate_size
    gelu = ("linear", "gelu_after", "gelu_inside", EIGHT_BIT)
    tower = {
        "qkv": (3 * hidden, hidden, plain),
        "proj": (hidden, hidden, plain),
        "mlp_in": (wide, hidden, gelu),
        "mlp_out": (hidden, wide, plain),
    }
    about: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    parts: dict[str, Callable[[], Any]] = {
        "decoder": lambda: products(decoder, TEXT_ROWS),
        "tower": lambda: products(tower, VISION_ROWS),
        "tower_attention": lambda: attention(
            vision.num_heads, vision.head_dim, (1, 4, 7, 8, 16, 32)
        ),
        "prompt_attention": lambda: prompt_attention(
            text.num_heads, text.num_kv_heads, text.head_dim
        ),
        "head": lambda: products(
            {"head": (text.vocab_size, text.hidden_size, ("linear",))}, (7, 32, 128, 256)
        ),
    }
    for name, measure in parts.items():
        about[name] = measure()
        Path(options.out).write_text(json.dumps(about, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
