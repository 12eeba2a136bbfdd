"""What this machine and its installation have, without asking torch: processor, memory, NVIDIA
driver, and which GPUs a torch wheel has code for.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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


class GpuMemory(NamedTuple):
    free_bytes: int
    total_bytes: int


def gpu_memory() -> GpuMemory | None:
    """The memory of the NVIDIA GPU with most of it free; None without a GPU or a driver."""

    def most_free(nvml: Any) -> GpuMemory | None:
        told = map(nvml.nvmlDeviceGetMemoryInfo, _gpus(nvml))
        return max((GpuMemory(int(one.free), int(one.total)) for one in told), default=None)

    return _from_driver(most_free)


def gpu_free_bytes() -> int | None:
    """Free memory of the NVIDIA GPU that has most of it; None without one, or without a driver."""
    memory = gpu_memory()
    return None if memory is None else memory.free_bytes


def num_gpus() -> int:
    """NVIDIA GPUs that a CUDA program may use here; 0 without one, or without a driver."""
    count = _from_driver(lambda nvml: int(nvml.nvmlDeviceGetCount())) or 0
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None or not count:
        return count
    # CUDA takes the names up to the first that is none.
    named = itertools.takewhile(
        lambda name: name and name != "-1", map(str.strip, shown.split(","))
    )
    return len(list(named))


def driver_version() -> str | None:
    """None where there is no NVIDIA driver or no nvidia-ml-py."""
    return _from_driver(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()))


def nvml_handle(nvml: Any, device: str) -> Any:
    """The driver's handle of a GPU.

    Args:
        device: as torch names it; which of the driver's it is, CUDA_VISIBLE_DEVICES decides.
    """
    index = int(device.partition(":")[2] or 0)
    shown = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = shown[index] if index < len(shown) and shown[index] else str(index)
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def gpu_use(device: str) -> Iterator[int]:
    """How many percent of the time the GPU was busy lately, each time it is asked; ends where the
    driver does not say.

    Args:
        device: see `nvml_handle`.
    """
    import pynvml

    with suppress(pynvml.NVMLError), open_nvml() as nvml:
        gpu = nvml_handle(nvml, device)
        while True:
            yield int(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)


Capability = tuple[int, int]


def has_code(capability: Capability, archs: Sequence[str]) -> bool:
    """Whether a GPU of this compute capability can run a wheel's code, given as torch lists it.

    Machine code (sm_NN) runs on its own major version from its own minor on; PTX (compute_NN) on
    anything later. Source: CUDA C++ Programming Guide, "Application Compatibility". An "a" suffix
    ties code to that one device, an "f" suffix to its family.
    """
    for arch in archs:
        kind, _, number = arch.partition("_")
        suffix = number[-1:] if not number.isdecimal() else ""
        digits = number.removesuffix(suffix)
        if suffix not in ("", "a", "f") or not digits.isdecimal() or len(digits) < 2:
            continue
        built_for = (int(digits[:-1]), int(digits[-1]))
        if suffix == "a":
            if built_for == capability:
                return True
            continue
        same_major = built_for[0] == capability[0]
        if built_for <= capability and (same_major or (kind == "compute" and not suffix)):
            return True
    return False
