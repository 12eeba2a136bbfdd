"""What torch says about this machine: devices, builds, allocator statistics.

The one place outside the engines that asks torch anything. torch is imported inside each
function, so importing this module is free. `python -m qwencli.engine.machine.device [DEVICE]`
prints `DeviceFacts` as one JSON line; that is how callers that never import torch get them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from qwencli.capabilities import Lacks, Need, lacks_gpu
from qwencli.engine.machine.packages import package_version
from qwencli.errors import DeviceError, QwenCliError

SDPA_BACKENDS = ("flash", "mem_efficient", "cudnn", "math")


def why_no_graphs() -> str | None:
    """What keeps this process from capturing CUDA graphs; None = nothing, or no CUDA device.

    Memory that CUDA's asynchronous allocator gives out during a capture is no address yet, which
    Triton refuses and torch's clean-up does not survive.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_allocator_backend() == "native":
        return None
    return (
        "CUDA graphs need torch's own allocator, and this process has cudaMallocAsync "
        "(ComfyUI: --disable-cuda-malloc)"
    )


@dataclass(frozen=True)
class CudaDevice:
    """One device as torch sees it."""

    index: int
    name: str
    capability: tuple[int, int]
    uuid: str | None
    total_memory_bytes: int


@dataclass(frozen=True)
class TorchFacts:
    """The torch build and what it finds here.

    Args:
        cuda_build: CUDA version of the wheel, None for a CPU-only (or ROCm) build.
        cudnn_version: as torch prints it, e.g. 91501; None without cuDNN.
        arch_list: architectures the wheel carries code for, e.g. ("sm_90", "sm_120").
        sdpa_backends: name -> enabled, for the names in SDPA_BACKENDS.
    """

    version: str
    cuda_build: str | None
    hip_build: str | None
    cudnn_version: int | None
    arch_list: tuple[str, ...]
    devices: tuple[CudaDevice, ...]
    mps: bool
    sdpa_backends: Mapping[str, bool]


@dataclass(frozen=True)
class DeviceFacts:
    """What decides which modes can run on the chosen device. Blockers are None or a reason."""

    device: str
    name: str | None
    capability: tuple[int, int] | None
    uuid: str | None
    total_memory_bytes: int | None
    torch_version: str
    cuda_build: str | None
    bitsandbytes_version: str | None
    flash_attn_blocker: str | None
    compile_blocker: str | None

    @property
    def kind(self) -> str:
        """Device type: "cpu", "cuda" or "mps"."""
        return self.device.partition(":")[0]

    @property
    def lacks(self) -> Lacks:
        """What the modes of `qwencli.capabilities` need and this device has not."""
        found = {
            Need.FLASH_ATTN: self.flash_attn_blocker,
            Need.COMPILER: self.compile_blocker,
            Need.BITSANDBYTES: None if self.bitsandbytes_version else "bitsandbytes is missing",
            **lacks_gpu(self.device, self.capability),
        }
        return {need: reason for need, reason in found.items() if reason}


@dataclass(frozen=True)
class MemoryStats:
    """CUDA caching allocator after a run. Fragmentation is inactive_split / reserved."""

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    inactive_split_bytes: int
    fragmentation_percent: float | None
    num_alloc_retries: int


def torch_facts() -> TorchFacts:
    """Ask torch about its build and the devices it finds.

    Raises:
        ImportError, OSError: torch is not installed or its libraries do not load.
    """
    import torch

    found = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return TorchFacts(
        version=torch.__version__,
        cuda_build=torch.version.cuda,
        hip_build=torch.version.hip,
        cudnn_version=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        arch_list=tuple(torch.cuda.get_arch_list()),
        devices=tuple(_cuda_device(index) for index in found),
        mps=torch.backends.mps.is_available(),
        sdpa_backends={
            name: bool(getattr(torch.backends.cuda, f"{name}_sdp_enabled")())
            for name in SDPA_BACKENDS
        },
    )


def _cuda_device(index: int) -> CudaDevice:
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    return CudaDevice(
        index=index,
        name=properties.name,
        capability=(properties.major, properties.minor),
        uuid=None if uuid is None else f"GPU-{uuid}",
        total_memory_bytes=properties.total_memory,
    )


