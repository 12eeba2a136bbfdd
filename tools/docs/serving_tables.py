"""Tables of what was measured of loads, folders and servers, for `experiment_tables`."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_tables import WEIGHTS, read, weights
from readme_tables import ROOT, markdown


def comfyui_interference(files: Sequence[Path]) -> str:
    """Of `benchmarks/comfyui_interference.py`: executions.csv."""
    with files[0].open(encoding="utf-8", newline="") as file:
        executions = list(csv.DictReader(file))
    rows = []
    for place in ("in-process", "resident"):
        for disturbed_by in ("idle", "gpu", "prompt"):
            ran = [
                each
                for each in executions
                if (each["place"], each["disturbed_by"]) == (place, disturbed_by)
            ]
            speeds = [float(each["decode_tok_per_s"]) for each in ran]
            first_ms = [1e3 * float(each["ttft_s"]) for each in ran]
            rows.append(
                [
                    {"in-process": "in ComfyUI's process"}.get(place, place),
                    {
                        "idle": "nothing",
                        "gpu": "small kernels on the GPU",
                        "prompt": "a prompt queued in Python",
                    }[disturbed_by],
                    *(
                        f"{each:.1f}"
                        for each in (statistics.median(speeds), min(speeds), max(speeds))
                    ),
                    f"{max(speeds) / min(speeds):.3f}",
                    f"{statistics.median(first_ms):.1f}",
                    f"{max(first_ms):.1f}",
                ]
            )
    header = ["engine", "beside it", "tok/s, median", "slowest", "fastest", "fastest / slowest"]
    return markdown([*header, "first token, ms, median", "latest"], rows)


def load_time(files: Sequence[Path]) -> str:
    """Of `benchmarks/load_time.py`: medians, in seconds."""
    columns = {
        "load_s": 2, "first_token_s": 2, "new_size_s": 3, "request_over_s": 2, "process_s": 1,
    }  # fmt: skip
    rows = []
    for name, row in read(files[0])["summary"].items():
        kind, _, cache = name.partition(", ")
        label = {"floor": "torch and a CUDA context alone", "transformers": "transformers, bf16"}
        kept = {"empty cache": "nothing kept", "filled cache": "kept"}
        shown = label.get(kind) or f"{WEIGHTS.get(kind, kind)}, {kept[cache]}"
        rows.append(
            [
                shown,
                *(
                    f"{row[key]:.{digits}f}" if key in row else ""
                    for key, digits in columns.items()
                ),
            ]
        )
    return markdown(["", "load", "first token", "new size", "request", "process"], rows)


def scenes_evaluation(files: Sequence[Path]) -> str:
    """Of `tools/scenes/evaluate.py`: one file after each training run."""
    kinds = ("long", "short", "tags")
    rows = []
    for number, file in enumerate(files, start=1):
        found = read(file)
        exact = [f"{found['exact_caption_percent'][kind]:.1f}" for kind in kinds]
        rows.append([str(number), *exact, f"{found['phrase_percent_of_objects']:.1f}"])
    head = ["held-out captions exact, %, after run", *kinds, "phrases of objects"]
    return markdown(head, rows)


def planted_disturbances(files: Sequence[Path]) -> str:
    """Of `benchmarks/planted_disturbances.py`: how many cells of each kind were told."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.planted_disturbances import RIGHT

    kinds = {
        "all_cores": "a program for each processor",
        "one_core": "one program, tied to a processor",
        "cpu_limit": "a control group's limit of 20% of a processor",
        "stopped": "stopped for 80 of every 100 ms",
        "copier": "a program that copies memory",
        "power": "a power limit that holds clocks to three quarters",
        "quiet": "nothing",
    }
    cells = [cell for file in files for cell in read(file)]
    rows = []
    for kind, name in kinds.items():
        of_kind = [cell for cell in cells if cell["kind"] == kind and cell["verdict"]]
        if not of_kind:
            continue
        verdicts = [cell["verdict"].split(":")[0] for cell in of_kind]
        counts = [f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts))]
        right = RIGHT.get(kind, ())
        named = sum(any(cause in right for cause in cell["causes"]) for cell in of_kind)
        rows.append([name, str(len(of_kind)), ", ".join(counts), str(named) if right else "-"])
    return markdown(["beside the cells", "cells", "called", "cause named"], rows)


def warm_caption(files: Sequence[Path]) -> str:
    """Of `benchmarks/warm_caption.py`, before and after."""
    calls = {
        "python": "`python -c pass`", "version": "`qwencli --version`", "help": "`qwencli --help`",
        "warm": "`qwencli caption` of one picture, model kept loaded",
    }  # fmt: skip
    rows = [[name] for name in calls.values()]
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            runs = list(csv.DictReader(file))
        for row, what in zip(rows, calls, strict=True):
            own = [each for each in runs if each["what"] == what]
            wall = [float(each["wall_s"]) * 1e3 for each in own]
            busy = [(float(each["user_s"]) + float(each["system_s"])) * 1e3 for each in own]
            row += [f"{statistics.median(wall):.0f} ({min(wall):.0f})"]
            row += [f"{statistics.median(busy):.0f} ({min(busy):.0f})"]
    kinds = [f"{path.stem}, {what}" for path in files for what in ("wall", "processor")]
    return markdown(["ms, median (least)", *kinds], rows)


