"""What one `qwencli caption` costs with each engine, from the start of the process to its end.

python benchmarks/one_shot.py IMAGE OUT.csv [--runs 5] [--device cpu] [--engines A,B]

The engines take turns, after one call each that is not counted; `torch` among them is a process
that imports torch and nothing else, which no caption can do without. A row a call: wall time,
processor time and peak resident memory as the operating system reports them. The table at the end
shows medians and each engine's share of the last engine's. Linux and macOS.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MEASURES = ("wall_s", "user_s", "system_s", "peak_rss_bytes")
# The unit of ru_maxrss.
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def call(engine: str, image: Path, device: str) -> dict[str, float]:
    """Run one caption to its end and return its measures."""
    command = [sys.executable, "-m", "qwencli", "--quiet", "caption", str(image)]
    command += ["--engine", engine, "--device", device, "--keep-loaded", "0"]
    if engine == "torch":
        command = [sys.executable, "-c", "import torch"]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {child.returncode}")
    peak = usage.ru_maxrss * RSS_UNIT_BYTES
    return dict(zip(MEASURES, (wall_s, usage.ru_utime, usage.ru_stime, peak), strict=True))


def show(rows: list[dict[str, object]], engines: list[str]) -> None:
    medians = {
        engine: [
            statistics.median(float(str(row[m])) for row in rows if row["engine"] == engine)
            for m in MEASURES
        ]
        for engine in engines
    }
    for engine, values in medians.items():
        shares = zip(MEASURES, values, medians[engines[-1]], strict=True)
        print(engine, *(f"{m} {value:.4g} ({value / last:.0%})" for m, value, last in shares))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("image", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engines", default="native,transformers")
    options = parser.parse_args()
    engines = options.engines.split(",")
    rows: list[dict[str, object]] = []
    with options.out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["engine", "run", *MEASURES])
        writer.writeheader()
        for run in range(options.runs + 1):
            for engine in engines:
                measured = call(engine, options.image, options.device)
                if run:
                    rows.append({"engine": engine, "run": run, **measured})
                    writer.writerow(rows[-1])
                    stream.flush()
    show(rows, engines)


if __name__ == "__main__":
    main()
