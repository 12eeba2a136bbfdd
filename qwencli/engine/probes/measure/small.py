"""The smallest proof that a device computes."""

from __future__ import annotations

from qwencli.engine.device import run_small_work
from qwencli.engine.probes.answers import SmallWork, Work


def small_work(device: str, work: Work) -> SmallWork:
    return SmallWork(device, run_small_work(device))