def serve_soak(files: Sequence[Path]) -> str:
    """Of `benchmarks/serve_load.py --soak-minutes`: what is held after each round. Of the process
    that speaks HTTP, where it is one of its own."""
    told = read(files[0])["rough"]
    head = ["s", "requests that run", "KV pages in use", "file handles", "threads", "memory, MB"]
    kinds = [""]
    if "http_host_bytes" in told["before"]:
        kinds.append("http_")
        head += [f"HTTP: {each}" for each in head[3:]]
    rows = []
    for row in (told["before"], *told["rounds"]):
        cells = [f"{row['s']:.0f}" if "s" in row else "before"]
        cells += [str(row[key]) for key in ("unfinished", "kv_pages")]
        for kind in kinds:
            cells += [str(row[f"{kind}handles"]), str(row[f"{kind}threads"])]
            cells.append(f"{row[f'{kind}host_bytes'] / 1e6:.1f}")
        rows.append(cells)
    return markdown(head, rows)


def serve_answers(files: Sequence[Path]) -> str:
    """Of `benchmarks/serve_load.py --rough`: what became of requests of each manner."""
    kinds = {
        "whole": "whole answers", "stream": "streams", "slow": "streams, read slowly",
        "cut off": "streams, cut off by the client", "malformed": "malformed bodies",
        "dropped": "dropped before the body was there",
    }  # fmt: skip
    answers = read(files[0])["rough"]["answers"]
    rows = []
    for kind, name in kinds.items():
        found = {k.split(": ")[1]: n for k, n in answers.items() if k.startswith(f"{kind}: ")}
        met = ", ".join(f"{n} with {answer}" for answer, n in found.items() if answer != kind)
        rows.append([name, str(sum(found.values())), met or "-"])
    return markdown(["manner", "requests", "answered"], rows)


def serve_speed(files: Sequence[Path]) -> str:
    """Of `benchmarks/serve_load.py`: one file after each change."""
    rows = []
    for file in files:
        found = read(file)
        for clients, row in found["served"].items():
            own = found["generate_many"][clients]["tok_per_s"]
            first = f"{1e3 * row['ttft_s_p50']:.0f}"
            shares = f"{row['tok_per_s']:,.0f}", f"{own:,.0f}", f"{row['tok_per_s'] / own:.3f}"
            rows.append([file.stem.removeprefix("serve-"), clients, *shares, first])
    head = ["file", "clients", "tok/s", "generate_many", "ratio", "first token, ms"]
    return markdown(head, rows)


def caption_folder(files: Sequence[Path]) -> str:
    """Of `benchmarks/caption_folder.py`."""
    lines = [json.loads(line) for line in files[0].read_text().splitlines() if line[:1] == "{"]
    rows = [
        [each["way"], f"{each['captions_per_s']:.1f}", f"{each['gpu_percent']:.0f}"]
        for each in lines
        if "way" in each
    ]
    return markdown(["way", "captions/s", "GPU busy, %"], rows)


def listing(files: Sequence[Path]) -> str:
    """Of `benchmarks/large_sets.py listing`: a line for each round."""
    columns = ("listing_s", "resume_check_s", "both_s", "both_cpu_s", "command_s")
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    rows = [[f"{each['files']:,}", *(f"{each[key]:.1f}" for key in columns)] for each in lines]
    head = ["files", "listing, s", "check, s", "both, s", "of a core", "`--dry-run`, s"]
    return markdown(head, rows)


def warm_up(files: Sequence[Path]) -> str:
    """Of a load with and without a warm-up beside it, in turns."""
    columns = ("load_s", "first_token_s", "request_over_s")
    rows = [
        [
            "yes" if row["warm_up"] else "no",
            "kept" if row["kept"] else "none kept",
            *(f"{row[key]:.2f}" for key in columns),
        ]
        for row in read(files[0])["rows"]
    ]
    return markdown(["warm-up", "kernels", "load", "first token", "request"], rows)


def warm_up_begins(files: Sequence[Path]) -> str:
    """Of loads whose warm-up begins at another moment, in turns, and of what stood beside them."""
    found: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in read(files[0]):
        kept = {"kept": "kept", "first": "none kept"}.get(row["note"], "")
        what = row["warm_up"] if row["kind"] == "native" else row["kind"]
        key = what, weights(row) if row["kind"] != "floor" else "", kept, row["tokenizer"]
        found.setdefault(key, []).append(row)
    columns = ("load_s", "first_token_s", "process_s")
    rows = [
        [*key, str(len(own)), *(_median_of(own, column, ".2f") for column in columns)]
        for key, own in found.items()
    ]
    head = ["warm-up", "weights", "kernels", "tokenizer", "processes"]
    return markdown([*head, "load, s", "first token, s", "process, s"], rows)


