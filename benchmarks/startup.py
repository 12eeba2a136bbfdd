"""How long the command line takes to answer; exit code 1 when a median is over the limit.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

LIMIT_S = 0.25
RUNS = 15


def median_s(option: str) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qwencli", option], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    found = {option: median_s(option) for option in ("--help", "--version")}
    for option, seconds in found.items():
        print(f"qwencli {option}: {seconds * 1e3:.0f} ms, median of {RUNS}")
    sys.exit(max(found.values()) > LIMIT_S)


if __name__ == "__main__":
    main()
