"""How fast data crosses between host and device."""

from __future__ import annotations

import torch

from qwencli.engine.instruments.probes.answers import HostLink, Work
from qwencli.engine.instruments.timing import sustained

BYTES = 1 << 27
# Long enough for a link that saves power to train up to its full speed.
DURATION_S = 0.7


def host_link(device: str, work: Work) -> HostLink:
    """Copies of pinned memory, the way weights are loaded."""
    with torch.inference_mode():
        there = torch.empty(BYTES, dtype=torch.uint8, device=device)
        here = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
        to_device = sustained(device, lambda: there.copy_(here, non_blocking=True), DURATION_S)
        to_host = sustained(device, lambda: here.copy_(there, non_blocking=True), DURATION_S)
    return HostLink(BYTES / to_device, BYTES / to_host)
