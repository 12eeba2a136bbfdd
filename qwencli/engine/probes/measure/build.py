"""What torch says about itself and the devices it finds."""

from __future__ import annotations

from qwencli.engine.device import TorchFacts, torch_facts
from qwencli.engine.probes.answers import Work


def torch_build(device: str, work: Work) -> TorchFacts:
    return torch_facts()
