"""What `--profile` costs: captions with it and without, in turns.

    python benchmarks/profile_cost.py OUT.json PICTURE [--rounds 10] [-- caption's options]

Each is a process of its own. Written for both: every figure and its median, of the whole process's
time, the load's, the first token's and the decode rate; for those with a trace, its size and how
many events it has, kernels among them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIGURES = ("process_s", "load_s", "ttft_s", "decode_tok_per_s")


def caption(picture: str, options: list[str], trace: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "qwencli", "caption", picture, "--json", *options]
    command += [] if trace is None else ["--profile", str(trace)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    seconds = time.perf_counter() - started
    timings = json.loads(done.stdout)["timings"]
    found = {"process_s": seconds, **{name: timings[name] for name in FIGURES[1:]}}
    if trace is not None:
        events = json.loads(trace.read_text())["traceEvents"]
        groups = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        kernels = [e for e in events if e["ph"] == "X" and groups[e["pid"]].startswith("cuda:")]
        found |= {"events": len(events), "kernels": len(kernels), "bytes": trace.stat().st_size}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("picture")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("options", nargs="*", help="of caption, after --")
    given = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder:
        caption(given.picture, given.options, None)  # what only a first process compiles
        for turn in range(given.rounds):
            order = ["without", "with"] if turn % 2 else ["with", "without"]
            for kind in order:
                trace = Path(folder) / f"{turn}.json" if kind == "with" else None
                runs[kind].append(caption(given.picture, given.options, trace))
    medians = {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for kind, rows in runs.items()
    }
    given.out.write_text(json.dumps({"medians": medians, "runs": runs}, indent=2) + "\n")
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
