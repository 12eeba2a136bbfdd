"""Two campaigns of the same cells with nothing changed between them: how many are SAME?

python benchmarks/a_against_a.py --out campaigns/aa --planted 3 -- --matrix quick --runs 20

What stands after `--` goes to `qwencli bench`. With --planted a third campaign follows, whose
tokens are made so many percent slower on purpose: how many are SLOWER? Prints the comparisons and,
as the last line, one JSON object with the share of each verdict; the whole is written to
comparisons.json beside the campaigns. Cells without a speed on both sides count as "none".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCH = (sys.executable, "-m", "qwencli", "bench")
INTERRUPTED = 130


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for all campaigns")
    parser.add_argument("--planted", type=float, metavar="PERCENT")
    parser.add_argument("arguments", nargs="*", help="of `qwencli bench`")
    options = parser.parse_args()
    sides: dict[str, Sequence[str]] = {"a": (), "b": ()}
    if options.planted is not None:
        sides["planted"] = ("--plant", str(options.planted))
    for name, extra in sides.items():
        command = [*BENCH, *options.arguments, "--no-quality", "--no-limits", *extra]
        done = subprocess.run([*command, "--out", str(options.out / name)], check=False)
        if done.returncode == INTERRUPTED:
            return INTERRUPTED
    found = {name: _compare(options.out, name) for name in sides if name != "a"}
    text = json.dumps(found, indent=2)
    (options.out / "comparisons.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps({name: _shares(document) for name, document in found.items()}))
    return 0


def _compare(out: Path, name: str) -> dict[str, Any]:
    """Campaign `name` against campaign a, printed and as a document."""
    command, sides = [*BENCH, "compare"], [str(out / "a"), str(out / name)]
    subprocess.run([*command, *sides], check=True)
    done = subprocess.run([*command, "--json", *sides], check=True, capture_output=True, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _shares(document: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, int] = {**document["counts"], "none": len(document["no_figure"])}
    cells = sum(counts.values()) or 1
    shares = {name: round(100 * count / cells, 1) for name, count in counts.items()}
    return {"cells": cells, "percent": shares}


if __name__ == "__main__":
    raise SystemExit(main())
