"""Writes docs/predictions.md: where the time of a decode step goes on the GPU that was measured,
and from that the decode speed on GPUs that nobody here has. Its kernels stand in a CSV beside it.

`--check` fails when one is stale. There is no page while there is no result of
`benchmarks/decode_step.py` (`step_results`).

    token = bytes / (share x vendor's bandwidth) + beyond + launches x serial

share: of the vendor's bandwidth that the measured GPU reads. beyond: what the measured step takes
that is not reading: kernels that wait for the one in front, the last programs' tail, arithmetic; as
much on the other GPU. serial: what a kernel costs more where none starts before the one in front
has ended; 0 elsewhere.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from step_results import VENDOR, Step, newest_steps, steps_of, vendor_bandwidth

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "predictions.md"
DETAILS = ROOT / "docs" / "predictions" / "kernels.csv"
WHOLE = "whole step"
HEAD = ("model", "weights", "context", "kernel", "launches", "MB", "us", "% of read bandwidth")


@dataclass(frozen=True)
class Gpu:
    """Vendor's figures. `overlaps`: a kernel can start before the one in front has ended."""

    name: str
    bytes_per_s: float
    memory_bytes: int
    overlaps: bool


# NVIDIA's data sheets: GeForce RTX 5090 (512 bits at 28 Gbit/s); RTX 4090 (384 at 21).
PREDICTED = (
    Gpu("GeForce RTX 5090", 1.792e12, 32 * 2**30, overlaps=True),
    Gpu("GeForce RTX 4090", 1.008e12, 24 * 2**30, overlaps=False),
)
# Measured cards, to try the formula on one with the steps of another.
MEASURED = (
    Gpu("NVIDIA H200", VENDOR["NVIDIA H200"], 141 * 10**9, overlaps=True),
    Gpu("NVIDIA H100 80GB HBM3", VENDOR["NVIDIA H100 80GB HBM3"], 80 * 10**9, overlaps=True),
)
# A step of 182 kernels, in ms: "best" with overlapping launches, "no pdl" without.
OVERLAP = Path("results/2026-11-23-h200-kernels/probe_4b.txt")
OVERLAP_KERNELS = 182
# The range that the page shows: this much of what is beyond reading.
LESS, MORE = 0.5, 2.0
KERNELS = {
    "norm_qkv": "norm, QKV",
    "attend": "attention",
    "o_residual": "O, residual",
    "norm_gate_up": "norm, gate/up, SwiGLU",
    "down_residual": "down, residual",
    "choose": "head, choice",
}


