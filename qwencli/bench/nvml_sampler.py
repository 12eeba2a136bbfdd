"""A process of its own that reads GPU sensors through NVML and prints them as JSON lines.

Not a thread of the measured process: there it would take the interpreter lock from the decode
loop it is meant to observe.

    python -m qwencli.bench.nvml_sampler INTERVAL_S [UUID]

Prints {"unavailable": reason} and ends when NVML cannot be used; is quiet from a "-" on its stdin
until a "+"; ends when its stdin closes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from qwencli.bench.launch import end_with_the_campaign
from qwencli.engine.gpu_sensors import throttle_reasons
from qwencli.engine.host import open_nvml


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


def read_sample(nvml: Any, handle: Any, index: int) -> dict[str, Any]:
    """One reading of all sensors; what this device does not offer is None."""
    sample: dict[str, Any] = {"t_s": time.perf_counter(), "gpu_index": index}
    for column, read in sensors(nvml).items():
        try:
            sample[column] = read(handle)
        except nvml.NVMLError:
            sample[column] = None
    return sample


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
    threading.Thread(target=end_with_the_campaign, args=(going,), daemon=True).start()
    due = time.perf_counter()
    while True:
        going.wait()
        for index, handle in handles:
            _say(read_sample(nvml, handle, index))
        due = max(due + interval_s, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))


def _say(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
