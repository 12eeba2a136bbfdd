"""Tables of what was measured of steps, prompts, captions and kernels, for `experiment_tables`."""

from __future__ import annotations

import csv
import gzip
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readme_tables import markdown

WEIGHTS = {"none": "bf16"}


def read(file: Path) -> Any:
    """The JSON in a file, which may be compressed."""
    data = file.read_bytes()
    return json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)


def weights(row: dict[str, Any]) -> str:
    name = row.get("quantization") or row["mode"]
    return WEIGHTS.get(name, name)


def rows_step(files: Sequence[Path]) -> str:
    """Of `benchmarks/rows_step.py`: tok/s of all rows together, by how many there are; of one row
    how near to the limit of reading, where it is known."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    limits: dict[tuple[str, str], float] = {}
    for file in files:
        document = read(file)
        for mode in document["modes"]:
            key = document["model"], weights(mode)
            steps = found.setdefault(key, {})
            if "percent_of_limit" in mode:
                limits[key] = mode["percent_of_limit"]
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
    head = ["model", "weights", *map(str, counts)]
    if limits:
        rows = [[*row, f"{limits[row[0], row[1]]:.0f}%"] for row in rows]
        head.append("of the limit, 1 row")
    return markdown(head, rows)


def rows_by_file(files: Sequence[Path]) -> str:
    """Of `benchmarks/rows_step.py`, one file after each change: tok/s, by rows."""
    steps = {file.stem: read(file)["modes"][0]["steps"] for file in files}
    counts = sorted({int(name) for of_file in steps.values() for name in of_file if name.isdigit()})
    rows = [
        [name, *(f"{own[str(n)]['tok_per_s']:,.1f}" if str(n) in own else "-" for n in counts)]
        for name, own in steps.items()
    ]
    return markdown(["file", *map(str, counts)], rows)


def delta_cuts(files: Sequence[Path]) -> str:
    """Of `benchmarks/gated_delta.py --cuts`: microseconds of a layer's step, by rows and cut, and
    in brackets percent of what a copy of as many bytes takes."""
    lines = [each for each in read(files[0])["lines"] if each["kernel"] == "decode"]
    cuts = list(dict.fromkeys(each["cut"] for each in lines))
    rows = []
    for count in dict.fromkeys(each["rows"] for each in lines):
        own = {each["cut"]: each for each in lines if each["rows"] == count}
        shown = (f"{own[c]['layer_us']:.1f} ({own[c]['floor_percent']:.0f}%)" for c in cuts)
        rows.append([str(count), *shown])
    return markdown(["rows", *(f"{cut.replace('x', ' parts x ')} warps" for cut in cuts)], rows)


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
    """Of `benchmarks/captions_per_second.py`: each run of as many pictures as the longest has; of
    one file with several hosts and trees, those in turns."""
    rows = []
    runs = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    if "host" in runs[0]:
        found: dict[tuple[str, ...], list[float]] = {}
        for run in runs:
            key = run["model"], weights(run), run["host"], run["label"]
            found.setdefault(key, []).append(run["captions_per_s"])
        for key, own in sorted(found.items(), key=lambda each: each[0][:3]):
            rows.append([*key, ", ".join(f"{speed:.1f}" for speed in own)])
        return markdown(["model", "weights", "host", "", "captions a second, each run"], rows)
    for file in files:
        runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        most = max(run["captions"] for run in runs)
        speeds = [f"{run['captions_per_s']:.1f}" for run in runs if run["captions"] == most]
        rows.append([weights(runs[0]), f"{most:,}", ", ".join(speeds)])
    return markdown(["weights", "pictures", "captions a second, each run"], rows)


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


def same_answers(files: Sequence[Path]) -> str:
    """Of `benchmarks/same_answers.py`; what it costs where that was timed. Modes that were refused
    are left out."""
    found = [row for file in files for row in read(file) if "error" not in row]
    timed = any("captions_per_s" in row for row in found)
    rows = []
    for row in found:
        ran, mixes = row["effective"], row["mixes"]
        cells = [
            ran["dtype"] if row["quantization"] == "none" else ran["quantization"],
            ran["kernels"],
            "yes" if row["batch_invariant"] else "no",
            f"{sum(each['answers'] for each in mixes)}",
            f"{row['differ_percent']:.1f}",
        ]
        for speed in ("captions_per_s", "one_row_tok_per_s") if timed else ():
            cells.append(f"{row[speed]:.1f}" if speed in row else "-")
        rows.append(cells)
    head = ["weights", "kernels", "batch-invariant", "answers in mixes", "others than alone, %"]
    return markdown(head + ["captions/s", "one row, tok/s"] * timed, rows)


def products(files: Sequence[Path]) -> str:
    """Of `benchmarks/quantized_products.py`: microseconds of each way."""
    rows = []
    for row in read(files[0])["rows"]:
        times = [f"{row['us'][way]:.1f}" for way in ("ours", "read_back", "bf16")]
        rows.append([row["matrix"], str(row["rows"]), *times, f"{100 * row['off']['ours']:.1f}"])
    head = ["matrix", "tokens", "in 8 bits, us", "dequantized, us", "bf16, us", "off, %"]
    return markdown(head, rows)


def product_ways(files: Sequence[Path]) -> str:
    """TFLOP/s of products alone, by way; of a kernel of ours the best of some tiles."""
    rows = []
    for row in read(files[0]):
        times = row["bf16"], row["fp8"], row["int_mm_scaled"], row["triton_int8"][0]
        speeds = [f"{row['flop'] / us / 1e6:,.0f}" for us in times]
        rows.append([row["matrix"], f"{row['m']:,}", *speeds])
    head = ["matrix", "tokens", "bf16", "fp8", "int8 by torch, scaled", "int8 in our tiles"]
    return markdown(head, rows)


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


def side_by_side(files: Sequence[Path]) -> str:
    """Of `benchmarks/side_by_side/batches.py`: medians of all rounds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for row in read(file):
            name = row["engine"] if len(files) == 1 else file.stem
            found.setdefault(name, []).append(row)
    # One sequence has figures of its own: what two short runs differ by tells little of it.
    counts = ("8", "32", "128", "256")
    measured = {count for own in found.values() for row in own for count in row["rows"]}
    counts = tuple(count for count in counts if count in measured)
    rows = []
    for engine, own in found.items():
        rates = [rate for row in own for rate in row["captions_per_s"]]
        figures = [f"{statistics.median(rates):.0f}", f"{min(rates):.0f} to {max(rates):.0f}"]
        first = statistics.median(row["first_token_s"]["median"] for row in own)
        speeds = []
        for count in counts:
            values = [value for row in own for value in row["rows"].get(count, ())]
            speeds.append(_median_and_span(values) if values else "-")
        context = f"{own[0].get('prompt_tokens_of_rows', 300)}"
        rows.append([engine, *figures, f"{1e3 * first:.0f}", context, *speeds])
    head = ["engine", "captions/s", "spread", "first token, ms", "prompt of the rest, tokens"]
    return markdown([*head, *(f"tok/s of {count}" for count in counts)], rows)


