"""Two campaigns of the same cells with nothing changed between them: how many are SAME?

python benchmarks/a_against_a.py --out campaigns/aa -- --matrix quick --runs 20 --processes 4

What stands after `--` goes to `qwencli bench`. Prints the comparison and, as the last line, one
JSON object with the share of each verdict.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for both campaigns")
    parser.add_argument("arguments", nargs="*", help="of `qwencli bench`")
    options = parser.parse_args()
    program = [sys.executable, "-m", "qwencli", "bench"]
    for name in ("a", "b"):
        command = [*program, *options.arguments, "--no-quality", "--out", str(options.out / name)]
        if subprocess.run(command, check=False).returncode == 130:
            return 130
    sides = [str(options.out / name) for name in ("a", "b")]
    subprocess.run([*program, "compare", *sides], check=True)
    found = subprocess.run(
        [*program, "compare", "--json", *sides], check=True, capture_output=True, text=True
    )
    counts: dict[str, int] = json.loads(found.stdout)["counts"]
    cells = sum(counts.values()) or 1
    shares = {name: round(100 * count / cells, 1) for name, count in counts.items()}
    print(json.dumps({"cells": cells, "percent": shares}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
