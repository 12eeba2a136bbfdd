"""Writes the tables of README.md from the files in results/; `--check` fails when they are stale.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import campaigns
import findings

from qwencli.bench.studies import origin_tables
from qwencli.bench.studies.evidence import Evidence
from qwencli.bench.studies.origin_tables import Table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = campaigns.RESULTS
# Plain operators on the CPU round the weights alone; the kernels of a GPU round vectors too.
QUALITY = ("2026-11-24-quality-cpu", "2026-11-25-h100-quality")
# The two engines at equal work, minutes apart: (folder, engine).
H200_ENGINES = ("2026-11-23-h200-native", "2026-11-23-h200-native-beside")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(*folders: str) -> str:
    """Where campaigns' figures come from: device, versions, model, work, folders."""
    read = json.loads((RESULTS / folders[0] / "environment.json").read_text(encoding="utf-8"))
    said = read["command_line"]
    plan = json.loads((RESULTS / folders[0] / "plan.json").read_text(encoding="utf-8"))
    versions = read["versions"]
    weights = ", random weights" if "dummy" in said else ""
    return (
        f"{read['device']['name']}, {said[said.index('--model') + 1]}{weights}, "
        f"{plan['max_new_tokens']} new tokens, batch 1, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, bitsandbytes {versions['bitsandbytes']}. "
        f"From {' and '.join(f'`results/{folder}/cells.csv`' for folder in folders)}."
    )


def cells_of(folder: str) -> list[dict[str, str]]:
    """The cells that ran, the fastest first."""
    with (RESULTS / folder / "cells.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for cell in csv.DictReader(file) if cell["status"] == "ok"]
    return sorted(cells, key=lambda cell: -float(cell["decode_tok_per_s_median"]))


def engine_folders() -> tuple[str, ...]:
    """The newest campaign of a GPU with both engines in it; else the two beside each other."""
    newest = campaigns.newest_of_gpu("engines")
    return H200_ENGINES if newest is None else (newest.name,)


def speed_table(folders: Sequence[str]) -> str:
    """The cells that ran of campaigns of both engines, the fastest first."""
    rows = [
        [
            cell["engine"],
            cell["quantization"],
            cell["attention"],
            cell["cache"],
            {"native auto": "fused kernels", "native torch": "torch operators"}.get(
                f"{cell['engine']} {cell['kernels']}", "its own"
            ),
            cell["load_mode"],
            cell["runs"],
            f"{float(cell['decode_tok_per_s_median']):.1f}",
            f"{float(cell['decode_tok_per_s_min']):.1f}-{float(cell['decode_tok_per_s_max']):.1f}",
            f"{float(cell['run_ratio_max_min']):.3f}",
            f"{1e3 * float(cell['ttft_s_median']):.0f}",
            f"{float(cell['itl_p50_ms']):.2f}",
            f"{float(cell['itl_p99_ms']):.2f}",
            f"{float(cell['itl_max_ms']):.2f}",
            f"{float(cell['peak_allocated_bytes']) / 1e9:.1f}",
        ]
        for folder in folders
        for cell in cells_of(folder)
    ]
    header = ["engine", "weights", "attention", "cache", "operations", "model", "runs", "tok/s"]
    header += ["slowest-fastest run", "ratio", "TTFT ms", "ITL p50 ms", "p99 ms", "max ms"]
    return f"{markdown([*header, 'peak GB'], rows)}\n\n{source(*folders)}"


def engines() -> str:
    folders = engine_folders()
    how = (
        "All cells in one campaign, in shuffled order."
        if len(folders) == 1
        else "The two folders were measured minutes apart, not interleaved."
    )
    return f"{speed_table(folders)} {how}"


def newest_speed_table(kind: str) -> str:
    """Of the newest campaign of a GPU whose folder ends in `-kind`."""
    folder = campaigns.newest_of_gpu(kind)
    assert folder is not None, f"results/ has a campaign *-{kind}"
    return speed_table([folder.name])


def scenes_quality() -> str:
    path = RESULTS / "scenes-training" / "evaluation.json.gz"
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    exact = found["exact_caption_percent"]
    rows = [
        ["detailed caption, every word", f"{exact['long']:.1f}"],
        ["short caption", f"{exact['short']:.1f}"],
        ["tags", f"{exact['tags']:.1f}"],
        ["colour and shape of each object", f"{found['phrase_percent_of_objects']:.1f}"],
    ]
    note = f"{found['scenes']} held-out scenes. From `results/scenes-training/evaluation.json.gz`."
    return f"{markdown(['exactly right', '%'], rows)}\n\n{note}"


def factors_plot() -> str:
    """What each factor costs, of the first study: a GPU's where there is one."""
    evidence = findings.studies()[0]
    path = f"docs/findings/effects-{evidence.folder.name}.svg"
    return f"![time with each factor over time without it]({path})\n\n{findings.source(evidence)}"


def of_study(table: Callable[[Evidence], Table]) -> str:
    """A table of the first study."""
    evidence = findings.studies()[0]
    head, rows = table(evidence)
    return f"{markdown(list(head), rows)}\n\n{findings.source(evidence)}"


def quantization_quality() -> str:
    rows, notes = [], []
    for folder in QUALITY:
        about = json.loads((RESULTS / folder / "environment.json").read_text(encoding="utf-8"))
        with (RESULTS / folder / "quality.csv").open(encoding="utf-8", newline="") as file:
            modes = list(csv.DictReader(file))
        rows += [
            [
                about["device"],
                mode["engine"],
                mode["scheme"],
                f"{float(mode['exact_percent']):.1f}",
                f"{float(mode['lost_points']):.1f}",
                f"{float(mode['mean_kl']):.1e}",
                f"{float(mode['same_token_percent']):.2f}",
                f"{float(mode['weight_error_percent']):.2f}"
                if mode["weight_error_percent"]
                else "",
            ]
            for mode in modes
        ]
        notes.append(
            f"{about['device']}: {modes[0]['scenes']} scenes, KL in nats over "
            f"{modes[0]['kl_tokens']} tokens, torch {about['torch']}, "
            f"`results/{folder}/quality.csv`"
        )
    header = ["device", "engine", "scheme", "exact captions %", "points lost", "KL a token"]
    header += ["same likeliest token %", "weight error %"]
    note = f"Each against native without quantization on the same device. {'; '.join(notes)}."
    return f"{markdown(header, rows)}\n\n{note}"


TABLES: dict[str, Callable[[], str]] = {
    "factors": factors_plot,
    "origin-modes": lambda: of_study(origin_tables.mode_table),
    "steadiness": lambda: of_study(
        lambda e: origin_tables.steadiness_table(origin_tables.series(e))
    ),
    "engines": engines,
    "context-512": lambda: newest_speed_table("context-512"),
    "modes": lambda: newest_speed_table("modes"),
    "scenes-quality": scenes_quality,
    "quantization-quality": quantization_quality,
}


def render(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if "--check" in sys.argv:
        if fresh != text:
            sys.exit("the tables of README.md are stale: run make docs")
        return
    README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