def _median_and_span(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def long_prompts(files: Sequence[Path]) -> str:
    """Of `benchmarks/long_prompts.py`; of several numbers of tokens that run at a time, too."""
    rows = [
        [*([str(each["prefill_chunk"])] if "prefill_chunk" in each else []),
         each["attention"], f"{each['prompt_tokens']:,}", f"{each['prompt_ms']:.1f}",
         f"{each['prompt_against_first']:.3f}", f"{each['step_ms']:.2f}"]
        for each in map(json.loads, files[0].read_text().splitlines())
    ]  # fmt: skip
    head = ["attention", "tokens", "prompt, ms", "ratio", "step, ms"]
    shares = [
        each.get("share_of_matrix_rate")
        for each in map(json.loads, files[0].read_text().splitlines())
    ]
    if all(share is not None for share in shares):
        rows = [[*row, f"{100 * share:.0f}%"] for row, share in zip(rows, shares, strict=True)]
        return markdown([*head, "of the matrix rate"], rows)
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


def first_tokens_in_turns(files: Sequence[Path]) -> str:
    """Of `benchmarks/first_tokens.py` on several hosts: medians of processes, and their span."""
    found: dict[tuple[str, ...], list[float]] = {}
    for each in map(json.loads, files[0].read_text().splitlines()):
        key = each["size"], weights(each), each["host"], each["label"]
        found.setdefault(key, []).append(each["ttft_ms"])
    order = {size: place for place, size in enumerate(dict.fromkeys(key[0] for key in found))}
    rows = [
        [*key, str(len(own)), f"{statistics.median(own):.1f}", f"{min(own):.1f} to {max(own):.1f}"]
        for key, own in sorted(found.items(), key=lambda each: (order[each[0][0]], each[0][1:3]))
    ]
    head = ["picture", "weights", "host", "", "processes", "first token, ms", "span"]
    return markdown(head, rows)


def new_sizes(files: Sequence[Path]) -> str:
    """Of `benchmarks/new_sizes.py`: by how often a size had come."""
    rows = []
    for file in files:
        turns = read(file)["turns"]
        first, third = turns["first"]["median_ms"], turns["third"]["median_ms"]
        medians = [f"{turns[turn]['median_ms']:.1f}" for turn in ("first", "second", "third")]
        rows.append(
            [file.stem, *medians, f"{first - third:.1f}", f"{turns['first']['largest_ms']:.0f}"]
        )
    head = ["file", "first, ms", "second", "third", "first over third", "longest first"]
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
