"""Disturbs whole cells of `bench` from outside: is none called ok, and is the cause named?

    python benchmarks/planted_disturbances.py --out campaigns/planted -- --matrix quick
    python benchmarks/planted_disturbances.py --out campaigns/planted --kinds quiet,gpu \
        -- --matrix quick --model qwen3-vl-2b --load-format dummy --no-quality

Each kind of disturbance lasts as long as the campaign beside it, which is what no rule that
compares a cell's runs can see. Kinds are made in turns, `--rounds` times; the words after `--` go
to `bench`.

    quiet      nothing
    all_cores  a program that computes without pause for each processor
    one_core   one such program, tied to one processor
    cpu_limit  a control group with a limit of 20 % of one processor (version 2 or 1 of cgroups)
    stopped    SIGSTOP for 80 of every 100 ms: no limit of a control group, but where none can be
               made the same share of time is left
    copier     a program that copies memory for each processor but one
    gpu        a program that multiplies matrices on the GPU

`--power FOLDER` simulates a power limit, which is not ours to set: half of the cells of that
campaign, or its only one, get clocks held back to three quarters, in a copy.

Prints a line for each cell and, as the last line, one JSON object: disturbed cells called ok, the
share whose cause was named right, quiet cells refused, and how long those waited for a processor.
All cells stand in cells.json beside the campaigns. A kind that cannot be made here is named.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from qwencli.bench.causes import Cause
from qwencli.bench.inject.contention import COMPUTING, COPYING, programs
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.storage import columns

LIMIT_PERCENT = 20
PERIOD_S = 0.1
HELD_CLOCK = 0.75
_WAITED = (Cause.PREEMPTION, Cause.HELPER_PREEMPTED)
# What a kind may be called. Who has the processor has its caches, too.
RIGHT: Mapping[str, tuple[Cause, ...]] = {
    "all_cores": _WAITED,
    "one_core": _WAITED,
    "cpu_limit": (Cause.CGROUP_THROTTLED,),
    "stopped": (Cause.SUSPENDED,),
    "copier": (*_WAITED, Cause.PROCESSOR),
    "gpu": (Cause.OTHER_GPU_PROCESS,),
    "power": (Cause.THROTTLE,),
}
ON_GPU = """
import os, threading, torch
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
for _ in range(3):
    a @ a
torch.cuda.synchronize()
print(flush=True)
while True:
    for _ in range(16):
        a @ a
    torch.cuda.synchronize()
