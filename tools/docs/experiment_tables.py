"""Fills the tables of docs/experiments/ from results/; `--check` fails when one is stale.

A table stands between `<!-- table: KIND results/FOLDER FILE ... -->` and `<!-- end -->`. KIND is a
key of KINDS: what wrote such files, and which columns are shown of them.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from readme_tables import ROOT, markdown, write_or_check

FOLDER = ROOT / "docs" / "experiments"
WEIGHTS = {"none": "bf16"}
MARK = re.compile(r"(<!-- table: ([\w-]+) ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(file: Path) -> Any:
    """The JSON in a file, which may be compressed."""
    data = file.read_bytes()
    return json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)


def weights(row: dict[str, Any]) -> str:
    name = row.get("quantization") or row["mode"]
    return WEIGHTS.get(name, name)


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


def rows_step(files: Sequence[Path]) -> str:
    """Of `benchmarks/rows_step.py`: tok/s of all rows together, by how many there are."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for file in files:
        document = read(file)
        for mode in document["modes"]:
            steps = found.setdefault((document["model"], weights(mode)), {})
            steps |= {
                int(name): step["tok_per_s"]
                for name, step in mode["steps"].items()
                if name.isdigit()
            }
    counts = sorted({count for steps in found.values() for count in steps})
    rows = [
        [model, name, *(f"{steps[n]:,.1f}" if n in steps else "-" for n in counts)]
        for (model, name), steps in found.items()
    ]
    return markdown(["model", "weights", *map(str, counts)], rows)


def verify_steps(files: Sequence[Path]) -> str:
    """Of `benchmarks/rows_step.py --check`."""
    rows = [
        [
            weights(mode),
            str(check["size"]),
            f"{check['step_ms']:.2f}",
            f"{check['plain_ms']:.2f}",
            f"{check['all_right']:.2f}",
            f"{check['all_wrong']:.2f}",
        ]
        for mode in read(files[0])["modes"]
        for check in mode["checks"]
    ]
    header = ["weights", "tokens", "step, ms", "plain, ms", "all right", "none right"]
    return markdown(header, rows)


def one_row_gate(files: Sequence[Path]) -> str:
    """Of `benchmarks/one_row_gate.py`."""
    rows = [
        [
            weights(row),
            f"{row['before']['tok_per_s_median']:.1f}",
            f"{row['after']['tok_per_s_median']:.1f}",
            f"{row['ratio']:.4f}",
            f"{max(row['after']['max_over_min']):.4f}",
            f"{row['after']['itl_p99_over_p50']:.3f}",
        ]
        for row in read(files[0])
    ]
    header = ["weights", "before", "after", "ratio", "fastest / slowest run", "ITL p99 / p50"]
    return markdown(header, rows)


def captions_per_second(files: Sequence[Path]) -> str:
    """Of `benchmarks/captions_per_second.py`: each run of as many pictures as the longest has."""
    rows = []
    for file in files:
        runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        most = max(run["captions"] for run in runs)
        speeds = [f"{run['captions_per_s']:.1f}" for run in runs if run["captions"] == most]
        rows.append([weights(runs[0]), f"{most:,}", ", ".join(speeds)])
    return markdown(["weights", "pictures", "captions a second, each run"], rows)


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


def small_hybrid(files: Sequence[Path]) -> str:
    """Of `benchmarks/small_hybrid.py`. A share of a handful of drafts is not shown."""
    rows = [
        [
            row["quantization"],
            f"{row['exact_percent']:.1f}",
            f"{row['num_drafted']:,}",
            f"{row['accepted_percent']:.1f}" if row["num_drafted"] >= 100 else "-",
        ]
        for row in read(files[0])["rows"]
    ]
    return markdown(["weights", "exact, %", "drafts made", "taken, %"], rows)


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
        "quiet": "nothing",
    }
    cells = [cell for file in files for cell in read(file)]
    rows = []
    for kind, name in kinds.items():
        of_kind = [cell for cell in cells if cell["kind"] == kind]
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
    """Of `benchmarks/serve_load.py --soak-minutes`: what is held after each round."""
    told = read(files[0])["rough"]
    rows = [
        [
            f"{row['s']:.0f}" if "s" in row else "before",
            *(str(row[key]) for key in ("unfinished", "kv_pages", "handles", "threads")),
            f"{row['host_bytes'] / 1e6:.1f}",
        ]
        for row in (told["before"], *told["rounds"])
    ]
    head = ["s", "requests that run", "KV pages in use", "file handles", "threads", "memory, MB"]
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


