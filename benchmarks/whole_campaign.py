"""Runs the steps of a whole campaign, one at a time on each GPU, the longest first.

    python benchmarks/whole_campaign.py --out campaigns/whole [--only modes,engines] [--gpus N]

Each step is a command of its own with one GPU to see and, where the system can tie a process to
cores, its share of them, so that steps beside each other disturb each other least. What a step
prints goes to OUT/NAME.log. Steps that ended are not run again; one that was cut off goes on, if
its command can. Ctrl-C reaches every step that runs, and no other begins. The exit code is 1 when a
step failed.
"""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwencli.engine.machine.gpu_sensors import read_driver

STEPS = Path(__file__).parent / "steps" / "gpu.toml"
# A campaign that ran to its end, with a cell that broke or whose figures do not hold.
ENDED = (0, 1)
# By Ctrl-C, which the terminal sends to all programs at once.
INTERRUPTED = (130, -signal.SIGINT)


@dataclass(frozen=True)
class Step:
    name: str
    minutes: float
    command: str

    def arguments(self, out: Path) -> list[str]:
        """What to run; a campaign that is in its folder already goes on."""
        folder = out / self.name
        words = [word.replace("{out}", str(folder)) for word in shlex.split(self.command)]
        program, *rest = words
        found = [sys.executable] if program == "python" else [sys.executable, "-m", program]
        begun = folder.is_dir() and any(folder.iterdir())
        return [*found, *rest, *(["--resume"] if begun and program == "qwencli" else [])]


def read_steps(path: Path, only: Collection[str]) -> list[Step]:
    """The steps, the longest first; those named in `only`, or all.

    Raises:
        SystemExit: a name that no step has.
    """
    steps = [Step(**step) for step in tomllib.loads(path.read_text(encoding="utf-8"))["steps"]]
    if unknown := sorted(set(only) - {step.name for step in steps}):
        raise SystemExit(f"no step {unknown[0]}: {', '.join(step.name for step in steps)}")
    chosen = [step for step in steps if not only or step.name in only]
    return sorted(chosen, key=lambda step: -step.minutes)


def cores_of(gpu: int, gpus: int) -> set[int]:
    """This GPU's share of the processor's cores; empty where processes cannot be tied to some."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // gpus)
    return set(cores[gpu * share : (gpu + 1) * share])


class WholeCampaign:
    """All steps, on so many GPUs; `run` returns how many failed."""

    def __init__(self, steps: Sequence[Step], out: Path, gpus: int) -> None:
        self._out, self._gpus = out, gpus
        self._waiting: queue.SimpleQueue[Step] = queue.SimpleQueue()
        for step in steps:
            self._waiting.put(step)
        self._failed: list[str] = []
        self._stopping = threading.Event()

    def run(self) -> int:
        self._out.mkdir(parents=True, exist_ok=True)
        lanes = [threading.Thread(target=self._lane, args=(gpu,)) for gpu in range(self._gpus)]
        for lane in lanes:
            lane.start()
        try:
            for lane in lanes:
                # With an end, so that Ctrl-C is seen on every system.
                while lane.is_alive():
                    lane.join(0.2)
        except KeyboardInterrupt:
            self._stopping.set()
            for lane in lanes:
                lane.join()
        if self._stopping.is_set():
            raise KeyboardInterrupt
        return len(self._failed)

    def _lane(self, gpu: int) -> None:
        while not self._stopping.is_set():
            try:
                step = self._waiting.get_nowait()
            except queue.Empty:
                return
            if not (self._out / f"{step.name}.ended").exists():
                self._run(step, gpu)

    def _run(self, step: Step, gpu: int) -> None:
        began, cores = time.monotonic(), cores_of(gpu, self._gpus)
        arguments = step.arguments(self._out)
        if not step.command.startswith("qwencli"):
            (self._out / step.name).mkdir(exist_ok=True)
        with (self._out / f"{step.name}.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
            )
            if cores:
                os.sched_setaffinity(process.pid, cores)
            code = process.wait()
        if code in INTERRUPTED:
            self._stopping.set()
        if code in ENDED:
            (self._out / f"{step.name}.ended").touch()
        if code != 0:
            self._failed.append(step.name)
        minutes = (time.monotonic() - began) / 60
        print(f"{step.name}: exit code {code} after {minutes:.1f} minutes, GPU {gpu}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=Path, default=STEPS, help="a TOML file of steps")
    parser.add_argument("--only", default="", help="names of steps, a comma list")
    parser.add_argument("--gpus", type=int, help="so many; default: all that the driver has")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    steps = read_steps(options.steps, [name for name in options.only.split(",") if name])
    driver = read_driver()
    gpus = options.gpus or (len(driver.gpus) if driver else 0)
    if gpus < 1:
        raise SystemExit("no NVIDIA GPU was found; --gpus N says that there are some")
    try:
        return 1 if WholeCampaign(steps, options.out, gpus).run() else 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
