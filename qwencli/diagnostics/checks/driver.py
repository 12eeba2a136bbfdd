"""Checks of the driver, the GPU that torch finds, and whether this torch has code for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qwencli.diagnostics.finding import Confidence, Finding, failed, passed, skipped, warned
from qwencli.diagnostics.known_bad import numbers
from qwencli.diagnostics.machine import Machine, Unreadable, how_it_ended
from qwencli.engine.instruments.probes.ask import Outcome
from qwencli.engine.machine.device import CudaDevice
from qwencli.engine.machine.gpu_sensors import GpuReading
from qwencli.engine.machine.host import has_code
from qwencli.output import counted

# CUDA major of the torch build -> smallest major of the NVIDIA driver that runs it.
# Source: NVIDIA, CUDA Compatibility, "Minor Version Compatibility", table 1 (December 2025).
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
NO_GPU = "no CUDA device to look at"


def get_cuda_torch(machine: Machine) -> str:
    """The command that installs a torch this driver can run."""
    driver = machine.driver
    new = driver is None or not driver.version or numbers(driver.version)[0] >= MINIMUM_DRIVER[13]
    wheels = "cu130" if new else "cu128"
    return (
        f'pip install --upgrade "torch>=2.11" --index-url https://download.pytorch.org/whl/{wheels}'
    )


def driver(machine: Machine) -> Finding:
    """torch needs an NVIDIA driver that is as new as the CUDA it was built for."""
    found = machine.driver
    if found is None:
        return skipped("no NVIDIA driver answers (no NVIDIA GPU here, or no driver installed)")
    if found.problem:
        return failed(
            "the NVIDIA driver does not answer",
            found.problem,
            "restart the machine; a driver that was updated while running answers again after that",
        )
    version = found.version or ""
    what = f"NVIDIA driver {version}"
    evidence = f"{_names(found.gpus)}; up to CUDA {found.cuda}"
    try:
        build = machine.torch.cuda_build
    except Unreadable:
        return passed(what, evidence)
    if build is None:
        return passed(what, evidence)
    evidence += f"; torch is built for CUDA {build}"
    least = MINIMUM_DRIVER.get(numbers(build)[0])
    if least is not None and numbers(version)[0] < least:
        return failed(
            f"the NVIDIA driver is too old for CUDA {build}",
            f"driver {version}; {evidence}",
            f"install NVIDIA driver {least} or later (nvidia.com/drivers)",
        )
    return passed(what, evidence)


def cuda_device(machine: Machine) -> Finding:
    """Without a GPU that torch can use, models run on the CPU."""
    torch, found = machine.torch, machine.driver
    if torch.devices:
        names = ", ".join(f"cuda:{device.index} {device.name}" for device in torch.devices)
        return passed(counted(len(torch.devices), "CUDA device"), names)
    if torch.mps:
        return passed("no CUDA device; Apple's GPU (mps) is usable", f"torch {torch.version}")
    if found is None or found.problem:
        return warned(
            "no CUDA device found: models run on the CPU, slowly",
            f"no NVIDIA driver answers; torch {torch.version}",
            "with an NVIDIA GPU: install its driver"
            + ("" if torch.cuda_build else f", then {get_cuda_torch(machine)}"),
        )
    gpus = _names(found.gpus)
    hidden = machine.variables.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda_build is None:
        return failed(
            "a GPU is there, but this torch cannot use it",
            f"{gpus}; torch {torch.version} is built without CUDA",
            get_cuda_torch(machine),
        )
    if hidden is not None:
        return failed(
            "a GPU is there, but CUDA_VISIBLE_DEVICES hides it",
            f"{gpus}; CUDA_VISIBLE_DEVICES={hidden!r}",
            "unset CUDA_VISIBLE_DEVICES",
            Confidence.MEDIUM,
        )
    return failed(
        "a GPU is there, but torch cannot start CUDA on it",
        f"{gpus}; driver {found.version}; torch {torch.version}",
        'run: python -c "import torch; torch.cuda.init()" and act on its message',
    )


def _names(gpus: Sequence[GpuReading]) -> str:
    """Each kind of GPU once, with how many there are of it: "2x NVIDIA H100 80GB HBM3"."""
    counts = Counter(gpu.name for gpu in gpus)
    return ", ".join(name if count == 1 else f"{count}x {name}" for name, count in counts.items())


def arch_list(machine: Machine) -> Finding:
    """A wheel without code for the GPU's architecture cannot run a single kernel on it."""
    torch = machine.torch
    if not torch.devices:
        return skipped(NO_GPU)
    evidence = f"wheel: {' '.join(torch.arch_list)}"
    for device in torch.devices:
        if not has_code(device.capability, torch.arch_list):
            return failed(
                f"this torch has no kernels for {device.name}",
                f"device: sm_{_digits(device)}; {evidence}",
                get_cuda_torch(machine),
            )
    return passed("the torch wheel has kernels for every device", evidence)


def _digits(device: CudaDevice) -> str:
    return "{}{}".format(*device.capability)


def device_works(machine: Machine) -> Finding:
    """Only a matrix product and an attention that really run prove that models can."""
    device = machine.device
    answer = machine.probe("small-work")
    if answer.outcome is Outcome.OK:
        return passed(
            f"{device} computes",
            f"matrix product and attention, {answer.value.seconds * 1e3:.0f} ms with start-up",
        )
    fix = get_cuda_torch(machine) if device != "cpu" else "pip install --force-reinstall torch"
    return failed(f"{device} cannot run a matrix product", how_it_ended(answer), fix)
