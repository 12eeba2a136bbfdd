"""Campaigns of any size, made up: the rows and documents that a finished one has."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

from qwencli.bench.report.cell_statistics import cell_rows
from qwencli.bench.storage import columns

MODES = {
    "quantization": ("none", "8bit", "4bit", "fp8"),
    "attention": ("sdpa", "eager", "flash_attention_2"),
    "cache": ("dynamic", "static", "static-compile", "static-graph"),
    "load_mode": ("keep", "reload"),
    "kernels": ("auto",),
    "kv_dtype": ("auto",),
    "speculate": ("off",),
    "model": ("qwen3-vl-4b", "qwen2.5-vl-7b"),
}
ENVIRONMENT = {
    "versions": {"qwencli": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0", "triton": None},
    "device": {
        "device": "cuda:0",
        "name": "NVIDIA GeForce RTX 5090",
        "driver": "580.1",
        "total_memory_bytes": 32 << 30,
        "capability": [12, 0],
    },
    "cpu": {"model": "a CPU", "logical_cores": 16},
    "command_line": ["qwencli", "bench", "--matrix", "full"],
    "seed": 3,
}

Row = dict[str, str]


@dataclass
class Made:
    plan: dict[str, Any]
    runs: list[Row] = field(default_factory=list)
    tokens: list[Row] = field(default_factory=list)
    gpu: list[Row] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What cells.csv holds."""
        return cell_rows(self.plan, self.runs, self.tokens)


def campaign(cells: int, runs: int, tokens: int, *, skipped: int = 0, seed: int = 0) -> Made:
    """A warm-up and `runs` runs of each cell; the last `skipped` cells of the plan did not run."""
    names = itertools.islice(itertools.product(*MODES.values()), cells)
    plan_cells = [
        {
            "cell_id": f"cell-{number}",
            "engine": "transformers",
            **dict(zip(MODES, values, strict=True)),
        }
        for number, values in enumerate(names)
    ]
    made = Made(
        {
            "runs": runs,
            "max_new_tokens": tokens,
            "prompt": "Describe this image.",
            "images": [{"name": "scene.png", "sha256": "00"}],
            "device": "cuda:0",
            "dtype": "auto",
            "load_format": "dummy",
            "cells": plan_cells,
        }
    )
    chance, clock = random.Random(seed), 100.0
    for number, cell in enumerate(plan_cells):
        if number >= cells - skipped:
            reason = "flash-attn is not installed"
            made.runs.append(_row(cell_id=cell["cell_id"], status="skipped", reason=reason))
            continue
        pace = chance.uniform(5, 40)
        for run in range(runs + 1):
            clock = _run(made, cell, run, tokens, pace * (3 if run == 0 else 1), clock, chance)
    return made


def _run(
    made: Made,
    cell: Row,
    run: int,
    tokens: int,
    pace_ms: float,
    clock: float,
    chance: random.Random,
) -> float:
    key = {"cell_id": cell["cell_id"], "run": str(run)}
    pace = pace_ms * chance.gauss(1, 0.03)
    start, ttft = clock + 0.1, 0.08 * chance.uniform(0.9, 1.2)
    at, total = start + ttft, 0.0
    for index in range(tokens):
        itl = pace * math.exp(chance.gauss(0, 0.04)) * (6 if chance.random() < 0.004 else 1)
        itl = itl if index else 0.0
        at, total = at + itl / 1e3, total + itl / 1e3
        made.tokens.append(
            {
                **key,
                "token_index": str(index),
                "token_id": "7",
                "t_s": f"{at:.9f}",
                "itl_ms": f"{itl:.9f}" if index else "",
                "gpu_ms": "",
            }
        )
    moment = start
    while moment < at:
        held = chance.random() < 0.05
        made.gpu.append(
            {
                **dict.fromkeys(columns.GPU, ""),
                **key,
                "t_s": f"{moment:.9f}",
                "gpu_index": "0",
                "sm_clock_mhz": str(2407 if held else 2820),
                "power_w": f"{chance.gauss(410, 12):.3f}",
                "throttle_reasons": "sw_power_cap" if held else "none",
            }
        )
        moment += 0.05
    figures = {
        "num_new_tokens": tokens,
        "preprocess_s": 0.01,
        "vision_encode_s": 0.02,
        "prefill_s": 0.04,
        "ttft_s": ttft,
        "decode_s": total,
        "e2e_s": ttft + total,
        "decode_tok_per_s": (tokens - 1) / total,
        "itl_p50_ms": pace,
        "itl_p99_ms": pace * 2,
        "itl_max_ms": pace * 6,
        "peak_allocated_bytes": 8 << 30,
    }
    made.runs.append(
        _row(
            **key,
            status="ok" if run else "warmup",
            throttle_reasons="sw_power_cap",
            ran_attention=cell["attention"],
            ran_cache=cell["cache"],
            text_sha256="aa",
            **{name: str(value) for name, value in figures.items()},
        )
    )
    return at


def _row(**values: str) -> Row:
    return {**dict.fromkeys(columns.RUNS, ""), **values}
