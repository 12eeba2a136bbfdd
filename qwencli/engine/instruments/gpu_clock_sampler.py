"""Watches a GPU's clocks, power and link while another process works on it."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from typing import Any, Self

from qwencli.engine.machine.gpu_sensors import ClockSample, LoadReading, read_clocks
from qwencli.engine.machine.host import open_nvml

INTERVAL_S = 0.05


class GpuClockSampler:
    """Samples one GPU, named by its NVML index, while the block runs; a context manager.

    `reading()` afterwards sums it up, or is None where nothing could be read. A thread of this
    process: the work that is watched runs in another one.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._samples: list[ClockSample] = []
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import pynvml

        try:
            with open_nvml() as nvml:
                gpu = nvml.nvmlDeviceGetHandleByIndex(self._index)
                while not self._done.wait(INTERVAL_S):
                    self._samples.append(read_clocks(nvml, gpu))
        except pynvml.NVMLError:
            return  # then there is no reading

    def reading(self) -> LoadReading | None:
        return summary(self._samples)


def summary(samples: Sequence[ClockSample]) -> LoadReading | None:
    """The busy part of the samples in one reading.

    Work starts and ends within the watched time, so only samples that draw at least the median
    power count; where power is unknown, all of them.
    """
    if not samples:
        return None
    drawn = [s.power_w for s in samples if s.power_w is not None]
    floor = statistics.median(drawn) if drawn else 0.0
    busy = [s for s in samples if s.power_w is None or s.power_w >= floor]

    def known(name: str) -> list[Any]:
        return [value for s in busy if (value := getattr(s, name)) is not None]

    def median(name: str) -> float | None:
        return statistics.median(known(name)) if known(name) else None

    return LoadReading(
        samples=len(busy),
        sm_clock_mhz=median("sm_clock_mhz"),
        mem_clock_mhz=median("mem_clock_mhz"),
        pstate=max(known("pstate"), default=None),
        power_w=max(known("power_w"), default=None),
        temperature_c=max(known("temperature_c"), default=None),
        throttle_reasons=tuple(
            sorted({r for reasons in known("throttle_reasons") for r in reasons})
        ),
        pcie_gen=max(known("pcie_gen"), default=None),
        pcie_width=max(known("pcie_width"), default=None),
    )
