"""Starts the processes of a campaign with this interpreter, and lets them end with it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from typing import Any

from qwencli.bench.plan.predict import MachineSpeed
from qwencli.engine.machine.child_process import python_command
from qwencli.engine.machine.device import DeviceFacts
from qwencli.errors import BenchError, DeviceError

# What the campaign may say to a child while it runs.
PAUSE, RESUME = b"-", b"+"


def end_with_the_campaign(going: threading.Event | None = None) -> None:
    """Body of a thread in each child: end the process when the campaign's end of stdin closes.

    A campaign that is killed cannot say goodbye; without this its children would go on holding
    the GPU.

    Args:
        going: cleared by PAUSE and set by RESUME.
    """
    while said := os.read(0, 1):
        if going is not None:
            (going.clear if said == PAUSE else going.set)()
    os._exit(3)


def read_device_facts(device: str) -> DeviceFacts:
    """`DeviceFacts` from a process of its own, so that this one never imports torch.

    Raises:
        DeviceError: the device asked for is not there.
        BenchError: torch does not load.
    """
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
