"""Compiles, without a GPU, every kernel that the engine launches on each card; what each needs.

    python tools/kernels_by_card.py FOLDER [--cards 80,86,89,90,120] [--kernels NAME,NAME]
                                    [--processes 2]

Which kernels those are the engine's own plan says (`native.kernel_plan`): decode steps of one
sequence and of rows, steps that check drafts, prompts and pictures, for the models and modes in
`JOBS`. A card that lacks an instruction of a kernel cannot compile it. Writes `kernels.csv` (a line
for each card and kernel: how many kinds of it, the most registers, bytes of shared memory, and
bytes that a thread keeps in memory as its registers are full) and `spilled.jsonl` (those of which a
thread keeps some, whole). Cards that `kernels.csv` has already are kept unless they are named. A
quarter of an hour of two cores for each card. With `--kernels` these alone are compiled, and what
is there of others is kept.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwencli.config import KVDType, Quantization, Speculate
from qwencli.engine.kernels.launches import Gpu, KernelLaunch, compile_for, compile_launch
from qwencli.engine.native.kernel_plan import PlannedModel, plan_kernels
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape

# Multiprocessors of an A100, RTX 3090, RTX 4090, H200, RTX 5090.
PROCESSORS: Mapping[int, int] = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}
HAS_FP8 = 89
COLUMNS = (
    *("card", "kernel", "kinds", "registers", "shared_bytes"),
    *("spilling_kinds", "spilled_bytes"),
)
_DRAFTS = {"speculate": Speculate.AUTO}
# Model, weights, and other modes.
JOBS: Sequence[tuple[str, Quantization, Mapping[str, Any]]] = (
    *(("qwen3-vl-4b", mode, _DRAFTS) for mode in Quantization),
    ("qwen3-vl-4b", Quantization.NONE, {"kv_dtype": KVDType.INT8}),
    ("qwen3-vl-4b", Quantization.NONE, {"kv_dtype": KVDType.FP8}),
    ("qwen3-vl-4b", Quantization.INT4, {"batch_invariant": True}),
    ("qwen3.5-9b", Quantization.NONE, _DRAFTS),
    ("qwen3.5-9b", Quantization.INT4, _DRAFTS),
    ("qwen3.5-35b-a3b", Quantization.INT4, _DRAFTS),
)


@dataclass(frozen=True)
class Need:
    """What a compiled kernel takes of a card."""

    registers: int
    shared_bytes: int
    spilled_bytes: int


def planned(card: int) -> list[KernelLaunch]:
    """All launches on a card, each once."""
    gpu = Gpu((card // 10, card % 10), PROCESSORS[card])
    found: dict[KernelLaunch, None] = {}
    for model, weights, modes in JOBS:
        if Quantization.FP8 in (weights, modes.get("kv_dtype")) and card < HAS_FP8:
            continue
        shape = read_shape(resolve_model(model, offline=True).hub_config)
        found |= dict.fromkeys(
            plan_kernels(PlannedModel(shape, torch.bfloat16, weights, **modes), gpu)
        )
    return list(found)


def need(job: tuple[int, KernelLaunch]) -> Need:
    card, launch = job
    compile_for(Gpu((card // 10, card % 10), PROCESSORS[card]))
    compiled = compile_launch(launch)
    registers, stack = resources(compiled.asm["cubin"])
    return Need(registers, compiled.metadata.shared, stack)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def rows_of(card: int, needs: Mapping[KernelLaunch, Need]) -> Iterator[dict[str, Any]]:
    by_kernel: dict[str, list[Need]] = defaultdict(list)
    for launch, found in needs.items():
        by_kernel[launch.kernel].append(found)
    for kernel, kinds in sorted(by_kernel.items()):
        values = (
            card, kernel, len(kinds), max(each.registers for each in kinds),
            max(each.shared_bytes for each in kinds),
            sum(each.spilled_bytes > 0 for each in kinds),
            max(each.spilled_bytes for each in kinds),
        )  # fmt: skip
        yield dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cards", default="")
    parser.add_argument("--kernels", default="")
    parser.add_argument("--processes", default=2, type=int)
    said = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", ""):
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    table, spills = said.folder / "kernels.csv", said.folder / "spilled.jsonl"
    said.folder.mkdir(parents=True, exist_ok=True)
    kept = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    told = spills.read_text().splitlines() if spills.exists() else []
    cards = [int(each) for each in said.cards.split(",") if each]
    names = {each for each in said.kernels.split(",") if each}
    done = {int(row["card"]) for row in kept} - set(cards)

    def stays(row: Mapping[str, Any]) -> bool:
        return int(row["card"]) in done or bool(names and row["kernel"] not in names)

    rows: list[dict[str, Any]] = [row for row in kept if stays(row)]
    spilled = [line for line in told if stays(json.loads(line))]
    for card in cards or [each for each in PROCESSORS if each not in done]:
        launches = [each for each in planned(card) if not names or each.kernel in names]
        # Others for each card: what a process has compiled it gives again, whatever the card.
        with ProcessPoolExecutor(said.processes) as pool:
            found_in_turn = pool.map(need, [(card, each) for each in launches])
            needs = dict(zip(launches, found_in_turn, strict=True))
        rows += rows_of(card, needs)
        for launch, found in needs.items():
            if found.spilled_bytes:
                about = {"card": card, "kernel": launch.kernel, "bytes": found.spilled_bytes}
                said_of = {n: v for n, v in launch.arguments if isinstance(v, int | str)}
                spilled.append(json.dumps(about | said_of))
        rows.sort(key=lambda row: (int(row["card"]), row["kernel"]))
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        spills.write_text("".join(f"{line}\n" for line in spilled))
        print(f"{card}: {len(launches)} kinds of kernels", flush=True)


if __name__ == "__main__":
    main()
