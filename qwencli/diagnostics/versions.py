"""Version numbers, and the combinations known to be bad.

KNOWN_BAD is data: add an entry with the date and the source it was taken from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwencli.diagnostics.machine import Machine

# CUDA major of the torch build -> smallest major of the NVIDIA driver that runs it.
# Source: NVIDIA, CUDA Compatibility, "Minor Version Compatibility", table 1 (December 2025).
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.9.1+cu128" -> (2, 9, 1)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


@dataclass(frozen=True)
class KnownBad:
    """A combination that runs, but badly.

    Args:
        noted: when the entry was last checked. source: where it is described.
    """

    id: str
    what: str
    fix: str
    noted: str
    source: str
    present: Callable[[Machine], bool]


def _slow_conv3d(machine: Machine) -> bool:
    torch = machine.torch
    return (
        numbers(torch.version)[:2] == (2, 9)
        and bool(torch.devices)
        and torch.cudnn_version is not None
        and torch.cudnn_version < 91500
    )


def _old_bitsandbytes_on_blackwell(machine: Machine) -> bool:
    version = machine.version("bitsandbytes")
    blackwell = any(device.capability[0] == 12 for device in machine.torch.devices)
    return blackwell and version is not None and numbers(version) < (0, 50)


KNOWN_BAD = (
    KnownBad(
        id="torch-2.9-conv3d",
        what="torch 2.9 with cuDNN before 9.15 runs bf16 conv3d without cuDNN: Qwen's patch "
        "embedding was reported 10 to 20 times slower, and needs far more memory",
        fix="install torch 2.10 or later",
        noted="2026-11",
        source="pytorch #166643, #174051",
        present=_slow_conv3d,
    ),
    KnownBad(
        id="bitsandbytes-before-0.50-on-sm_120",
        what="bitsandbytes before 0.50 has no fused 4-bit kernels for RTX 50: 4bit is slower "
        "there than no quantization",
        fix="pip install 'bitsandbytes>=0.50'",
        noted="2026-11",
        source="reported of bitsandbytes 0.49 and 0.50.0; not measured here",
        present=_old_bitsandbytes_on_blackwell,
    ),
)
