"""What NVML says about GPUs, as data. A figure that a device does not offer is None."""

from __future__ import annotations

from dataclasses import dataclass


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
