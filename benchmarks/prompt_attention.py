"""Our attention of many queries beside torch's own, with every way to cut it up.

    python benchmarks/prompt_attention.py [--processes 8] [--kinds 128-causal,64] > attention.jsonl

Heads as models have them, in bf16: 128 and 256 columns of prompts, 64, 72 and 80 of pictures. A
line of JSON for each kind and each cut (queries and keys of a block, warps, blocks on their way),
with microseconds of a launch inside a CUDA graph, by sequences: `4x272of4368` are four of 272
queries and 4,368 keys. `torch` is its flash attention over sequences side by side, `torch whole`
over a single one, `sdpa` what `scaled_dot_product_attention` chooses for it (no causal one, as its
first query would see the first key alone). Each is compiled in a process of its own; they take
turns at the GPU.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from qwencli.engine.kernels.flash_attention import FlashAttention
from qwencli.engine.kernels.tiles import ANY, FlashTiles
from qwencli.engine.ops.attention import forward

# Queries and keys of each sequence.
Sequences = Sequence[tuple[int, int]]
TEXT: Sequence[Sequences] = (
    ((272, 272),),
    ((272, 272),) * 4,
    ((272, 272),) * 32,
    ((512, 512),) * 16,
    ((1024, 1024),),
    ((1024, 1024),) * 8,
    ((2048, 2048),),
    ((4096, 4096),),
    ((272, 4368),) * 4,
    ((2048, 16384),),
)
PICTURES: Sequence[Sequences] = (
    ((1024, 1024),),
    ((1024, 1024),) * 4,
    ((1024, 1024),) * 16,
    ((4096, 4096),),
    ((8160, 8160),),
)
HEADS = {128: (32, 8), 256: (16, 4), 64: (16, 16), 72: (16, 16), 80: (16, 16)}
CUTS: dict[str, Sequence[tuple[int, int, int, int]]] = {
    "128-causal": ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)),
    "256-causal": ((64, 32, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
    "64": ((64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3)),
    "72": ((64, 64, 4, 3), (128, 64, 8, 3)),
    "80": ((64, 64, 4, 3), (128, 64, 8, 3)),
}
LAUNCHES, REPEATS = 6, 7
Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Job = tuple[str, tuple[int, int, int, int] | str, str]


def made(sequences: Sequences, dim: int) -> tuple[Qkv, torch.Tensor, torch.Tensor]:
    """Heads as projections leave them, and where queries and keys of each sequence begin."""
    heads, kv_heads = HEADS[dim]
    random = torch.Generator("cuda").manual_seed(1)

    def split(tokens: int) -> Sequence[torch.Tensor]:
        size = (tokens, heads + 2 * kv_heads, dim)
        qkv = torch.randn(*size, device="cuda", dtype=torch.bfloat16, generator=random)
        return qkv.split_with_sizes((heads, kv_heads, kv_heads), dim=1)

    def starts(lengths: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")

    queries, keys = zip(*sequences, strict=True)
    seen = split(sum(keys))
    return (split(sum(queries))[0], seen[1], seen[2]), starts(queries), starts(keys)


def microseconds(launch: Callable[[], object]) -> float:
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            launch()
    times = []
    for _ in range(REPEATS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / LAUNCHES * 1e3)
    return round(statistics.median(times), 1)


def launch_of(
    way: tuple[int, int, int, int] | str, dim: int, causal: bool, sequences: Sequences
) -> Callable[[], object] | None:
    """None: not a way to attend to these."""
    (q, k, v), starts, key_starts = made(sequences, dim)
    longest, longest_keys = max(n for n, _ in sequences), max(m for _, m in sequences)
    if not isinstance(way, str):
        own = FlashAttention(torch.device("cuda"), ((ANY, FlashTiles(*way)),), causal)
        return lambda: own(q, k, v, longest, starts, key_starts)
    if way == "torch":
        return lambda: forward(
            q, k, v, starts, key_starts, longest, longest_keys, 0.0, causal, False
        )
    if len(sequences) > 1 or (way == "sdpa" and causal):
        return None
    if way == "sdpa":
        heads = [each.transpose(0, 1)[None] for each in (q, k, v)]
        return lambda: F.scaled_dot_product_attention(*heads)
    whole = q[None], k[None], v[None]
    return lambda: forward(*whole, None, None, longest, longest_keys, 0.0, causal, False)


@torch.inference_mode()
def measure(job: Job) -> dict[str, object]:
    kind, way, lock = job
    dim, causal = int(kind.split("-")[0]), kind.endswith("causal")
    shapes = TEXT if causal else PICTURES
    first = launch_of(way, dim, causal, shapes[0])
    if first is not None:
        first()  # compiled before its turn
    found: dict[str, object] = {"columns": dim, "causal": causal, "way": way}
    with Path(lock).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for sequences in shapes:
            launch = launch_of(way, dim, causal, sequences)
            if launch is not None:
                queries, keys = sequences[0]
                of = "" if queries == keys else f"of{keys}"
                found[f"{len(sequences)}x{queries}{of}"] = microseconds(launch)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", default=8, type=int)
    parser.add_argument("--kinds", default=",".join(CUTS))
    said = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile() as lock,
        ProcessPoolExecutor(said.processes, mp_context=context) as pool,
    ):
        jobs = [
            (kind, way, lock.name)
            for kind in said.kinds.split(",")
            for way in (*CUTS[kind], "torch", "torch whole", "sdpa")
        ]
        for found in pool.map(measure, jobs):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