def mtp(files: Sequence[Path]) -> str:
    """Of `benchmarks/mtp.py`: one file after each change."""
    rows = []
    for file in files:
        for row in read(file)["rows"]:
            label = {"plain": "none", "wrong": "wrong"}.get(row["name"])
            rows.append(
                [
                    file.stem.removeprefix("mtp-"),
                    weights(row),
                    label or f"{row['name'].removeprefix('right_')}, right",
                    f"{row['median']:.1f}",
                    f"{row['gain']:.3f}",
                ]
            )
    return markdown(["file", "weights", "drafts", "tok/s", "over none"], rows)


def tile_search(files: Sequence[Path]) -> str:
    """Of `benchmarks/decode_step.py --search`."""
    rows = []
    for file in files:
        for row in read(file)["rows"]:
            found = [row[key][0]["step_us"] for key in ("default", "searched")]
            before, after = (statistics.median(us) / 1e3 for us in found)
            cells = f"{before:.3f}", f"{after:.3f}", f"{after / before:.3f}"
            rows.append([row["model"], weights(row), str(row["tokens"]), *cells])
    return markdown(["model", "weights", "tokens", "step, ms", "searched, ms", "ratio"], rows)


def attention_cuts(files: Sequence[Path]) -> str:
    """Of `benchmarks/rows_step.py --sweep-attention`: the default and the fastest."""
    rows = []
    for mode in read(files[0])["modes"]:
        for count in (key for key in mode if key.isdigit()):
            cuts = mode[count]
            fastest = max(cuts, key=lambda name: cuts[name]["tok_per_s"])
            default = next(name for name in cuts if name.endswith("default"))
            for what, name in (("before", default), ("fastest", fastest)):
                words = name.split()
                rows.append([count, what, words[2], words[4], f"{cuts[name]['tok_per_s']:,.0f}"])
    return markdown(["rows", "", "parts", "tokens of a part, at least", "tok/s"], rows)


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


def side_by_side(files: Sequence[Path]) -> str:
    """Of `benchmarks/side_by_side/batches.py`: medians of all rounds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read(files[0]):
        found.setdefault(row["engine"], []).append(row)
    # One sequence has figures of its own: what two short runs differ by tells little of it.
    counts = ("8", "32", "256")
    rows = []
    for engine, own in found.items():
        rates = [rate for row in own for rate in row["captions_per_s"]]
        figures = [f"{statistics.median(rates):.0f}", f"{min(rates):.0f} to {max(rates):.0f}"]
        first = statistics.median(row["first_token_s"]["median"] for row in own)
        speeds = []
        for count in counts:
            values = [value for row in own for value in row["rows"].get(count, ())]
            speeds.append(f"{statistics.median(values):,.0f}" if values else "-")
        context = f"{own[0]['prompt_tokens_of_rows']}"
        rows.append([engine, *figures, f"{1e3 * first:.0f}", context, *speeds])
    head = ["engine", "captions/s", "spread", "first token, ms", "prompt of the rest, tokens"]
    return markdown([*head, *(f"tok/s of {count}" for count in counts)], rows)


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
                    )
                    first = row["ttft_s_median"]
                    rows.append([*mode, *figures, f"{1e3 * float(first):.0f}" if first else "-"])
    rows.sort(key=lambda row: -float(row[4]))
    head = ["engine", "weights", "attention", "cache", "tok/s", "max/min", "first token, ms"]
    return markdown(head, rows)


def long_prompts(files: Sequence[Path]) -> str:
    """Of `benchmarks/long_prompts.py`; of several numbers of tokens that run at a time, too."""
    rows = [
        [*([str(each["prefill_chunk"])] if "prefill_chunk" in each else []),
         each["attention"], f"{each['prompt_tokens']:,}", f"{each['prompt_ms']:.1f}",
         f"{each['prompt_against_first']:.3f}", f"{each['step_ms']:.2f}"]
        for each in map(json.loads, files[0].read_text().splitlines())
    ]  # fmt: skip
    head = ["attention", "tokens", "prompt, ms", "ratio", "step, ms"]
    return markdown(["at a time", *head] if len(rows[0]) > len(head) else head, rows)


def prompt_attention(files: Sequence[Path]) -> str:
    """Of `benchmarks/prompt_attention.py`: torch's kernels, and our fastest at each size."""
    found = [json.loads(line) for line in files[0].read_text().splitlines()]
    rows = []
    for columns, causal in dict.fromkeys((each["columns"], each["causal"]) for each in found):
        of_kind = [e for e in found if (e["columns"], e["causal"]) == (columns, causal)]
        torchs = {e["way"]: e for e in of_kind if isinstance(e["way"], str)}
        ours = [e for e in of_kind if not isinstance(e["way"], str)]
        for size in (key for key in ours[0] if key[0].isdigit()):
            fastest = min(ours, key=lambda each: each[size])
            rows.append(
                [
                    f"{columns}, {'prompts' if causal else 'pictures'}", size,
                    *(str(torchs[way].get(size, "-")) for way in ("torch", "torch whole", "sdpa")),
                    str(fastest[size]), ", ".join(map(str, fastest["way"])),
                    f"{fastest[size] / torchs['torch'][size]:.2f}",
                ]
            )  # fmt: skip
    head = [
        "columns of a head",
        "sequences",
        "torch, us",
        "over one",
        "sdpa",
        "ours",
        "cut",
        "ratio",
    ]
    return markdown(head, rows)


