"""Writes the tables and the picture of README.md and of the pages below from the files in results/;
`--check` fails when they are stale.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import campaigns
import findings
import predictions
from plots import speed_plot
from step_results import newest_steps

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "measurements.md", ROOT / "docs" / "scenes.md")
PICTURE = ROOT / "docs" / "images" / "speed.svg"
EXAMPLE = ROOT / "examples" / "scene.png"
RESULTS = campaigns.RESULTS
# Plain operators on the CPU round the weights alone; the kernels of a GPU round vectors too.
QUALITY = ("2026-11-24-quality-cpu", "2026-11-25-h100-quality")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Engines beside this one, as people write them.
OTHERS = {"vllm": "vLLM", "transformers": "transformers"}


def source(folder: str) -> str:
    """Where a campaign's figures come from: device, versions, model, work, folder."""
    read = json.loads((RESULTS / folder / "environment.json").read_text(encoding="utf-8"))
    said = read["command_line"]
    plan = json.loads((RESULTS / folder / "plan.json").read_text(encoding="utf-8"))
    versions = read["versions"]
    weights = ", random weights" if "dummy" in said else ""
    return (
        f"{read['device']['name']}, {said[said.index('--model') + 1]}{weights}, "
        f"{plan['max_new_tokens']} new tokens, batch 1, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, bitsandbytes {versions['bitsandbytes']}. "
        f"From `results/{folder}/cells.csv`."
    )


