"""Products of many rows at a model's matrices: by our kernels, by torch.mm in bf16, and read back.

    python benchmarks/quantized_products.py --out products.json
    python benchmarks/quantized_products.py --sweep --out tiles.json

Microseconds of one product in a CUDA graph over copies of the matrix that no cache holds, with
what is in front of it (norm or SwiGLU, and rounding); ways in turns, the median of rounds. Each
way is first held to the product in float32. `--sweep` tries tiles of `tiled_gemm`, without what is
in front, and prints the best of each shape and number of rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from qwencli.engine.kernels.dequantize import dequantize
from qwencli.engine.kernels.many_rows import ManyRows, scaled_mm
from qwencli.engine.kernels.row_quant import RowFormat, quantize_rows
from qwencli.engine.kernels.swiglu import swiglu
from qwencli.engine.kernels.tiled_gemm import TiledGemm
from qwencli.engine.kernels.tiles import ProductTiles
from qwencli.engine.ops.decoder_ops import RMSNorm
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme

CUDA = torch.device("cuda")
Tensor = torch.Tensor
# Of Qwen3-VL-4B: rows, columns, and what is in front: a norm, SwiGLU, or nothing.
MATRICES = {
    "qkv": (6144, 2560, "norm"),
    "o": (2560, 4096, ""),
    "gate_up": (19456, 2560, "norm"),
    "down": (2560, 9728, "swiglu"),
    "head": (151936, 2560, "norm"),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPTS = (272, 1088, 4352)
SCHEMES = {"fp8": Scheme.FP8, "8bit": Scheme.INT8, "4bit": Scheme.INT4}
FORMATS = {
    Scheme.FP8: RowFormat.FP8,
    Scheme.INT8: RowFormat.INT8,
    Scheme.INT4: RowFormat.FLOAT16,
}
BYTES_AT_ONCE = 300_000_000  # several times what caches hold
MOST_COPIES = 12
ROUNDS = 5
SWEPT_ROWS = (16, 32, 64, 128, 256, 512, 1088, 4352)
MOST_PROGRAMS = 6  # a multiprocessor, of products whose columns are shared
Way = Callable[[int], Any]  # which copy of the matrix


@dataclass(frozen=True)
class Case:
    """One matrix of one scheme in copies, and its bf16 weights in copies."""

    name: str
    scheme: Scheme
    matrices: Sequence[QuantizedTensor]
    weights: Sequence[Tensor]
    front: str
    norm: RMSNorm


def drawn(scheme: Scheme, rows: int, columns: int) -> QuantizedTensor:
    if scheme is Scheme.INT4:
        words = (rows, columns // 8)
        data = torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device=CUDA)
        scale = torch.rand(rows, columns // 128, device=CUDA).half() * 0.01 + 0.001
        zero = torch.rand(rows, columns // 128, device=CUDA).half() * 4 + 5.5
        return QuantizedTensor(scheme, data, scale, zero)
    q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=CUDA)
    if scheme is Scheme.FP8:
        return QuantizedTensor(
            scheme, q.to(torch.float8_e4m3fn), torch.rand(rows, device=CUDA) * 1e-3
        )
    return QuantizedTensor(scheme, q, torch.rand(rows, device=CUDA) * 1e-3)


def case_of(name: str, scheme: Scheme) -> Case:
    rows, columns, front = MATRICES[name]
    first = drawn(scheme, rows, columns)
    copies = min(max(BYTES_AT_ONCE // first.nbytes, 1), MOST_COPIES)
    matrices = [first, *(drawn(scheme, rows, columns) for _ in range(copies - 1))]
    weights = [dequantize(matrix, torch.bfloat16) for matrix in matrices]
    norm = RMSNorm(torch.rand(columns, device=CUDA, dtype=torch.bfloat16) + 0.5, 1e-6)
    return Case(name, scheme, matrices, weights, front, norm)


def graph_of(way: Way, copies: int) -> torch.cuda.CUDAGraph:
    way(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            way(copy)
    return graph


def microseconds(ways: dict[str, Way], copies: int, rounds: int) -> dict[str, float]:
    """Median time of each way, in turns."""
    graphs = {name: graph_of(way, copies) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for graph in graphs.values():
        graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / copies)
    return {name: statistics.median(values) for name, values in times.items()}


def off(got: Tensor, expected: Tensor) -> float:
    got = got[: len(expected)].float()
    return float((got - expected).norm() / expected.norm())


def candidates(row_format: RowFormat, rows: int, columns: int, m: int) -> Iterator[ProductTiles]:
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    tokens = {16: (16,), 32: (32,), 64: (64,), 128: (64, 128)}.get(m, (128, 256))
    wide = (128, 256) if row_format is RowFormat.FP8 and m <= 64 else (128,)
    for r, t, c, warps, stages in itertools.product(
        (64, 128), tokens, wide, (4, 8), (2, 3, 4) if m > 256 or wide == (256,) else (3, 4, 5)
    ):
        if (t == 256 and (warps == 4 or r == 64)) or (t <= 64 and warps == 8 and r == 64):
            continue
        stage = r * c // (2 if row_format is RowFormat.FLOAT16 else 1)
        stage += t * c * (2 if row_format is RowFormat.FLOAT16 else 1)
        if stage * stages > 220 * 1024:
            continue
        count = -(-rows // r) * -(-m // t)
        for splits in (1, 2, 4, 8):
            each = columns // splits // c
            if splits > 1 and (count * splits > MOST_PROGRAMS * processors or each < stages):
                continue
            if splits > 1 and count * splits // 2 > 2 * processors:
                continue
            yield ProductTiles(r, t, c, warps, splits, stages)


def compile_one(job: tuple[str, str, ProductTiles, int]) -> str | None:
    """Compile what a sweep will launch, by a process of its own: Triton keeps it on disk."""
    name, scheme, tiles, m = job
    rows, columns, _ = MATRICES[name]
    try:
        matrix = drawn(Scheme(scheme), min(rows, 1024), columns)
        x = torch.randn(m, columns, device=CUDA, dtype=torch.bfloat16)
        y = torch.empty(m, matrix.rows, device=CUDA, dtype=torch.bfloat16)
        TiledGemm.on(CUDA)(quantize_rows(x, FORMATS[Scheme(scheme)]), matrix, y, tiles)
        torch.cuda.synchronize()
    except (RuntimeError, TritonError) as error:
        return f"{job}: {error!r}"[:300]
    return None


def sweep(schemes: Sequence[str], names: Sequence[str], counts: Sequence[int]) -> list[Any]:
    jobs: dict[Any, Any] = {}
    for scheme, name, m in itertools.product(schemes, names, counts):
        rows, columns, _ = MATRICES[name]
        for tiles in candidates(FORMATS[SCHEMES[scheme]], rows, columns, m):
            job = (name, SCHEMES[scheme].value, tiles, min(m, 64))
            jobs.setdefault((scheme, tiles), job)
    began = time.monotonic()
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        failed = [said for said in pool.map(compile_one, jobs.values()) if said]
    print(f"{len(jobs)} tiles compiled in {time.monotonic() - began:.0f} s", failed[:5], flush=True)
    return [
        swept(case_of(name, SCHEMES[scheme]), m, scheme)
        for scheme, name, m in itertools.product(schemes, names, counts)
        if not (name == "head" and m > 512)
    ]


def swept(case: Case, m: int, scheme: str) -> Any:
    gemm, row_format = TiledGemm.on(CUDA), FORMATS[case.scheme]
    matrix = case.matrices[0]
    x = torch.randn(m, matrix.columns, device=CUDA, dtype=torch.bfloat16)
    rounded = quantize_rows(x, row_format)
    y = torch.empty(m, matrix.rows, device=CUDA, dtype=torch.bfloat16)
    expected = x[:64].float() @ matrix.dequantize(torch.float32).t()
    copies = len(case.matrices)
    found = []
    for tiles in candidates(row_format, matrix.rows, matrix.columns, m):

        def way(copy: int, tiles: ProductTiles = tiles) -> None:
            gemm(rounded, case.matrices[copy], y, tiles)

        try:
            way(0)
            wrong = off(y, expected)
            us = microseconds({"tiled": way}, copies, 2)["tiled"]
        except (RuntimeError, TritonError) as error:
            found.append({"tiles": asdict(tiles), "error": repr(error)[:200]})
            continue
        found.append({"tiles": asdict(tiles), "us": round(us, 2), "off": round(wrong, 5)})
    beside: dict[str, Way] = {"bf16": lambda copy: torch.mm(x, case.weights[copy].t())}
    if case.scheme is Scheme.FP8:
        beside["scaled_mm"] = lambda copy: scaled_mm(rounded, case.matrices[copy])
    times = microseconds(beside, copies, 3)
    if not any("us" in each for each in found):
        print(scheme, case.name, m, "nothing ran:", found[:1], flush=True)
        return {"scheme": scheme, "matrix": case.name, "rows": m, "beside": times, "tiles": found}
    best = sorted((each for each in found if "us" in each), key=lambda each: each["us"])
    print(
        scheme, case.name, m, *(f"{name} {us:.1f}" for name, us in times.items()),
        *(f"{each['us']}:{list(each['tiles'].values())}" for each in best[:3]),
        f"off {best[0]['off']}", flush=True,
    )  # fmt: skip
    return {"scheme": scheme, "matrix": case.name, "rows": m, "beside": times, "tiles": found}


def compare(schemes: Sequence[str], names: Sequence[str], counts: Sequence[int]) -> list[Any]:
    """What is in front and the product: ours, in bf16, and with the matrix read back."""
    return [
        compared(case, scheme, m)
        for scheme, name in itertools.product(schemes, names)
        for case in (case_of(name, SCHEMES[scheme]),)
        for m in counts
        if not (name == "head" and m > max(ROWS))
    ]


def compared(case: Case, scheme: str, m: int) -> Any:
    many, norm = ManyRows(CUDA), case.norm if case.front == "norm" else None
    gated, matrix = case.front == "swiglu", case.matrices[0]
    width = matrix.columns * (2 if gated else 1)
    x = torch.randn(m, width, device=CUDA, dtype=torch.bfloat16)

    def front() -> Tensor:
        return swiglu(x) if gated else x if norm is None else norm(x)

    ways: dict[str, Way] = {
        "bf16": lambda copy: torch.mm(front(), case.weights[copy].t()),
        "read_back": lambda copy: torch.mm(
            front(), dequantize(case.matrices[copy], torch.bfloat16).t()
        ),
        "ours": lambda copy: many.product(x, case.matrices[copy], norm, gated=gated),
    }
    expected = front().float() @ case.weights[0].float().t()
    wrong = {name: off(way(0), expected) for name, way in ways.items()}
    del expected
    times = microseconds(ways, len(case.matrices), ROUNDS)
    flops, read = 2 * m * matrix.rows * matrix.columns, matrix.nbytes
    print(
        f"{scheme:5}{case.name:8}{m:6}",
        *(f"{name} {us:8.1f}" for name, us in times.items()),
        f"{flops / times['ours'] / 1e6:6.0f} TFLOP/s {read / times['ours'] / 1e6:5.2f} TB/s",
        f"off {wrong['ours']:.4f}",
        flush=True,
    )
    return {"scheme": scheme, "matrix": case.name, "rows": m, "us": times, "off": wrong}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--matrices", default=",".join(MATRICES))
    parser.add_argument("--rows", default="")
    arguments = parser.parse_args()
    names, schemes = arguments.matrices.split(","), arguments.schemes.split(",")
    counts = [int(each) for each in arguments.rows.split(",") if each]
    torch.manual_seed(0)
    if arguments.sweep:
        tiled = [each for each in schemes if SCHEMES[each] in FORMATS]
        rows = sweep(tiled, names, counts or SWEPT_ROWS)
    else:
        rows = compare(schemes, names, counts or (*ROWS, *PROMPTS))
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