def device_facts(device: str = "auto") -> DeviceFacts:
    """Resolve `device` ("auto", "cpu", "cuda", "cuda:N", "mps") and say what can run on it.

    Raises:
        DeviceError: the device asked for is not there.
    """
    torch = torch_facts()
    concrete = _resolve(device, torch)
    kind, _, index = concrete.partition(":")
    cuda = torch.devices[int(index)] if kind == "cuda" else None
    return DeviceFacts(
        device=concrete,
        name=cuda.name if cuda else None,
        capability=cuda.capability if cuda else None,
        uuid=cuda.uuid if cuda else None,
        total_memory_bytes=cuda.total_memory_bytes if cuda else None,
        torch_version=torch.version,
        cuda_build=torch.cuda_build,
        bitsandbytes_version=package_version("bitsandbytes"),
        flash_attn_blocker=_flash_attn_blocker(cuda),
        compile_blocker=_compile_blocker(kind),
    )


def _resolve(device: str, torch: TorchFacts) -> str:
    if device == "auto":
        return "cuda:0" if torch.devices else "mps" if torch.mps else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda":
        if not torch.devices:
            raise DeviceError(
                f"--device {device}: torch {torch.version} finds no CUDA device",
                "`qwencli diagnose` says why; --device cpu works everywhere",
            )
        number = int(index) if index.isdecimal() else 0 if not index else -1
        if not 0 <= number < len(torch.devices):
            raise DeviceError(
                f"--device {device}: there is no such device",
                f"give cuda:0 to cuda:{len(torch.devices) - 1}",
            )
        return f"cuda:{number}"
    if device == "cpu" or (device == "mps" and torch.mps):
        return device
    raise DeviceError(f"--device {device} is not available here", "give auto, cpu or cuda")


def _flash_attn_blocker(cuda: CudaDevice | None) -> str | None:
    if cuda is None:
        return "flash_attention_2 needs a CUDA device"
    if cuda.capability < (8, 0):
        major, minor = cuda.capability
        return f"flash_attention_2 needs compute capability 8.0; {cuda.name} has {major}.{minor}"
    from qwencli.engine.machine.flash_attn import load_misfit

    found = load_misfit()
    return None if found is None else f"{found} ({found.fix})"


def _compile_blocker(kind: str) -> str | None:
    if kind == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return None if found else "torch.compile needs Triton, which is not installed"
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl")
    if any(name and shutil.which(name) for name in compilers):
        return None
    return "torch.compile on the CPU needs a C++ compiler, and none is on PATH"


def reset_peak_memory(device: str) -> None:
    """Start a new peak for `memory_stats`; nothing off CUDA."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def memory_stats(device: str) -> MemoryStats | None:
    """Allocator statistics of a concrete device; None off CUDA, where torch keeps none."""
    if not device.startswith("cuda"):
        return None
    import torch

    stats = torch.cuda.memory_stats(device)
    reserved = stats.get("reserved_bytes.all.current", 0)
    split = stats.get("inactive_split_bytes.all.current", 0)
    return MemoryStats(
        allocated_bytes=stats.get("allocated_bytes.all.current", 0),
        reserved_bytes=reserved,
        peak_allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
        inactive_split_bytes=split,
        fragmentation_percent=100.0 * split / reserved if reserved else None,
        num_alloc_retries=stats.get("num_alloc_retries", 0),
    )


def run_small_work(device: str) -> float:
    """Seconds for one matrix product and one attention on `device`, the first use included.

    Proves that the wheel carries kernels for the device.

    Raises:
        RuntimeError: the device cannot run them ("no kernel image is available").
    """
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    start = time.perf_counter()
    with torch.inference_mode():
        square = torch.ones(256, 256, dtype=dtype, device=device)
        heads = torch.ones(1, 4, 64, 64, dtype=dtype, device=device)  # [B, H, S, D]
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        total = float((square @ square).sum()) + float(attended.sum())
    expected = 256.0**3 + heads.numel()
    if abs(total - expected) > 0.01 * expected:
        raise RuntimeError(f"the result is wrong: {total:g} instead of {expected:g}")
    return time.perf_counter() - start


def main(device: str) -> int:
    """Print `DeviceFacts` of `device`, or the error that prevents it, as one JSON line."""
    try:
        answer = {"facts": asdict(device_facts(device))}
    except QwenCliError as error:
        answer = {"error": {"message": error.message, "hint": error.hint}}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "auto"))
