"""On what a campaign ran: `environment.json`. Says nothing about who or which host."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import qwencli
from qwencli.engine.machine.device import DeviceFacts, package_version
from qwencli.engine.machine.host import cpu_model, driver_version

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
        "device": {
            # The UUID names one card of one owner.
            **{name: value for name, value in asdict(facts).items() if name != "uuid"},
            "driver": driver_version() if facts.kind == "cuda" else None,
        },
        "cpu": {"model": cpu_model(), "logical_cores": os.cpu_count()},
        "os": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "variables": {
            name: _without_home(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) and name not in _WITHOUT_PATHS
        },
        "command_line": ["qwencli", *(_without_home(argument) for argument in arguments)],
        "seed": seed,
    }


def _without_home(text: str) -> str:
    return text.replace(str(Path.home()), "~")