def cells_of(folder: str) -> list[dict[str, str]]:
    """The cells that ran, the fastest first."""
    with (RESULTS / folder / "cells.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for cell in csv.DictReader(file) if cell["status"] == "ok"]
    return sorted(cells, key=lambda cell: -float(cell["decode_tok_per_s_median"]))


def kernels(cell: dict[str, str]) -> str:
    """What computes a decode step."""
    ours = {"native auto": "fused", "native torch": "torch operators"}
    return ours.get(f"{cell['engine']} {cell['kernels']}", "its own")


def speed_table(folder: str) -> str:
    """The cells that ran of a campaign of both engines, the fastest first."""
    rows = [
        [
            cell["engine"],
            cell["quantization"],
            cell["attention"],
            cell["cache"],
            kernels(cell),
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
        for cell in cells_of(folder)
    ]
    header = ["engine", "weights", "attention", "cache", "kernels", "load", "runs", "decode tok/s"]
    header += ["slowest-fastest run", "ratio", "TTFT ms", "ITL p50 ms", "p99 ms", "max ms"]
    return f"{markdown([*header, 'peak GB'], rows)}\n\n{source(folder)}"


def newest(kind: str) -> str:
    """The folder's name of the newest campaign of a GPU that ends in `-kind`."""
    folder = campaigns.newest_of_gpu(kind)
    assert folder is not None, f"results/ has a campaign *-{kind}"
    return folder.name


def short_speed_table() -> str:
    """The same of the campaign that the picture shows, with the columns that a user asks for."""
    folder = newest("context-512")
    rows = [
        [
            cell["engine"],
            cell["quantization"],
            cell["cache"],
            kernels(cell),
            cell["runs"],
            f"{float(cell['decode_tok_per_s_median']):.0f}",
            f"{float(cell['run_ratio_max_min']):.3f}",
            f"{1e3 * float(cell['ttft_s_median']):.0f}",
            f"{float(cell['itl_p99_ms']):.2f}",
            f"{float(cell['peak_allocated_bytes']) / 1e9:.1f}",
        ]
        for cell in cells_of(folder)
    ]
    header = ["engine", "weights", "cache", "kernels", "runs", "decode tok/s"]
    header += ["fastest / slowest run", "first token, ms", "99% of tokens within, ms", "peak GB"]
    return f"{markdown(header, rows)}\n\n{source(folder)}"


def folder_speed() -> str:
    """Captions a second of a folder, and tokens a second of many sequences, by engine: medians of
    what one campaign ran side by side."""
    folder = sorted(RESULTS.glob("*-side-by-side"))[-1]
    found: dict[str, list[Any]] = {}
    for row in read_json(folder / "batches.json"):
        found.setdefault(row["engine"], []).append(row)
    names = {"native": "bf16", "native-fp8": "fp8", "native-4bit": "4bit"}
    counts = ("8", "32", "128", "256")
    rows = []
    for engine in (*names, "vllm", "transformers"):
        own = found[engine]
        rates = [rate for row in own for rate in row["captions_per_s"]]
        first = statistics.median(row["first_token_s"]["median"] for row in own)
        speeds = [
            [speed for row in own for speed in row["rows"].get(count, ())] for count in counts
        ]
        rows.append(
            [f"qwencli, {names[engine]}" if engine in names else f"{OTHERS[engine]}, bf16"]
            + [f"{statistics.median(rates):.0f}", f"{min(rates):.0f}-{max(rates):.0f}"]
            + [f"{1e3 * first:.0f}"]
            + [f"{statistics.median(each):,.0f}" if each else "-" for each in speeds]
        )
    header = ["engine", "captions/s", "slowest-fastest run", "first token, ms"]
    header += [f"tok/s of {count}" for count in counts]
    last = found["vllm"][-1]
    return (
        f"{markdown(header, rows)}\n\n{last['gpu']}, qwen3-vl-4b, random weights, torch "
        f"{last['versions']['torch']}, transformers {last['versions']['transformers']}, vLLM "
        f"{last['versions']['vllm']}: 500 pictures of 512x512, none known from before, 64 tokens "
        f"each; sequences with 300 tokens in front. From `results/{folder.name}/batches.json`."
    )


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def one_sequence(folder: Path) -> dict[str, float]:
    """Decode tok/s of one sequence by engine and weights, the slowest first."""
    found: dict[str, list[float]] = {}
    for row in read_json(folder / "batches.json"):
        if not row["engine"].startswith("native"):
            name = OTHERS[row["engine"]]
            found.setdefault(f"{name}, bf16", []).extend(row["rows"]["1"])
    names = {"none": "bf16", "bf16": "bf16", "4bit": "4-bit", "q4_0": "4-bit"}
    for path in sorted(folder.glob("*/cells.csv")):
        for cell in cells_of(str(path.parent.relative_to(RESULTS))):
            if cell["quantization"] in names:
                engine = {"native": "qwencli"}.get(cell["engine"], cell["engine"])
                speed = float(cell["decode_tok_per_s_median"])
                found[f"{engine}, {names[cell['quantization']]}"] = [speed]
    speeds = {name: statistics.median(values) for name, values in found.items()}
    return dict(sorted(speeds.items(), key=lambda named: named[1]))


def picture() -> str:
    """A caption, and a bar for each way to run one model on one GPU."""
    folder = sorted(RESULTS.glob("*-side-by-side"))[-1]
    speeds = one_sequence(folder)
    bars = [(name, speed, name.startswith("qwencli")) for name, speed in speeds.items()]
    expected = json.loads((EXAMPLE.parent / "expected.json").read_text(encoding="utf-8"))
    caption = expected["captions"][EXAMPLE.name]
    versions = read_json(folder / "batches.json")[-1]["versions"]
    about = (
        f"NVIDIA H200, qwen3-vl-4b, random weights, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, vLLM {versions['vllm']}."
    )
    return speed_plot(EXAMPLE.read_bytes(), caption, bars, about)


def your_gpu() -> str:
    """Predicted speeds by GPU, model and weights, with their range."""
    steps = [s for s in newest_steps(RESULTS) if s.context == 512 and s.kv_dtype == "auto"]
    serial, spread = predictions.serial_us(ROOT), predictions.shares(ROOT)
    modes = {"none": "bf16", "8bit": "8bit", "fp8": "fp8", "4bit": "4bit"}
    rows = []
    for gpu in predictions.PREDICTED:
        for model in dict.fromkeys(step.model for step in steps):
            of_model = {step.quantization: step for step in steps if step.model == model}
            figures = []
            for mode in modes:
                expected, least, most = predictions.speeds(of_model[mode], gpu, serial, spread)
                figures.append(f"{expected:.0f} ({least:.0f}-{most:.0f})")
            rows.append([gpu.name.removeprefix("GeForce "), model, *figures])
    folders = ", ".join(sorted({f"`results/{step.folder}/`" for step in steps}))
    note = f"Predicted tok/s (range) at a context of 512, from steps on an H200 in {folders}."
    return f"{markdown(['GPU', 'model', *modes.values()], rows)}\n\n{note}"


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
    "speed": short_speed_table,
    "folder": folder_speed,
    "your-gpu": your_gpu,
    "engines": lambda: speed_table(newest("engines")),
    "context-512": lambda: speed_table(newest("context-512")),
    "modes": lambda: speed_table(newest("modes")),
    "scenes-quality": scenes_quality,
    "quantization-quality": quantization_quality,
}


def render(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def files() -> dict[Path, str]:
    """What is to be written where."""
    pages = {page: render(page.read_text(encoding="utf-8")) for page in PAGES}
    return {**pages, PICTURE: picture()}


def write_or_check(pages: Mapping[Path, str]) -> None:
    """Write the pages that are stale; with `--check` exit with a line that names the first."""
    for path, fresh in pages.items():
        if path.exists() and path.read_text(encoding="utf-8") == fresh:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{path.relative_to(ROOT)} is stale: run make docs")
        path.write_text(fresh, encoding="utf-8")


def main() -> None:
    write_or_check(files())


if __name__ == "__main__":
    main()
