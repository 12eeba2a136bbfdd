"""What `qwencli caption` of one picture costs while its model is kept loaded, beside loading it.

python benchmarks/warm_caption.py IMAGE OUT.csv [--model NAME] [--runs 10] [--device auto]

A row a call, in turns: `python` (which does nothing), `version` and `help` (the command line
alone), `warm` (the resident engine, after one call that is not counted), `cold`
(`--keep-loaded 0`). Wall time and processor time of the command itself. Modules are compiled once,
as an installed package's are, whatever PYTHONDONTWRITEBYTECODE says.
Then `stop`: how long the command took, and how many bytes of the GPU are used before and after.
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

from qwencli.engine.machine.host import gpu_free_bytes

COLUMNS = ("what", "wall_s", "user_s", "system_s", "gpu_free_bytes")


def timed(arguments: list[str]) -> dict[str, float | int | None]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(arguments)} ended with exit code {child.returncode}")
    return {
        "wall_s": wall_s,
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "gpu_free_bytes": gpu_free_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--max-new-tokens", default="24")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--calls", default="python,version,help,warm,cold", help="which, in turns")
    said = parser.parse_args()
    command = ["-m", "qwencli"]
    caption = [*command, "caption", str(said.image), "--device", said.device, "--greedy"]
    caption += ["--load-format", said.load_format, "--max-new-tokens", said.max_new_tokens]
    caption += ["--model", said.model] if said.model else []
    calls = {
        "python": ["-c", "pass"],
        "version": [*command, "--version"],
        "help": [*command, "--help"],
        "warm": [*caption, "--keep-loaded", "10m"],
        "cold": [*caption, "--keep-loaded", "0"],
    }
    calls = {what: calls[what] for what in said.calls.split(",")}
    timed([*command, "stop"])
    rows: list[dict[str, object]] = [{"what": "first", **timed([*caption, "--keep-loaded", "10m"])}]
    for _ in range(said.runs):
        rows += [{"what": what, **timed(arguments)} for what, arguments in calls.items()]
    rows.append({"what": "before stop", "gpu_free_bytes": gpu_free_bytes()})
    rows.append({"what": "stop", **timed([*command, "stop"])})
    with said.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for what in calls:
        of_it = [row for row in rows if row["what"] == what]
        medians = {
            name: statistics.median(float(str(r[name])) for r in of_it) for name in COLUMNS[1:4]
        }
        print(what, *(f"{name} {value:.3f}" for name, value in medians.items()))


if __name__ == "__main__":
    main()
