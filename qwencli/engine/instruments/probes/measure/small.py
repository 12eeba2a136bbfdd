"""The smallest proof that a device computes."""

from __future__ import annotations

from qwencli.engine.instruments.probes.answers import SmallWork, Work
from qwencli.engine.machine.device import run_small_work


def small_work(device: str, work: Work) -> SmallWork:
    return SmallWork(device, run_small_work(device))
