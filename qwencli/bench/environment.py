"""On what a campaign ran: `environment.json`. Says nothing about who or which host."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import qwencli
from qwencli.engine.device import DeviceFacts, package_version

PACKAGES = (
    "transformers", "accelerate", "bitsandbytes", "flash-attn", "triton", "tokenizers",
    "safetensors", "pillow", "nvidia-ml-py",
)  # fmt: skip

# Variables that change what is measured.
_PREFIXES = ("CUDA_", "PYTORCH_", "TORCH", "OMP_", "MKL_", "TRITON_", "BNB_")
_WITHOUT_PATHS = ("CUDA_HOME", "CUDA_PATH", "TORCH_HOME")


def environment(facts: DeviceFacts, arguments: Sequence[str], seed: int) -> dict[str, Any]:
    """Versions, device, processor, system, command line and seed of this campaign."""
    return {
        "versions": {
            "qwencli": qwencli.__version__,
            "python": platform.python_version(),
            "torch": facts.torch_version,
            "cuda_build": facts.cuda_build,
            **{name: package_version(name) for name in PACKAGES},
        },
        "device": {**asdict(facts), "driver": driver_version(facts)},
        "cpu": {"model": cpu_model(), "logical_cores": os.cpu_count()},
        "os": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) and name not in _WITHOUT_PATHS
        },
        "command_line": ["qwencli", *(_without_home(argument) for argument in arguments)],
        "seed": seed,
    }


def _without_home(text: str) -> str:
    return text.replace(str(Path.home()), "~")


def cpu_model() -> str | None:
    """The processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    if sys.platform == "linux" and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def driver_version(facts: DeviceFacts) -> str | None:
    """Of the NVIDIA driver; None without a CUDA device or without NVML."""
    if facts.kind != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
