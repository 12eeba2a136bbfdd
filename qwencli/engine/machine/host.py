"""What this machine is without asking torch: processor, memory, NVIDIA driver."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cpu_model() -> str | None:
    """The processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    if sys.platform == "linux" and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def usable_cores() -> int:
    """Logical cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclass(frozen=True)
class HostMemory:
    """Bytes; `available` is what a new program can have."""

    total_bytes: int
    available_bytes: int


def host_memory() -> HostMemory:
    """Physical memory of this machine."""
    import psutil

    memory = psutil.virtual_memory()
    return HostMemory(memory.total, memory.available)


@contextmanager
def open_nvml() -> Iterator[Any]:
    """The initialised `pynvml` module.

    Raises:
        ImportError: nvidia-ml-py is not installed.
        pynvml.NVMLError: there is no NVIDIA driver here, or it refuses.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _from_driver(ask: Callable[[Any], T]) -> T | None:
    """What the driver answers; None where there is no NVIDIA driver or no nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        with open_nvml() as nvml:
            return ask(nvml)
    except pynvml.NVMLError:
        return None


def _gpus(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]


def gpu_free_bytes() -> int | None:
    """Free memory of the NVIDIA GPU that has most of it; None without one, or without a driver."""
    return _from_driver(
        lambda nvml: max(
            (int(nvml.nvmlDeviceGetMemoryInfo(gpu).free) for gpu in _gpus(nvml)), default=None
        )
    )


def driver_version() -> str | None:
    """None where there is no NVIDIA driver or no nvidia-ml-py."""
    return _from_driver(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()))


def gpu_use(device: str) -> Iterator[int]:
    """How many percent of the time the GPU was busy lately, each time it is asked; ends where the
    driver does not say.

    Args:
        device: as torch names it; which of the driver's it is, CUDA_VISIBLE_DEVICES decides.
    """
    import pynvml

    index = int(device.partition(":")[2] or 0)
    shown = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = shown[index] if index < len(shown) and shown[index] else str(index)
    with suppress(pynvml.NVMLError), open_nvml() as nvml:
        if name.isdecimal():
            gpu = nvml.nvmlDeviceGetHandleByIndex(int(name))
        else:
            gpu = nvml.nvmlDeviceGetHandleByUUID(name)
        while True:
            yield int(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
