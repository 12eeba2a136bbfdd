"""The campaign's side of GPU telemetry: collects samples and joins them to runs by time."""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from qwencli.engine.machine.child_process import PAUSE, RESUME, python_command

INTERVAL_S = 0.05
Sample = dict[str, Any]


class Telemetry:
    """Runs the sampler process; a context manager.

    Args:
        command: the sampler; None where there is no GPU: then all samples are empty.
    """

    def __init__(self, command: Sequence[str] | None) -> None:
        self._command = command
        self._samples: list[Sample] = []
        self._latest_taken: Sample | None = None
        self._arrived = threading.Condition()
        self._alive = False
        self._closing = False
        self.unavailable: str | None = None

    def __enter__(self) -> Self:
        if self._command is None:
            return self
        self._alive = True
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            if not line.endswith(b"\n"):  # the sampler was ended while writing it
                break
            sample = json.loads(line)
            with self._arrived:
                if "unavailable" in sample:
                    self.unavailable = sample["unavailable"]
                else:
                    self._samples.append(sample)
                self._arrived.notify_all()
        with self._arrived:
            self._alive = False
            if not self._closing and self.unavailable is None:
                self.unavailable = "the sampler process ended by itself"
            self._arrived.notify_all()

    def switch(self, *, on: bool) -> None:
        """Let the sampler sample, or be quiet."""
        if self._command is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended by itself, which the end of its samples tells
            self._process.stdin.write(RESUME if on else PAUSE)
            self._process.stdin.flush()

    def take(self, start_s: float, end_s: float) -> tuple[Sample | None, list[Sample]]:
        """The last sample before a run and the samples within it; older ones are forgotten.

        Runs may follow each other more closely than samples: then the last one before a run is of
        the run before. Waits for the first sample after the run, at most half a second.
        """
        with self._arrived:
            self._arrived.wait_for(
                lambda: (
                    not self._alive or (bool(self._samples) and self._samples[-1]["t_s"] > end_s)
                ),
                timeout=0.5,
            )
            samples = [sample for sample in self._samples if sample["t_s"] <= end_s]
            self._samples = self._samples[len(samples) :]
        earlier = [sample for sample in samples if sample["t_s"] < start_s]
        within = samples[len(earlier) :]
        before = earlier[-1] if earlier else self._latest_taken
        self._latest_taken = samples[-1] if samples else self._latest_taken
        return before, within

    def temperature_c(self) -> float | None:
        """The latest reading of the hottest GPU; None where nothing can be read."""
        with self._arrived:
            latest = self._samples[-1]["t_s"] if self._samples else None
            hot = [
                sample["temperature_c"]
                for sample in self._samples
                if sample["t_s"] == latest and sample["temperature_c"] is not None
            ]
        return max(hot, default=None) if self._alive else None

    def __exit__(self, *exc: object) -> None:
        if self._command is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._closing = True
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdin.close()
        self._process.stdout.close()


def sampler_command(uuid: str | None) -> list[str]:
    """Samples the device of this UUID, or all devices."""
    return python_command(
        "qwencli.bench.measure.nvml_sampler", str(INTERVAL_S), *(() if uuid is None else (uuid,))
    )


def run_columns(before: Sample | None, within: Sequence[Sample]) -> dict[str, Any]:
    """The sensor columns of runs.csv; None for what no sample has."""

    def read(column: str) -> list[Any]:
        return [sample[column] for sample in within if sample[column] is not None]

    def mean(column: str) -> float | None:
        return statistics.fmean(read(column)) if read(column) else None

    reasons = {name for joined in read("throttle_reasons") for name in joined.split("|")}
    return {
        "sm_clock_mhz_before": before["sm_clock_mhz"] if before else None,
        "sm_clock_mhz_mean": mean("sm_clock_mhz"),
        "sm_clock_mhz_min": min(read("sm_clock_mhz"), default=None),
        "mem_clock_mhz_mean": mean("mem_clock_mhz"),
        "power_w_mean": mean("power_w"),
        "temperature_c_max": max(read("temperature_c"), default=None),
        "throttle_reasons": "|".join(sorted(reasons - {"none"}) or sorted(reasons)) or None,
    }