def first_tokens(files: Sequence[Path]) -> str:
    """Of `benchmarks/first_tokens.py`, several processes of each label: medians."""
    found = [json.loads(line) for line in files[0].read_text().splitlines()]
    rows = []
    for model, size in dict.fromkeys((each["model"], each["size"]) for each in found):
        of_size = [each for each in found if (each["model"], each["size"]) == (model, size)]
        for label in dict.fromkeys(each["label"] for each in of_size):
            own = [each for each in of_size if each["label"] == label]
            medians = (
                f"{statistics.median(each[key] for each in own):.1f}"
                for key in ("vision_encode_ms", "prefill_ms", "ttft_ms")
            )
            rows.append([model, size, f"{own[0]['prompt_tokens']:,}", label, *medians])
    head = [
        "model",
        "picture",
        "tokens",
        "attention",
        "vision, ms",
        "prompt, ms",
        "first token, ms",
    ]
    return markdown(head, rows)


def kernels_by_card(files: Sequence[Path]) -> str:
    """Of `tools/kernels_by_card.py`: of each kernel the kinds, and what the largest needs."""
    with files[0].open(newline="") as file:
        found = list(csv.DictReader(file))
    cards = list(dict.fromkeys(row["card"] for row in found))
    needs = {(row["kernel"], row["card"]): row for row in found}
    rows = []
    for kernel in sorted({row["kernel"] for row in found}):
        cells = []
        for card in cards:
            row = needs.get((kernel, card))
            spilled = f", {row['spilled_bytes']} B" if row and int(row["spilled_bytes"]) else ""
            shared = f"{int(row['shared_bytes']) / 1024:.0f}" if row else "-"
            cells.append(f"{row['kinds']}: {shared} KiB{spilled}" if row else "-")
        rows.append([kernel.removesuffix("_kernel"), *cells])
    return markdown(["kernel", *(f"sm_{card}" for card in cards)], rows)


KINDS: dict[str, Callable[[Sequence[Path]], str]] = {
    "comfyui-interference": comfyui_interference,
    "rows-step": rows_step,
    "verify-steps": verify_steps,
    "one-row-gate": one_row_gate,
    "captions-per-second": captions_per_second,
    "load-time": load_time,
    "scenes-evaluation": scenes_evaluation,
    "small-hybrid": small_hybrid,
    "planted-disturbances": planted_disturbances,
    "serve-soak": serve_soak,
    "warm-caption": warm_caption,
    "serve-answers": serve_answers,
    "mtp": mtp,
    "tile-search": tile_search,
    "attention-cuts": attention_cuts,
    "serve-speed": serve_speed,
    "caption-folder": caption_folder,
    "warm-up": warm_up,
    "listing": listing,
    "warm-up-begins": warm_up_begins,
    "served-turns": served_turns,
    "request-cost": request_cost,
    "load-in-turns": load_in_turns,
    "side-by-side": side_by_side,
    "servers": servers,
    "cells": cells,
    "long-prompts": long_prompts,
    "prompt-attention": prompt_attention,
    "first-tokens": first_tokens,
    "kernels-by-card": kernels_by_card,
}


def render(text: str) -> str:
    """A page with its tables made anew."""

    def fill(found: re.Match[str]) -> str:
        folder, *names = found[3].split()
        files = [ROOT / folder / name for name in names]
        return f"{found[1]}\n{KINDS[found[2]](files)}\n\n{found[4]}"

    return MARK.sub(fill, text)


def main() -> None:
    pages = sorted(FOLDER.glob("*.md"))
    write_or_check({page: render(page.read_text(encoding="utf-8")) for page in pages})


if __name__ == "__main__":
    main()