"""
Beside = Callable[[subprocess.Popen[bytes]], AbstractContextManager[object]]


class NotHere(Exception):
    """A disturbance that this machine does not allow."""


@dataclass(frozen=True)
class Disturbed:
    """One cell: its verdict, and the causes of its rows of scope "cell", what cost most first."""

    kind: str
    cell: str
    status: str
    verdict: str
    waited_percent: float | None
    others_cpu_percent: float | None
    causes: list[str]

    @property
    def quotable(self) -> bool:
        return self.verdict == "ok"

    @property
    def named(self) -> bool:
        """The right cause is among those that a limit was passed by."""
        return any(cause in RIGHT[self.kind] for cause in self.causes)


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    cells: list[Disturbed] = []
    left_out: dict[str, str] = {}
    for number in range(1, options.rounds + 1):
        for kind in options.kinds.split(",") if options.kinds else []:
            folder = options.out / f"{kind}-{number}"
            try:
                _measure(kind, folder, options.bench)
            except NotHere as error:
                left_out[kind] = str(error)
                continue
            cells += _read(kind, folder)
            _save(options.out, cells)
    for number, campaign in enumerate(options.power, start=1):
        cells += _held_back(campaign, options.out / f"power-{number}")
        _save(options.out, cells)
    for cell in cells:
        print(f"{cell.kind:10} {cell.cell}: {cell.verdict or cell.status}; {cell.causes}")
    print(json.dumps({**_summary(cells), "not_made_here": left_out}))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the campaigns")
    parser.add_argument(
        "--kinds",
        default="quiet,all_cores,one_core,cpu_limit,copier",
        help="comma list of the kinds above",
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--power", type=Path, metavar="FOLDER", action="append", default=[],
        help="a campaign of a GPU; repeatable",
    )  # fmt: skip
    parser.add_argument("bench", nargs="*", help="after --: options of bench")
    options = parser.parse_args()
    for kind in filter(None, options.kinds.split(",")):
        if kind != "quiet" and kind not in KINDS:
            parser.error(f"--kinds has no {kind!r}: quiet, {', '.join(KINDS)}")
    return options


def _measure(kind: str, folder: Path, bench: Sequence[str]) -> None:
    """Run the campaign with the disturbance beside it, from its start to its end.

    Raises:
        NotHere: it cannot be made on this machine.
    """
    command = [sys.executable, "-m", "qwencli", "bench", *bench, "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        if kind == "quiet":
            process.wait()
        else:
            with KINDS[kind](process):
                process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def all_cores(process: subprocess.Popen[bytes]) -> Iterator[None]:
    with programs(COMPUTING, os.cpu_count() or 1):
        yield


@contextmanager
def one_core(process: subprocess.Popen[bytes]) -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        raise NotHere("this system ties no process to a processor")
    with programs(COMPUTING, 1) as (hog,):
        os.sched_setaffinity(hog.pid, {min(os.sched_getaffinity(0))})
        yield


@contextmanager
def copier(process: subprocess.Popen[bytes]) -> Iterator[None]:
    with programs(COPYING, max(1, (os.cpu_count() or 1) - 1)):
        yield


@contextmanager
def on_gpu(process: subprocess.Popen[bytes]) -> Iterator[None]:
    if not shutil.which("nvidia-smi"):
        raise NotHere("there is no NVIDIA GPU")
    with programs(ON_GPU, 1):
        yield


@contextmanager
def cpu_limit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """The campaign and all that it starts get LIMIT_PERCENT of one processor."""
    period_us = round(1e6 * PERIOD_S)
    quota_us = period_us * LIMIT_PERCENT // 100
    for root, name, text in (
        (Path("/sys/fs/cgroup"), "cpu.max", f"{quota_us} {period_us}"),
        (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", str(quota_us)),
    ):
        group = root / f"qwencli-planted-{process.pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            # A control group has these at once; elsewhere they would be files of no effect.
            for file, said in ((name, text), ("cgroup.procs", str(process.pid))):
                with (group / file).open("r+") as opened:
                    opened.write(said)
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        try:
            yield
        finally:
            with suppress(OSError):  # what the campaign started may take a moment to go
                group.rmdir()
        return
    raise NotHere("no control group can be made here (try --kinds stopped)")


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """The workers, which are the campaign's children, run LIMIT_PERCENT of the time."""
    if sys.platform == "win32":
        raise NotHere("Windows has no SIGSTOP")
    over = threading.Event()

    def stop_and_go() -> None:
        campaign = psutil.Process(process.pid)
        while not over.is_set():
            found: list[psutil.Process] = []
            with suppress(psutil.Error):
                found = campaign.children(recursive=True)
            _signal(found, signal.SIGSTOP)
            over.wait(PERIOD_S * (1 - LIMIT_PERCENT / 100))
            _signal(found, signal.SIGCONT)
            over.wait(PERIOD_S * LIMIT_PERCENT / 100)

    thread = threading.Thread(target=stop_and_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _signal(found: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in found:
        with suppress(psutil.Error):
            process.send_signal(number)


KINDS: Mapping[str, Beside] = {
    "all_cores": all_cores,
    "one_core": one_core,
    "cpu_limit": cpu_limit,
    "stopped": stopped,
    "copier": copier,
    "gpu": on_gpu,
}


def _held_back(campaign: Path, copy: Path) -> list[Disturbed]:
    """A power limit as its sensors would show it: in every other cell, or the only one, clocks are
    HELD_CLOCK of what they were, and the driver says why."""
    shutil.copytree(campaign, copy)
    for packed in copy.glob("*.csv.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    with (copy / "gpu.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(columns.GPU)
    highest = max(float(row["sm_clock_mhz"]) for row in rows if row["sm_clock_mhz"])
    held = set(list(dict.fromkeys(row["cell_id"] for row in rows))[::2])
    for row in rows:
        if row["cell_id"] in held and row["sm_clock_mhz"]:
            row["sm_clock_mhz"] = f"{HELD_CLOCK * float(row['sm_clock_mhz']):.0f}"
            row["throttle_reasons"] = "sw_power_cap"
            row["power_limit_percent"] = f"{100 * HELD_CLOCK:g}"
            row["max_sm_clock_mhz"] = f"{highest:.0f}"
    with (copy / "gpu.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    build_report(copy)
    return [cell for cell in _read("power", copy) if cell.cell in held]


def _read(kind: str, folder: Path) -> list[Disturbed]:
    """The cells that were measured."""
    causes: dict[str, list[str]] = {}
    if not (folder / "cells.csv").exists():
        return []
    for row in _rows(folder / "causes.csv"):
        if row["scope"] == "cell":
            causes.setdefault(row["cell_id"], []).append(row["cause"])
    return [
        Disturbed(
            kind,
            row["cell_id"],
            row["status"],
            row["verdict"],
            _number(row["waited_percent"]),
            _number(row["others_cpu_percent"]),
            causes.get(row["cell_id"], []),
        )
        for row in _rows(folder / "cells.csv")
        if row["status"] != "skipped"
    ]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float | None:
    return float(text) if text else None


def _summary(cells: Sequence[Disturbed]) -> dict[str, Any]:
    quiet = [cell for cell in cells if cell.kind == "quiet"]
    disturbed = [cell for cell in cells if cell.kind != "quiet" and cell.verdict]
    kinds = dict.fromkeys(cell.kind for cell in disturbed)
    waited = [cell.waited_percent for cell in quiet if cell.waited_percent is not None]
    return {
        "disturbed": len(disturbed),
        "called_ok": sum(cell.quotable for cell in disturbed),
        "named_right_percent": _percent([cell.named for cell in disturbed]),
        "by_kind": {
            kind: {
                "cells": len(own),
                "called_ok": sum(cell.quotable for cell in own),
                "named_right_percent": _percent([cell.named for cell in own]),
            }
            for kind in kinds
            if (own := [cell for cell in disturbed if cell.kind == kind])
        },
        "quiet": len(quiet),
        "quiet_refused": sum(cell.verdict.startswith("not quotable") for cell in quiet),
        "quiet_waited_percent_at_most": max(waited, default=None),
    }


def _percent(held: Sequence[bool]) -> float | None:
    return round(100 * sum(held) / len(held), 1) if held else None


def _save(out: Path, cells: Sequence[Disturbed]) -> None:
    text = json.dumps([asdict(cell) for cell in cells], indent=1)
    (out / "cells.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