def serial_us(root: Path) -> float:
    """What a kernel costs more where none starts before the one in front has ended."""
    text = (root / OVERLAP).read_text(encoding="utf-8")
    best, without = (
        float(re.search(rf"^{name} ([\d.]+)", text, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("best", "no pdl")
    )
    return 1e3 * (without - best) / OVERLAP_KERNELS


def shares(root: Path) -> tuple[float, float]:
    """The smallest and the largest share of a vendor's bandwidth that any step result here read."""
    files = sorted((root / "results").glob("*-step*/*.json"))
    found = [step.share for file in files for step in steps_of(file)]
    return min(found), max(found)


def token_us(step: Step, bytes_per_s: float, serial: float = 0.0, factor: float = 1.0) -> float:
    """Time of a measured step on a GPU of another read bandwidth.

    Args:
        serial: of each launch. factor: of everything but reading.
    """
    size = step.figures["bytes"]
    beyond_us = statistics.median(step.figures["step_us"]) - size / step.bandwidth * 1e6
    return size / bytes_per_s * 1e6 + factor * max(0.0, beyond_us) + step.launches * serial


def speeds(
    step: Step, gpu: Gpu, serial: float, spread: tuple[float, float]
) -> tuple[float, float, float]:
    """Tokens a second: expected, least, most."""
    extra = 0.0 if gpu.overlaps else serial
    ways = ((step.share, 1.0), (spread[0], MORE), (spread[1], LESS))
    expected, least, most = (
        1e6 / token_us(step, share * gpu.bytes_per_s, extra, factor) for share, factor in ways
    )
    return expected, least, most


def predictions(
    steps: Sequence[Step], serial: float, spread: tuple[float, float]
) -> Iterator[list[str]]:
    """A row a GPU, model, mode and context; what does not fit is left out."""
    for gpu in PREDICTED:
        for step in steps:
            size = step.figures["bytes"]
            if size > 0.9 * gpu.memory_bytes or not (gpu.overlaps or step.launches):
                continue
            expected, least, most = speeds(step, gpu, serial, spread)
            yield [
                gpu.name, step.model, step.weights, str(step.context), f"**{expected:.0f}**",
                f"{least:.0f}-{most:.0f}", f"{gpu.bytes_per_s / size:.0f}",
                f"{step.figures['tok_per_s']:.0f}",
            ]  # fmt: skip


def accounting(steps: Sequence[Step]) -> Iterator[list[str]]:
    """A row a kernel of each step, and one for the whole step."""
    for step in steps:
        name = [step.model, step.weights, str(step.context)]
        for kernel, part in step.figures["parts"].items():
            yield [
                *name, KERNELS[kernel], str(part["launches"]), f"{part['bytes'] / 1e6:.1f}",
                f"{part['us']:.0f}", f"{part['percent_of_bandwidth']:.0f}",
            ]  # fmt: skip
        yield [
            *name, WHOLE, str(step.launches or "-"),
            f"{step.figures['bytes'] / 1e6:.1f}",
            f"{statistics.median(step.figures['step_us']):.0f}",
            f"{step.figures['percent_of_limit']:.0f}",
        ]  # fmt: skip


def tried(
    root: Path, steps: Sequence[Step], serial: float, spread: tuple[float, float]
) -> Iterator[list[str]]:
    """Steps that were measured on another card too: what the formula says, and what came out."""
    for gpu in MEASURED:
        elsewhere = {step.key: step for step in newest_steps(root / "results", gpu.name)}
        for step in steps:
            there = elsewhere.get(step.key)
            if there is None or step.gpu == gpu.name:
                continue
            expected, least, most = speeds(step, gpu, serial, spread)
            yield [
                gpu.name, step.model, step.weights, str(step.context), f"{expected:.0f}",
                f"{least:.0f}-{most:.0f}", f"{there.figures['tok_per_s']:.0f}",
                f"`results/{there.folder}/`",
            ]  # fmt: skip


def table(header: str, rows: Iterator[list[str]]) -> str:
    names = header.split("; ")
    return "\n".join("| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows))


def missing(steps: Sequence[Step]) -> str:
    """Models and modes without a row, in words."""
    models = dict.fromkeys(step.model for step in steps)
    there = {(step.model, step.quantization) for step in steps}
    gone = [
        f"{m} {q}" for m in models for q in ("none", "8bit", "fp8", "4bit") if (m, q) not in there
    ]
    return f"Not measured, so not predicted: {', '.join(gone)}.\n\n" if gone else ""


def page(root: Path) -> str | None:
    """The page; None where there is no result."""
    steps = newest_steps(root / "results")
    if not steps:
        return None
    serial, spread = serial_us(root), shares(root)
    measured = steps[0].gpu
    folders = ", ".join(f"`results/{name}/`" for name in sorted({step.folder for step in steps}))
    card = measured.split()[1]
    read = [step.bandwidth for step in steps]
    of_card, share = vendor_bandwidth(measured) / 1e9, statistics.median(s.share for s in steps)
    vendors = ", ".join(f"{gpu.name} {gpu.bytes_per_s / 1e9:.0f} GB/s" for gpu in PREDICTED)
    predicted = table(
        "GPU; model; weights; context; predicted tok/s; range; vendor's limit; "
        f"measured on the {card}",
        predictions(steps, serial, spread),
    )
    against = table(
        "GPU; model; weights; context; predicted tok/s; range; measured tok/s; where",
        tried(root, steps, serial, spread),
    )
    whole = table("; ".join(HEAD), (row for row in accounting(steps) if WHOLE in row))
    return f"""# Where a decode step's time goes, and predicted speed on other GPUs

Generated by `python tools/docs/predictions.py` from {folders},
measured by `benchmarks/decode_step.py`, of Qwen3.5 by `benchmarks/rows_step.py`, on an {measured}.
One sequence, greedy, random weights, fused kernels in one CUDA graph; the step alone, without the
host.

## Predictions for other GPUs

**These are predictions, not measurements: the tool has not run on these GPUs.** The last column
alone was measured.

{predicted}

{missing(steps)}    token = bytes / (share x vendor's bandwidth) + beyond + launches x serial

- **bytes** of a token: the column of the whole step in the table below.
- **Vendor's bandwidth**: {vendors}; {card} {of_card:.0f} GB/s,
  by their data sheets.
- **share** of it that can be read: {share:.1%}, as on the {card}
  ({min(read) / 1e12:.2f} to {max(read) / 1e12:.2f} TB/s in the processes that timed the steps).
- **beyond**: what the measured step takes that is not reading: waits between kernels, arithmetic.
  Taken to be as much elsewhere, whatever the other GPU's processors.
- **serial**: the RTX 4090 cannot start a kernel before the one in front has ended, which cost
  {serial:.1f} us a kernel on an H200 (`{OVERLAP.as_posix()}`); 0 for the RTX 5090.
- **Range**: from twice as much beyond and a share of {spread[0]:.0%} to half as much and
  {spread[1]:.0%}, the smallest and the largest share in any step result here.
- **Vendor's limit**: nothing but reading, at all of the vendor's bandwidth.

Not in it: tiles that suit these GPUs better or worse, caches that hold part of a small model,
clocks and power limits, the host.

The same formula, from the same steps, for a GPU that was measured (with that day's kernels):

{against}

## Accounting

What a kernel takes is what the step takes less without it. Kernels overlap, so the parts do not
add up to the whole, and one that hides behind its neighbour can seem to read faster than the memory
does. Bytes are weights, keys and values. Shares are of the bandwidth measured in the same process;
launches are those of one token. Here is each step as a whole, on the {card};
[kernels.csv](predictions/{DETAILS.name}) has every kernel of it.

{whole}
"""


def details(root: Path) -> str | None:
    """Every kernel of every step as CSV; None where there is no result."""
    steps = newest_steps(root / "results")
    if not steps:
        return None
    file = io.StringIO()
    rows = ([steps[0].gpu, *row] for row in accounting(steps))
    csv.writer(file, lineterminator="\n").writerows([("gpu", *HEAD), *rows])
    return file.getvalue()


def main() -> None:
    for path, text in ((TARGET, page(ROOT)), (DETAILS, details(ROOT))):
        there = path.read_text(encoding="utf-8") if path.exists() else None
        if there == text:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{path.relative_to(ROOT)} is stale: run make docs")
        if text is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
