"""Checks of the GPU, its driver, and the torch build that is to use it."""

from __future__ import annotations

from qwencli.diagnostics.finding import Confidence, Finding, failed, passed, skipped, warned
from qwencli.diagnostics.machine import Machine
from qwencli.diagnostics.versions import KNOWN_BAD, MINIMUM_DRIVER, numbers
from qwencli.engine.device import CudaDevice

_GET_CUDA_TORCH = (
    "install a CUDA build of torch 2.11 or later (choose CUDA on pytorch.org/get-started/locally)"
)
_NO_GPU = "no CUDA device to look at"
# Below this share of free memory another program holds enough to matter.
_LOW_FREE_SHARE = 0.8


def driver(machine: Machine) -> Finding:
    """Is there an NVIDIA driver, and is it new enough for the CUDA of this torch build?"""
    found, torch = machine.driver, machine.torch
    if found is None:
        return skipped("no NVIDIA driver answers (no NVIDIA GPU here, or no driver installed)")
    evidence = f"driver {found.version}; {', '.join(found.gpus)}"
    if torch.cuda_build is None:
        return passed(f"NVIDIA driver {found.version}", evidence)
    least = MINIMUM_DRIVER.get(numbers(torch.cuda_build)[0])
    evidence += f"; torch is built for CUDA {torch.cuda_build}"
    if least is not None and numbers(found.version)[0] < least:
        return failed(
            f"the NVIDIA driver is too old for CUDA {torch.cuda_build}",
            evidence,
            f"install NVIDIA driver {least} or later",
        )
    return passed(f"NVIDIA driver {found.version}", evidence)


def cuda_device(machine: Machine) -> Finding:
    """Does torch find a GPU; if not, why not?"""
    torch, found = machine.torch, machine.driver
    if torch.devices:
        names = ", ".join(f"cuda:{device.index} {device.name}" for device in torch.devices)
        return passed(f"{len(torch.devices)} CUDA device(s)", names)
    if torch.mps:
        return passed("no CUDA device; Apple's GPU (mps) is usable", f"torch {torch.version}")
    hidden = machine.variables.get("CUDA_VISIBLE_DEVICES")
    if found is None:
        return warned(
            "no CUDA device found: models run on the CPU, slowly",
            f"no NVIDIA driver answers; torch {torch.version}",
            "with an NVIDIA GPU: install its driver"
            + ("" if torch.cuda_build else f", then {_GET_CUDA_TORCH}"),
        )
    gpus = ", ".join(found.gpus)
    if torch.cuda_build is None:
        return failed(
            "a GPU is there, but this torch cannot use it",
            f"{gpus}; torch {torch.version} is built without CUDA",
            _GET_CUDA_TORCH,
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


def torch_build(machine: Machine) -> Finding:
    """Which torch is this, and for what was it built?"""
    torch = machine.torch
    if torch.cuda_build:
        return passed(
            f"torch {torch.version}", f"CUDA {torch.cuda_build}, cuDNN {torch.cudnn_version}"
        )
    if torch.hip_build:
        return warned(
            f"torch {torch.version} is a ROCm build",
            f"HIP {torch.hip_build}",
            "AMD GPUs are not tested with qwencli; please report what you see",
        )
    if torch.mps:
        return passed(f"torch {torch.version}", "built for Apple's GPU")
    return warned(
        f"torch {torch.version} is a CPU-only build",
        "it is built without CUDA",
        f"with an NVIDIA GPU: {_GET_CUDA_TORCH}",
    )


def arch_list(machine: Machine) -> Finding:
    """Does the torch wheel carry machine code for each device?"""
    torch = machine.torch
    if not torch.devices:
        return skipped(_NO_GPU)
    evidence = f"wheel: {' '.join(torch.arch_list)}"
    for device in torch.devices:
        if not _has_code(device, torch.arch_list):
            return failed(
                f"this torch has no kernels for {device.name}",
                f"device: sm_{_digits(device)}; {evidence}",
                _GET_CUDA_TORCH,
            )
    return passed("the torch wheel has kernels for every device", evidence)


def _digits(device: CudaDevice) -> str:
    return "{}{}".format(*device.capability)


def _has_code(device: CudaDevice, archs: tuple[str, ...]) -> bool:
    """Machine code runs on its own major version from its own minor on; PTX (compute_NN) on
    anything later. Source: CUDA C++ Programming Guide, "Application Compatibility". An "a" suffix
    ties code to that one device."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        if not number.isdecimal():
            if number == f"{_digits(device)}a":
                return True
            continue
        capability = (int(number[:-1]), int(number[-1]))
        same_major = capability[0] == device.capability[0]
        if capability <= device.capability and (same_major or kind == "compute"):
            return True
    return False


def sdpa_backends(machine: Machine) -> Finding:
    """Which fused attention kernels may `scaled_dot_product_attention` choose from?"""
    torch = machine.torch
    if not torch.devices:
        return skipped(f"{_NO_GPU}: the switches concern CUDA kernels alone")
    state = torch.sdpa_backends
    evidence = ", ".join(f"{name} {'on' if on else 'off'}" for name, on in state.items())
    if not state["flash"] and not state["mem_efficient"] and not state["cudnn"]:
        return warned(
            "every fused attention kernel is switched off",
            evidence,
            "remove the code or variable that calls torch.backends.cuda.enable_*_sdp(False)",
        )
    return passed("fused attention kernels may be chosen", evidence)


def gpu_memory(machine: Machine) -> Finding:
    """Is GPU memory free, or do other programs hold it?"""
    devices = machine.torch.devices
    known = [(d, d.free_memory_bytes) for d in devices if d.free_memory_bytes is not None]
    if not known:
        return skipped(_NO_GPU)
    evidence = ", ".join(
        f"{device.name}: {free / 1e9:.1f} of {device.total_memory_bytes / 1e9:.1f} GB free"
        for device, free in known
    )
    if any(free < _LOW_FREE_SHARE * device.total_memory_bytes for device, free in known):
        return warned(
            "other programs hold GPU memory",
            evidence,
            "close them; `nvidia-smi` lists them",
        )
    return passed("GPU memory is free", evidence)


def device_works(machine: Machine) -> Finding:
    """Do a matrix product and an attention really run where models would?"""
    device = "cuda:0" if machine.torch.devices else "mps" if machine.torch.mps else "cpu"
    try:
        seconds = machine.small_work(device)
    except RuntimeError as error:
        return failed(
            f"{device} cannot run a matrix product",
            str(error).partition("\n")[0],
            _GET_CUDA_TORCH if device != "cpu" else "install torch again",
        )
    return passed(f"{device} computes", f"matrix product and attention, {seconds * 1e3:.0f} ms")


def known_bad(machine: Machine) -> Finding:
    """Is this one of the combinations that run, but badly?"""
    hits = [entry for entry in KNOWN_BAD if entry.present(machine)]
    if not hits:
        return passed("no known-bad combination of versions", f"{len(KNOWN_BAD)} looked for")
    return warned(
        "; ".join(entry.what for entry in hits),
        "; ".join(f"{entry.id} ({entry.source}, checked {entry.noted})" for entry in hits),
        "; ".join(entry.fix for entry in hits),
        Confidence.LOW,
    )
