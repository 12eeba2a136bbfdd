"""Campaigns made of numbers, for tests that compare two."""

from __future__ import annotations

import json
from pathlib import Path

from qwencli.bench.compare.sides import Side, side
from qwencli.bench.plan.matrix import BenchCell
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import write_rows
from qwencli.config import Attention, Cache, EngineName, LoadMode, Quantization

ENVIRONMENT = {
    "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    "device": {"device": "cuda:0", "name": "NVIDIA GeForce RTX 5090", "driver": "580.1"},
    "cpu": {"model": "a CPU", "logical_cores": 16},
    "os": {"release": "6.1"},
    "seed": 0,
}
PLAN = {
    "format": 1,
    "seed": 0,
    "max_new_tokens": 64,
    "prompt": "Describe this image.",
    "images": [{"name": "scene.png", "sha256": "8260cc42a8c2"}],
    "device": "cuda:0",
    "dtype": "auto",
    "load_format": "auto",
}


def cell(model="steady", attention=Attention.SDPA, cache=Cache.DYNAMIC):
    return BenchCell(
        model, EngineName.NATIVE, Quantization.NONE, attention, cache, LoadMode.KEEP, None
    )


def documents(speeds, environment=(), plan=(), **run):
    """Plan, environment and run rows.

    `speeds` maps cells to their runs, to lists of them by process, or to a status.
    """
    runs = []
    for one, values in speeds.items():
        common = {
            "cell_id": one.cell_id, "reason": None, "num_prompt_tokens": 70,
            "num_image_tokens": 60, "num_new_tokens": 64, "ran_attention": str(one.attention),
            "ran_quantization": "none", "ran_cache": str(one.cache), "text_sha256": "aa", **run,
        }  # fmt: skip
        if isinstance(values, str):
            runs.append({"cell_id": one.cell_id, "status": values, "reason": "no memory"})
            continue
        number = 0
        for process in values if isinstance(values[0], list) else [values]:
            runs.append({**common, "run": 0, "status": "warmup", "decode_tok_per_s": 1.0})
            for value in process:
                number += 1
                row = {"run": number, "status": "ok", "decode_tok_per_s": value}
                runs.append({**common, **row})
    cells = [{"cell_id": one.cell_id, **one.axes(), "skip_reason": None} for one in speeds]
    count = max((len(v) for v in speeds.values() if not isinstance(v, str)), default=1)
    return (
        {**PLAN, "runs": count, "cells": cells, **dict(plan)},
        {**ENVIRONMENT, **dict(environment)},
        runs,
    )


def make_side(speeds, name="A", **changes) -> Side:
    plan, environment, runs = documents(speeds, **changes)
    text = [{c: "" if r.get(c) is None else str(r[c]) for c in columns.RUNS} for r in runs]
    return side(name, plan, environment, text)


def write_campaign(folder: Path, speeds, **changes) -> Path:
    plan, environment, runs = documents(speeds, **changes)
    folder.mkdir()
    for name, document in (("plan", plan), ("environment", environment)):
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    write_rows(folder / "runs.csv", columns.RUNS, runs)
    return folder
