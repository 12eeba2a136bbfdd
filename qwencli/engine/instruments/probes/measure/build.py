"""What torch says about itself and the devices it finds."""

from __future__ import annotations

from qwencli.engine.instruments.probes.answers import Work
from qwencli.engine.machine.device import TorchFacts, torch_facts


def torch_build(device: str, work: Work) -> TorchFacts:
    return torch_facts()
