"""Asks NVML about the GPUs: what they are, how they are set up, and what they do right now.

Nothing here changes a setting. A figure that a device does not offer is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath, PureWindowsPath
from typing import Any, TypeVar

from qwencli.engine.machine.host import nvml_handle, open_nvml


@dataclass(frozen=True)
class ClockSample:
    """One moment of one GPU."""

    sm_clock_mhz: int | None = None
    mem_clock_mhz: int | None = None
    pstate: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    pcie_gen: int | None = None
    pcie_width: int | None = None


@dataclass(frozen=True)
class LoadReading:
    """A GPU while it worked: medians of the clocks, the worst of the rest, the best of the link."""

    samples: int
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    pstate: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    pcie_gen: int | None = None
    pcie_width: int | None = None


@dataclass(frozen=True)
class GpuProcess:
    """A program that uses the GPU; `name` without its folder, `used_bytes` None on WDDM."""

    pid: int
    name: str | None
    used_bytes: int | None
    compute: bool


@dataclass(frozen=True)
class GpuReading:
    """One GPU.

    Args:
        max_pcie_gen: of device and slot together; device_max_pcie_gen: of the device alone.
        memory_bus_bits, max_mem_clock_mhz: together the vendor's bandwidth, see
            `vendor_bytes_per_s`.
        bar1_bytes: what of its memory the host can address at once.
    """

    index: int
    name: str
    now: ClockSample
    uuid: str | None = None
    driver_model: str | None = None
    total_memory_bytes: int | None = None
    free_memory_bytes: int | None = None
    bar1_bytes: int | None = None
    memory_bus_bits: int | None = None
    max_mem_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    max_pcie_gen: int | None = None
    device_max_pcie_gen: int | None = None
    max_pcie_width: int | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    slowdown_temperature_c: int | None = None
    ecc: bool | None = None
    uncorrected_errors: int | None = None
    mig: bool | None = None
    processes: tuple[GpuProcess, ...] = ()

    @property
    def vendor_bytes_per_s(self) -> float | None:
        """Twice the memory clock times the bus width: both edges carry data. Gives the vendors'
        1,792 GB/s for a GeForce RTX 5090 (14,001 MHz, 512 bits)."""
        if not self.max_mem_clock_mhz or not self.memory_bus_bits:
            return None
        return 2e6 * self.max_mem_clock_mhz * self.memory_bus_bits / 8


@dataclass(frozen=True)
class DriverReading:
    """The NVIDIA driver. `problem` says why it does not answer although it is there."""

    version: str | None
    cuda: str | None
    gpus: tuple[GpuReading, ...]
    problem: str | None = None


T = TypeVar("T")

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons (nvml.h, nvmlClocksEventReasons).
THROTTLE_BITS: Mapping[int, str] = {
    0x1: "idle",
    0x2: "application_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
}
_DRIVER_MODELS = ("WDDM", "TCC", "MCDM")
_LARGEST_LIMIT_W = 5000.0


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """Names of the reasons that hold the clock back."""
    return tuple(name for bit, name in THROTTLE_BITS.items() if bits & bit)


def read_driver() -> DriverReading | None:
    """The driver and its GPUs; None where there is none, or no nvidia-ml-py to ask it."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        with open_nvml() as nvml:
            return read_all(nvml)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return None
        return DriverReading(None, None, (), str(error))


def read_all(nvml: Any) -> DriverReading:
    """As `read_driver`, with NVML already open."""
    cuda = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    count = _ask(nvml, nvml.nvmlDeviceGetCount) or 0
    return DriverReading(
        version=str(nvml.nvmlSystemGetDriverVersion()),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        gpus=tuple(_read_gpu(nvml, index) for index in range(count)),
    )


