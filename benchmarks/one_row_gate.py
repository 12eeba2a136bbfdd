"""Whether one sequence is as fast and as steady as it was: two source trees, in turns.

    git archive COMMIT qwencli | tar -x -C /tmp/before
    python benchmarks/one_row_gate.py --before /tmp/before --after . --out gate.json \
        [--quantization none,fp8,8bit,4bit] [--processes 3] [--runs 8] [--model qwen3-vl-4b]

Each process loads 4B shapes with random weights from its tree and answers equal requests: a
picture of 512x512, 256 new tokens, greedy. Processes of both trees alternate, so that what the
machine does in between falls on both. Written for each mode: decode tok/s of every run, the ratio
of the medians, max/min over the runs of a process, and p99/p50 of the inter-token latencies (GPU
time where there is one). The gate: ratio >= 0.99, max/min <= 1.005, p99/p50 <= 1.02.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CONTEXT_WORDS = "Describe this image in detail. "


def work(model: str, quantization: str, runs: int, tokens: int, device: str) -> dict[str, Any]:
    """Measure the tree that PYTHONPATH names. Uses what both trees have."""
    from PIL import Image

    from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization, SamplingOptions
    from qwencli.engine.factory import create_engine
    from qwencli.messages import GenerationRequest, ImagePart, user_message
    from qwencli.models.resolve import resolve_model

    names = {each.name for each in dataclasses.fields(GenerationRequest)}
    fresh = "bypass_caches" if "bypass_caches" in names else "from_scratch"
    picture = ImagePart(Image.linear_gradient("L").convert("RGB").resize((512, 512)), "gradient")
    request = GenerationRequest(
        messages=(user_message(CONTEXT_WORDS, (picture,)),),
        sampling=SamplingOptions(do_sample=False, max_new_tokens=tokens),
        ignore_eos=True,
        **{fresh: True},
    )
    config = EngineConfig(
        resolve_model(model, offline=True),
        engine=EngineName.NATIVE,
        load_format=LoadFormat.DUMMY,
        quantization=Quantization(quantization),
    )
    if device != "auto":
        config = dataclasses.replace(config, device=device)
    with create_engine(config) as engine:
        for _ in range(3):
            engine.generate(request)
        results = [engine.generate(request) for _ in range(runs)]
    spreads = []
    for result in results:
        gaps = sorted((result.token_gpu_ms or (0.0, *result.itl_ms))[1:])
        spreads.append(gaps[int(0.99 * (len(gaps) - 1))] / gaps[len(gaps) // 2])
    return {
        "tok_per_s": [result.timings.decode_tok_per_s for result in results],
        "ttft_s": [result.timings.ttft_s for result in results],
        "itl_p99_over_p50": spreads,
        "sha256": results[0].text_sha256,
    }


def in_tree(tree: Path, options: argparse.Namespace, quantization: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", "--quantization", quantization]
    for name in ("model", "runs", "tokens", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = dict(os.environ, PYTHONPATH=str(tree.resolve()))
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree} {quantization}: {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def summary(processes: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [each["tok_per_s"] for each in processes]
    return {
        "tok_per_s_median": statistics.median(speed for run in speeds for speed in run),
        "max_over_min": [max(run) / min(run) for run in speeds],
        "itl_p99_over_p50": max(max(each["itl_p99_over_p50"]) for each in processes),
        "ttft_s_median": statistics.median(t for each in processes for t in each["ttft_s"]),
        "processes": processes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path, default=Path())
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--quantization", default="none,fp8,8bit,4bit")
    parser.add_argument("--processes", type=int, default=3, help="of each tree")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        measured = work(
            options.model, options.quantization, options.runs, options.tokens, options.device
        )
        print(json.dumps(measured))
        return
    if options.before is None or options.out is None:
        parser.error("--before and --out are needed")
    trees = {"before": options.before, "after": options.after}
    rows = []
    for quantization in options.quantization.split(","):
        measured_by: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for turn in range(options.processes):
            # Who goes first alternates too.
            order = list(trees.items())[:: 1 if turn % 2 == 0 else -1]
            for name, tree in order:
                measured_by[name].append(in_tree(tree, options, quantization))
        before, after = (summary(measured_by[name]) for name in trees)
        ratio = after["tok_per_s_median"] / before["tok_per_s_median"]
        rows.append(
            {"quantization": quantization, "ratio": ratio, "before": before, "after": after}
        )
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(
            f"{quantization}: before {before['tok_per_s_median']:.1f} after "
            f"{after['tok_per_s_median']:.1f} ratio {ratio:.4f}, "
            f"max/min {max(after['max_over_min']):.4f}, p99/p50 {after['itl_p99_over_p50']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
