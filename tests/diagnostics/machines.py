"""Recorded machines: what checks would read on boxes that are not this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qwencli.engine.device import CudaDevice, TorchFacts
from qwencli.engine.host import DriverFacts, HostMemory

SDPA_ON = {"flash": True, "mem_efficient": True, "cudnn": True, "math": True}
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def device(name="NVIDIA GeForce RTX 5090", capability=(12, 0), total=32e9, free=31e9, index=0):
    return CudaDevice(index, name, capability, f"GPU-{index}", int(total), int(free))


RTX_5090 = device()


def torch(
    version="2.11.0+cu130", cuda="13.0", cudnn=91501, archs=CU130, devices=(RTX_5090,), **more
):
    fields = {"hip_build": None, "mps": False, "sdpa_backends": SDPA_ON, **more}
    return TorchFacts(
        version=version,
        cuda_build=cuda,
        cudnn_version=cudnn,
        arch_list=archs,
        devices=devices,
        **fields,
    )


DRIVER = DriverFacts("581.15", ("NVIDIA GeForce RTX 5090",))
MEMORY = HostMemory(64_000_000_000, 50_000_000_000)
TORCH = torch()
NEEDED = {"torch": "2.11", "transformers": "5.17", "bitsandbytes": "0.49"}


def installed(torch="2.11.0", bitsandbytes="0.50.2", **more):
    return {"torch": torch, "transformers": "5.17.0", "bitsandbytes": bitsandbytes, **more}


@dataclass(frozen=True)
class RecordedMachine:
    """A healthy RTX 5090 box unless told otherwise."""

    torch: TorchFacts = TORCH
    driver: DriverFacts | None = DRIVER
    packages: Mapping[str, str] = field(default_factory=lambda: installed(triton="3.6.0"))
    requirements: Mapping[str, str] = field(default_factory=lambda: dict(NEEDED))
    variables: Mapping[str, str] = field(default_factory=dict)
    system: str = "Linux 6.8 x86_64"
    python: tuple[int, int, int] = (3, 12, 3)
    cpu: str | None = "a CPU"
    cores: int = 16
    memory: HostMemory = MEMORY
    cache_free_bytes: int = 500_000_000_000
    breaks: str | None = None

    def version(self, package: str) -> str | None:
        return self.packages.get(package)

    def small_work(self, device: str) -> float:
        if self.breaks:
            raise RuntimeError(self.breaks)
        return 0.01


CPU_TORCH = torch("2.13.0+cpu", None, None, (), ())
MACHINES = {
    "healthy-5090": RecordedMachine(),
    "h200": RecordedMachine(
        torch=torch(devices=(device("NVIDIA H200", (9, 0), 150e9, 149e9),)),
        driver=DriverFacts("580.95.05", ("NVIDIA H200",)),
    ),
    "no-gpu-cpu-torch": RecordedMachine(
        torch=CPU_TORCH, driver=None, packages=installed("2.13.0")
    ),
    "no-gpu-cuda-torch": RecordedMachine(torch=torch(devices=()), driver=None),
    "5090-cpu-torch": RecordedMachine(torch=CPU_TORCH),
    "5070ti-wheel-without-sm_120": RecordedMachine(
        torch=torch(
            "2.6.0+cu124", "12.4", 90100, ("sm_80", "sm_86", "sm_90"),
            (device("NVIDIA GeForce RTX 5070 Ti", (12, 0), 16e9, 15e9),),
        ),
        packages=installed("2.6.0", triton="3.2"),
        breaks="CUDA error: no kernel image is available for execution on the device\nmore",
    ),
    "old-driver": RecordedMachine(
        torch=torch(devices=()), driver=DriverFacts("550.54", ("NVIDIA GeForce RTX 3090",))
    ),
    "hidden-gpu": RecordedMachine(torch=torch(devices=()), variables={"CUDA_VISIBLE_DEVICES": ""}),
    "the-origin": RecordedMachine(
        torch=torch("2.9.1+cu128", "12.8", 91002),
        packages=installed("2.9.1", "0.49.0", triton="3.5"),
    ),
    "slow-variables": RecordedMachine(
        variables={"CUDA_LAUNCH_BLOCKING": "1", "HF_HUB_OFFLINE": "1"}
    ),
    "full-gpu": RecordedMachine(torch=torch(devices=(device(free=2e9),))),
}  # fmt: skip

# Machine -> the findings that are neither PASS nor SKIP.
EXPECTED = {
    "healthy-5090": {},
    "h200": {},
    "no-gpu-cpu-torch": {"cuda-device": "warn", "torch-build": "warn"},
    "no-gpu-cuda-torch": {"cuda-device": "warn"},
    "5090-cpu-torch": {"cuda-device": "fail", "torch-build": "warn"},
    "5070ti-wheel-without-sm_120": {
        "arch-list": "fail", "device-works": "fail", "packages": "warn",
    },
    "old-driver": {"cuda-device": "fail", "driver": "fail"},
    "hidden-gpu": {"cuda-device": "fail"},
    "the-origin": {"packages": "warn", "known-bad": "warn"},
    "slow-variables": {"variables": "warn"},
    "full-gpu": {"gpu-memory": "warn"},
}  # fmt: skip
