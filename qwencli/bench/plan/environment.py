"""The machine that a campaign runs on: its device, its speed, and `environment.json`.

Device and speed are read by processes of their own, so that this one never imports torch.
`environment.json` says nothing about who or which host.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import qwencli
from qwencli.bench.plan.predict import MachineSpeed
from qwencli.engine.machine.child_process import python_command
from qwencli.engine.machine.device import DeviceFacts
from qwencli.engine.machine.host import cpu_model, driver_version
from qwencli.engine.machine.packages import package_version
from qwencli.engine.resolve import device_without_torch
from qwencli.errors import BenchError, DeviceError

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
        "command_line": ["qwencli", *map(_without_home, _without_key(arguments))],
        "seed": seed,
    }


def _without_key(arguments: Sequence[str]) -> Iterator[str]:
    """What servers are shown as a key stands in no file."""
    previous = ""
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if previous == "--api-key":
            argument = "***"
        elif name == "--api-key" and equals:
            argument = f"{name}=***"
        previous = argument
        yield argument


def _without_home(text: str) -> str:
    return text.replace(str(Path.home()), "~")


def read_device_facts(device: str) -> DeviceFacts:
    """`DeviceFacts` from a process of its own, so that this one never imports torch.

    Raises:
        DeviceError: the device asked for is not there.
        BenchError: torch does not load.
    """
    device_without_torch(device)  # raises at once where it can be told
    answer = _ask("qwencli.engine.machine.device", device)
    if "error" in answer:
        raise DeviceError(**answer["error"])
    facts = answer["facts"]
    capability = facts.pop("capability")
    return DeviceFacts(**facts, capability=None if capability is None else tuple(capability))


def read_machine_speed(device: str) -> MachineSpeed:
    """What a process of its own measures on a concrete device.

    Raises:
        BenchError: torch does not load.
    """
    answer = _ask("qwencli.engine.instruments.machine_speed", device)
    return MachineSpeed(**answer)


def _ask(module: str, device: str) -> dict[str, Any]:
    """The last line that `module` prints, as JSON."""
    done = subprocess.run(
        python_command(module, device),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BenchError(f"torch does not load: {last}", "`qwencli diagnose` says more")
    answer: dict[str, Any] = json.loads(lines[-1])  # libraries may print before it
    return answer
