"""A process of its own that reads GPU sensors through NVML and prints them as JSON lines.

Not a thread of the measured process: there it would take the interpreter lock from the decode
loop it is meant to observe.

    python -m qwencli.bench.measure.nvml_sampler INTERVAL_S [UUID]

Prints {"unavailable": reason} and ends when NVML cannot be used; is quiet from a "-" on its stdin
until a "+"; ends when its stdin closes.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from qwencli.engine.machine.child_process import end_with_parent
from qwencli.engine.machine.gpu_sensors import throttle_reasons
from qwencli.engine.machine.host import open_nvml


def throttle_names(bits: int) -> str:
    """Names joined by "|"; "none" when nothing holds the clock back."""
    return "|".join(throttle_reasons(bits)) or "none"


def sensors(nvml: Any) -> Mapping[str, Callable[[Any], Any]]:
    """Column of gpu.csv -> how to read it from a device handle."""
    return {
        "sm_clock_mhz": lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM),
        "mem_clock_mhz": lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_MEM),
        "pstate": nvml.nvmlDeviceGetPerformanceState,
        "power_w": lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1e3,
        "temperature_c": lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU),
        "utilization_percent": lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu,
        "memory_used_bytes": lambda h: nvml.nvmlDeviceGetMemoryInfo(h).used,
        "throttle_reasons": lambda h: throttle_names(
            nvml.nvmlDeviceGetCurrentClocksThrottleReasons(h)
        ),
        "pcie_gen": nvml.nvmlDeviceGetCurrPcieLinkGeneration,
        "pcie_width": nvml.nvmlDeviceGetCurrPcieLinkWidth,
        "compute_processes": lambda h: len(nvml.nvmlDeviceGetComputeRunningProcesses(h)),
    }


class CardLimits:
    """What a GPU may do at most: its highest clock, and the power limit that holds now as a share
    of the one that it comes with. Read once in EVERY_S, as they hardly ever change."""

    EVERY_S = 1.0

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._read_s = -math.inf
        self._limits: dict[str, Any] = {}

    def read(self, handle: Any, now_s: float) -> Mapping[str, Any]:
        """Columns of gpu.csv; None what this device does not tell."""
        if now_s - self._read_s >= self.EVERY_S:
            self._read_s = now_s
            nvml = self._nvml
            self._limits = {
                "max_sm_clock_mhz": self._asked(
                    lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
                ),
                "power_limit_percent": self._asked(lambda: _power_limit_percent(nvml, handle)),
            }
        return self._limits

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._nvml.NVMLError:
            return None


def _power_limit_percent(nvml: Any, handle: Any) -> float | None:
    usual = nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)
    return 100 * nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / usual if usual else None


# NVML_ERROR_NOT_FOUND: no program has used the GPU since the last time.
NOT_FOUND = 6


class OtherPrograms:
    """What programs beside the busiest one had of a GPU: `other_sm_percent` of gpu.csv.

    A program that merely holds memory has none. Who is who is not known: a container sees other
    process numbers than the driver. The driver's own samples are rarer than ours, so its last word
    holds for HOLD_S.
    """

    HOLD_S = 1.0

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        # A wrapper older than the function does not have it.
        self._ask = getattr(nvml, "nvmlDeviceGetProcessUtilization", None)
        self._since_us = 0
        self._last: tuple[float, float] | None = None

    def percent(self, handle: Any, now_s: float) -> float | None:
        """None where the driver does not tell."""
        if self._ask is None:
            return None
        try:
            samples = self._ask(handle, self._since_us)
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) != NOT_FOUND:
                return None
            samples = []
        new = [sample for sample in samples if sample.timeStamp > self._since_us]
        if new:
            self._since_us = max(sample.timeStamp for sample in new)
            used: dict[int, float] = {}
            for sample in new:
                used[sample.pid] = max(used.get(sample.pid, 0.0), float(sample.smUtil))
            self._last = now_s, sum(used.values()) - max(used.values())
        if self._last is None or now_s - self._last[0] > self.HOLD_S:
            return 0.0
        return self._last[1]


def read_sample(
    nvml: Any, handle: Any, index: int, others: OtherPrograms, limits: CardLimits
) -> dict[str, Any]:
    """One reading of all sensors; what this device does not offer is None."""
    sample: dict[str, Any] = {"t_s": time.perf_counter(), "gpu_index": index}
    for column, read in sensors(nvml).items():
        try:
            sample[column] = read(handle)
        except nvml.NVMLError:
            sample[column] = None
    sample["other_sm_percent"] = others.percent(handle, sample["t_s"])
    return {**sample, **limits.read(handle, sample["t_s"])}


def _handles(nvml: Any, uuid: str | None) -> list[tuple[int, Any]]:
    if uuid is None:
        count = nvml.nvmlDeviceGetCount()
        return [(index, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    return [(nvml.nvmlDeviceGetIndex(handle), handle)]


def main(interval_s: float, uuid: str | None) -> int:
    """Sample every `interval_s` seconds until the campaign ends."""
    try:
        import pynvml
    except ImportError as error:
        _say({"unavailable": f"nvidia-ml-py is not installed: {error}"})
        return 0
    try:
        with open_nvml() as nvml:
            _sample_forever(nvml, _handles(nvml, uuid), interval_s)
    except pynvml.NVMLError as error:
        _say({"unavailable": f"NVML: {error}"})
    return 0


def _sample_forever(nvml: Any, handles: list[tuple[int, Any]], interval_s: float) -> None:
    going = threading.Event()
    going.set()
    threading.Thread(target=end_with_parent, args=(going,), daemon=True).start()
    due = time.perf_counter()
    others = {index: OtherPrograms(nvml) for index, _ in handles}
    limits = {index: CardLimits(nvml) for index, _ in handles}
    while True:
        going.wait()
        for index, handle in handles:
            _say(read_sample(nvml, handle, index, others[index], limits[index]))
        due = max(due + interval_s, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))


def _say(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