def load_in_turns(files: Sequence[Path]) -> str:
    """Of processes of `benchmarks/load_time.py - --kind native`, of two trees in turns."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in read(files[0]):
        key = tuple(row[name] for name in ("host", "weights", "kernels", "tree"))
        found.setdefault(key, []).append(row)
    rows = []
    for key, own in sorted(found.items()):
        loads = sorted(row["load_s"] for row in own)
        span = f"{loads[0]:.2f} to {loads[-1]:.2f}"
        medians = (_median_of(own, column, ".2f") for column in ("load_s", "first_token_s"))
        rows.append([*key, str(len(own)), *medians, span])
    head = ["host", "weights", "kernels", "", "processes", "load, s", "first token, s", "loads, s"]
    return markdown(head, rows)


def servers(files: Sequence[Path]) -> str:
    """Of `benchmarks/serve_load.py`, of this server and another, by number of clients."""
    names = {"own": "qwencli serve", "vllm": "vLLM"}
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for name, document in read(files[0]).items():
        for clients, row in document["served"].items():
            found.setdefault((int(clients), names[name.partition("-")[0]]), []).append(row)
    rows = []
    for (clients, name), own in sorted(found.items()):
        milliseconds = (
            f"{1e3 * statistics.median(row[column] for row in own):.0f}"
            for column in ("ttft_s_p50", "ttft_s_p99")
        )
        speeds = " and ".join(f"{row['tok_per_s']:,.0f}" for row in own)
        gaps = (_median_of(own, f"event_gap_ms_{p}", ".1f") for p in ("p50", "p99"))
        rows.append([str(clients), name, speeds, *milliseconds, *gaps])
    head = ["clients", "server", "tok/s, two rounds", "first token, ms", "p99"]
    return markdown([*head, "between events, ms", "p99"], rows)


def _median_of(rows: Sequence[dict[str, Any]], column: str, spec: str) -> str:
    values = [row[column] for row in rows if column in row]
    return format(statistics.median(values), spec) if values else ""


def served_turns(files: Sequence[Path]) -> str:
    """Of `benchmarks/serve_load.py` with turns of several lengths: 128 clients."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read(files[0])["rows"]:
        if row["clients"] == 128:
            row["ratio"] = row["tok_per_s"] / row["generate_many_tok_per_s"]
            found.setdefault((row["host"], row["interpreter_turns"]), []).append(row)
    rows = []
    for (host, turns), own in sorted(found.items()):
        ratios = sorted(row["ratio"] for row in own)
        span = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        speeds = (_median_of(own, f"{name}tok_per_s", ",.0f") for name in ("", "generate_many_"))
        rows.append([host, turns, str(len(own)), *speeds, _median_of(own, "ratio", ".3f"), span])
    head = ["host", "turns", "processes", "tok/s", "generate_many", "ratio", "span"]
    return markdown(head, rows)


def request_cost(files: Sequence[Path]) -> str:
    """Of `benchmarks/request_cost.py`: two trees in turns."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in read(files[0])["rows"]:
        found.setdefault((row["tokens"], row["tree"]), []).extend(row["rounds"])
    rows = []
    for tokens in sorted({tokens for tokens, _ in found}, reverse=True):
        for thread in ("event loop", "prepare", "engine"):
            sides = []
            for tree in ("before", "after"):
                taken = sorted(each["us_a_request"][thread] for each in found[tokens, tree])
                sides.append((statistics.median(taken), f"{taken[0]:,} to {taken[-1]:,}"))
            (before, spread), (after, later) = sides
            figures = f"{before:,.0f}", spread, f"{after:,.0f}", later, f"{after / before:.2f}"
            rows.append([str(tokens), thread, *figures])
    return markdown(["tokens", "thread", "before, us", "span", "after, us", "span", "ratio"], rows)


def _tail_over_median(row: Mapping[str, str]) -> str:
    tail, median = row["itl_p99_ms"], row["itl_p50_ms"]
    return f"{float(tail) / float(median):.3f}" if tail and median else "-"


def cells(files: Sequence[Path]) -> str:
    """Of campaigns: cells.csv."""
    rows = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                if row["decode_tok_per_s_median"]:
                    kernels = {"triton": ", kernels of our own", "torch": ", operators"}
                    cache = row["cache"] + kernels.get(row.get("kernels") or "", "")
                    mode = row["engine"], weights(row), row["attention"], cache
                    figures = (
                        f"{float(row['decode_tok_per_s_median']):.1f}",
                        f"{float(row['run_ratio_max_min']):.3f}",
                        _tail_over_median(row),
                    )
                    first = row["ttft_s_median"]
                    rows.append([*mode, *figures, f"{1e3 * float(first):.0f}" if first else "-"])
    rows.sort(key=lambda row: -float(row[4]))
    head = ["engine", "weights", "attention", "cache", "tok/s", "max/min", "ITL p99/p50"]
    head.append("first token, ms")
    return markdown(head, rows)