def _read_gpu(nvml: Any, index: int) -> GpuReading:
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(name: str, *arguments: Any) -> Any:
        # A wrapper older than a function does not have it.
        function = getattr(nvml, name, None)
        return None if function is None else _ask(nvml, lambda: function(gpu, *arguments))

    memory, bar1 = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetBAR1MemoryInfo")
    model = ask("nvmlDeviceGetDriverModel")
    ecc, mig = ask("nvmlDeviceGetEccMode"), ask("nvmlDeviceGetMigMode")
    return GpuReading(
        index=index,
        name=str(nvml.nvmlDeviceGetName(gpu)),
        now=read_clocks(nvml, gpu),
        uuid=_text(ask("nvmlDeviceGetUUID")),
        driver_model=None if model is None else _DRIVER_MODELS[model[0]],
        total_memory_bytes=None if memory is None else int(memory.total),
        free_memory_bytes=None if memory is None else int(memory.free),
        bar1_bytes=None if bar1 is None else int(bar1.bar1Total),
        memory_bus_bits=ask("nvmlDeviceGetMemoryBusWidth"),
        max_mem_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
        max_sm_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        max_pcie_gen=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        device_max_pcie_gen=ask("nvmlDeviceGetGpuMaxPcieLinkGeneration"),
        max_pcie_width=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        power_limit_w=_watts(ask("nvmlDeviceGetEnforcedPowerLimit")),
        default_power_limit_w=_watts(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        slowdown_temperature_c=ask(
            "nvmlDeviceGetTemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        ),
        ecc=None if ecc is None else bool(ecc[0]),
        uncorrected_errors=ask(
            "nvmlDeviceGetTotalEccErrors",
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        ),
        mig=None if mig is None else bool(mig[0]),
        processes=_processes(
            nvml,
            ask("nvmlDeviceGetComputeRunningProcesses") or (),
            ask("nvmlDeviceGetGraphicsRunningProcesses") or (),
        ),
    )


def _ask(nvml: Any, question: Callable[[], T]) -> T | None:
    try:
        return question()
    except nvml.NVMLError:
        return None


def _watts(milliwatts: int | None) -> float | None:
    # Laptops whose limit is set by the firmware report nonsense in the millions.
    watts = None if milliwatts is None else milliwatts / 1e3
    return watts if watts is not None and 0 < watts < _LARGEST_LIMIT_W else None


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _processes(
    nvml: Any, compute: Sequence[Any], graphics: Sequence[Any]
) -> tuple[GpuProcess, ...]:
    computing = {process.pid for process in compute}
    found = {process.pid: process for process in (*graphics, *compute)}
    return tuple(
        GpuProcess(pid, _process_name(nvml, pid), process.usedGpuMemory, pid in computing)
        for pid, process in sorted(found.items())
        if pid != os.getpid()
    )


def _process_name(nvml: Any, pid: int) -> str | None:
    path = _text(_ask(nvml, lambda: nvml.nvmlSystemGetProcessName(pid)))
    if not path:
        return None
    return (PureWindowsPath(path) if "\\" in path else PurePath(path.split(" ")[0])).name


def read_clocks(nvml: Any, gpu: Any) -> ClockSample:
    """What the GPU of this handle does right now."""

    def ask(name: str, *arguments: Any) -> Any:
        return _ask(nvml, lambda: getattr(nvml, name)(gpu, *arguments))

    reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    power = ask("nvmlDeviceGetPowerUsage")
    return ClockSample(
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        mem_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        pstate=ask("nvmlDeviceGetPerformanceState"),
        power_w=None if power is None else power / 1e3,
        temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=None if reasons is None else throttle_reasons(reasons),
        pcie_gen=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
    )


def clock_samples(device: str) -> Iterator[ClockSample]:
    """What a GPU does, each time it is asked; ends where there is none, or the driver is silent.

    Args:
        device: as torch names it.
    """
    if not device.startswith("cuda"):
        return
    try:
        import pynvml
    except ImportError:
        return
    with suppress(pynvml.NVMLError), open_nvml() as nvml:
        gpu = nvml_handle(nvml, device)
        while True:
            yield read_clocks(nvml, gpu)
