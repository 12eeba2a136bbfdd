"""How long a large campaign's report takes to build and to open, and how large it is.

python benchmarks/report_speed.py [--cells 100 --runs 20 --tokens 256] [--browser chromium]

The campaign is made up (tests/bench/synthetic_campaign.py). Opening is the time from the start of
the navigation to the page laid out with its first cell open, by headless Chromium's own clock.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import write_rows
from tests.bench.synthetic_campaign import ENVIRONMENT, campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args()
    made = campaign(options.cells, options.runs, options.tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps(made.plan), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
        for file, names in (("runs", "RUNS"), ("tokens", "TOKENS"), ("gpu", "GPU")):
            write_rows(folder / f"{file}.csv", getattr(columns, names), getattr(made, file))
        start, cpu = time.perf_counter(), time.process_time()
        build_report(folder)
        answer = {
            "cells": options.cells,
            "runs": options.runs,
            "tokens": options.tokens,
            "build_s": round(time.perf_counter() - start, 2),
            "build_cpu_s": round(time.process_time() - cpu, 2),
            "megabytes": round((folder / "report.html").stat().st_size / 1e6, 2),
            "open_s": open_s(options.browser, folder / "report.html"),
        }
    print(json.dumps(answer))


# Once everything is loaded and laid out, nothing is left of the page but the time that took.
_CLOCK = """<script>addEventListener("load", () => {
document.body.getBoundingClientRect();
document.documentElement.innerHTML = `<p>${performance.now()} ms</p>`; });</script></body>"""


def open_s(browser: str, html: Path) -> float | None:
    """Until a page is loaded and laid out: median of three; None without the browser."""
    program = shutil.which(browser)
    if program is None:
        return None
    page = html.with_name("timed.html")
    text = html.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    page.write_text(text.replace("</body>", _CLOCK), encoding="utf-8")
    found = []
    for _ in range(3):
        done = subprocess.run(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             page.as_uri()],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        shown = re.search(r"<p>([0-9.]+) ms", done.stdout)
        found.append(float(shown[1]) if shown else math.inf)
    return round(statistics.median(found) / 1e3, 2)


if __name__ == "__main__":
    main()
