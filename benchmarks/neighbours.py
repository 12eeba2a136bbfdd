"""Runs a command while other processes copy memory, or compute, in turns with nothing beside it.

    python benchmarks/neighbours.py --kind copying --seconds 5 -- qwencli bench --engine native

What it shows: how much such neighbours cost, and whether the campaign's own evidence names them
(`pointer_chase_us` in runs.csv, `processor` in causes.csv). The exit code is the command's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import nullcontext

from qwencli.bench.inject import contention

KINDS = {"copying": contention.COPYING, "computing": contention.COMPUTING}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    if not options.seconds > 0:
        parser.error("--seconds: give more than 0")
    try:
        process = subprocess.Popen(options.command)
    except OSError as error:
        parser.error(f"{options.command[0]} cannot be run: {error.strerror}")
    accompanied = False
    try:
        while True:
            program = KINDS[options.kind]
            with contention.neighbours(program) if accompanied else nullcontext():
                try:
                    return process.wait(options.seconds)
                except subprocess.TimeoutExpired:
                    accompanied = not accompanied
    except KeyboardInterrupt:  # the command has it from the terminal as well
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
