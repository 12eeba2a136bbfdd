"""Checks of GPU and host memory: room, who else is there, and what happens when it runs out."""

from __future__ import annotations

from qwencli.diagnostics.advice import advise
from qwencli.diagnostics.checks.power import NO_NVML
from qwencli.diagnostics.finding import Confidence, Finding, passed, skipped, warned
from qwencli.diagnostics.machine import Machine
from qwencli.engine.machine.gpu_sensors import GpuProcess
from qwencli.engine.machine.host import HostMemory
from qwencli.output import counted

# Below this share of free memory another program holds enough to matter.
LOW_FREE_SHARE = 0.8
# A desktop's programs hold some; a model holds more.
LARGE_PROCESS_BYTES = 500e6
# Cards from before can do it in part or not at all.
RESIZABLE_BAR_SINCE = (8, 0)
LOW_MEMORY_BYTES = 4e9
# Beyond this, Windows begins to move what it likes.
NEAR_FULL_SHARE = 0.9


def gpu_memory(machine: Machine) -> Finding:
    """What other programs hold, a model cannot have."""
    gpu = machine.gpu
    if gpu is None or gpu.free_memory_bytes is None or not gpu.total_memory_bytes:
        return skipped(NO_NVML)
    free, total = gpu.free_memory_bytes, gpu.total_memory_bytes
    evidence = f"{gpu.name}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < LOW_FREE_SHARE * total:
        return warned(
            "other programs hold GPU memory",
            evidence,
            "close them; see gpu-processes, or nvidia-smi",
        )
    return passed("GPU memory is free", evidence)


def gpu_processes(machine: Machine) -> Finding:
    """Another program that computes on the GPU takes turns with every kernel."""
    gpu = machine.gpu
    if gpu is None:
        return skipped(NO_NVML)
    evidence = ", ".join(_describe(process) for process in gpu.processes) or "none"
    busy = [p for p in gpu.processes if p.compute and (p.used_bytes or 0) >= LARGE_PROCESS_BYTES]
    if busy:
        return warned(
            f"{counted(len(busy), 'other program computes', 'other programs compute')} on the GPU"
            if len(busy) == 1
            else f"{len(busy)} other programs compute on the GPU",
            evidence,
            f"end {'it' if len(busy) == 1 else 'them'} while you measure: "
            + ", ".join(f"{process.name or 'pid'} {process.pid}" for process in busy),
        )
    if gpu.processes:
        return passed("other programs on the GPU are small, or only draw", evidence)
    return passed("no other program is on the GPU", evidence)


def _describe(process: GpuProcess) -> str:
    held = "" if process.used_bytes is None else f" {process.used_bytes / 1e9:.1f} GB"
    return f"{process.name or f'pid {process.pid}'}{held}"


def bar1(machine: Machine) -> Finding:
    """With resizable BAR the host reaches all of the GPU's memory at once."""
    gpu = machine.gpu
    if gpu is None or not gpu.bar1_bytes or not gpu.total_memory_bytes:
        return skipped("the driver does not tell the size of BAR1")
    evidence = f"BAR1 {gpu.bar1_bytes / 1e9:.1f} GB of {gpu.total_memory_bytes / 1e9:.1f} GB VRAM"
    device = machine.cuda_device
    small = gpu.bar1_bytes < 0.9 * gpu.total_memory_bytes
    if small and device is not None and device.capability >= RESIZABLE_BAR_SINCE:
        return warned(
            "resizable BAR is off",
            evidence,
            "switch on Above 4G Decoding and Re-Size BAR in the firmware; it helps loading, not "
            "decoding",
            Confidence.LOW,
        )
    return passed(
        "resizable BAR covers the GPU's memory" if not small else "BAR1 is small", evidence
    )


def system_memory_spill(machine: Machine) -> Finding:
    """GPU memory that runs short Windows moves to the host, tens of times slower, silently."""
    gpu, system = machine.gpu, machine.system
    where = "Windows" if system.name == "Windows" else "WSL" if system.wsl else None
    if where is None:
        return skipped("Windows and WSL alone do this")
    if gpu is None or gpu.free_memory_bytes is None or not gpu.total_memory_bytes:
        return skipped(NO_NVML)
    advice = advise(machine)
    if advice.vram_bytes is None:
        return skipped(f"{advice.model} does not fit this GPU in any way")
    used = gpu.total_memory_bytes - gpu.free_memory_bytes + advice.vram_bytes
    share = used / gpu.total_memory_bytes
    evidence = (
        f"with {advice.model} loaded as recommended {used / 1e9:.1f} of "
        f"{gpu.total_memory_bytes / 1e9:.1f} GB are in use ({share:.0%})"
    )
    if share > NEAR_FULL_SHARE:
        return warned(
            f"so little GPU memory is left that {where} will move some of it to the host",
            evidence,
            "close other programs, choose a smaller model or --quantization 4bit"
            + (
                "; in the NVIDIA control panel set CUDA - Sysmem Fallback Policy to Prefer No "
                "Sysmem Fallback"
                if where == "Windows"
                else " (WSL ignores the driver's fallback policy: microsoft/WSL #11050)"
            ),
            Confidence.MEDIUM,
        )
    return passed("GPU memory stays clear of the host's", evidence)


def ram(machine: Machine) -> Finding:
    """Weights pass through host memory on their way to the GPU."""
    memory: HostMemory = machine.section("memory")
    free, total = memory.available_bytes, memory.total_bytes
    evidence = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < LOW_MEMORY_BYTES:
        return warned("little host memory is free", evidence, "close other programs")
    return passed("host memory is free", evidence)
