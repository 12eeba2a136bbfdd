"""The probes: what each is called, where it is, what it answers, how long it may take."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwencli.engine.instruments.probes import answers
from qwencli.engine.machine.device import TorchFacts


@dataclass(frozen=True)
class Probe:
    """`place` is "module:function" below `measure`; the function takes a device and the Work (or
    for the engine's run the EngineWork) and returns `answer`.

    `settles` marks work long enough for clocks and link to show what they do under load.
    """

    place: str
    answer: type
    timeout_s: float
    settles: bool = False

    def function(self) -> Callable[[str, Any], Any]:
        module, _, name = self.place.partition(":")
        found: Callable[[str, Any], Any] = getattr(
            importlib.import_module(f"qwencli.engine.instruments.probes.measure.{module}"), name
        )
        return found


PROBES: Mapping[str, Probe] = {
    # The import of torch itself, from a cold disk.
    "torch": Probe("rates:torch_build", TorchFacts, 120.0),
    "small-work": Probe("rates:small_work", answers.SmallWork, 60.0),
    "bandwidth": Probe("rates:bandwidth", answers.Bandwidth, 20.0, settles=True),
    "host-link": Probe("rates:host_link", answers.HostLink, 20.0, settles=True),
    "launch-rate": Probe("rates:launch_rate", answers.LaunchRate, 20.0),
    "attention": Probe("attention:attention", answers.AttentionRuns, 30.0),
    "patch-embedding": Probe("linears:patch_embedding", answers.PatchEmbedding, 30.0),
    "bitsandbytes": Probe("linears:quantized_linears", answers.LinearRuns, 60.0),
    "flash-attn": Probe("attention:flash_attention", answers.FlashAttention, 30.0),
    "triton": Probe("triton_add:triton_run", answers.TritonRun, 60.0),
    "engine": Probe("engine_run:engine_run", answers.EngineRun, 900.0, settles=True),
}
