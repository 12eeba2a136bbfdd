"""What a study or a condition needs of the machine: named rules that say why not, or None."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping

from qwencli.engine.machine.device import DeviceFacts

Need = Callable[[DeviceFacts], str | None]
BLACKWELL = (12, 0)


def _cuda(facts: DeviceFacts) -> str | None:
    return None if facts.kind == "cuda" else "needs an NVIDIA GPU"


def _flash_attn(facts: DeviceFacts) -> str | None:
    return facts.flash_attn_blocker


def _affinity(facts: DeviceFacts) -> str | None:
    return None if sys.platform == "linux" else "this system ties no thread to a core"


def _sm_120(facts: DeviceFacts) -> str | None:
    if facts.capability == BLACKWELL:
        return None
    return "the claim is about an RTX 50-series GPU (sm_120)"


def _torch_2_9(facts: DeviceFacts) -> str | None:
    if facts.torch_version.startswith("2.9."):
        return None
    return f"the claim is about torch 2.9 with cuDNN before 9.15, and this is {facts.torch_version}"


def _vllm(facts: DeviceFacts) -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; benchmarks/side_by_side/vllm_latency.py measures it"
    return "benchmarks/side_by_side/vllm_latency.py measures vLLM into a campaign to compare with"


NEEDS: Mapping[str, Need] = {
    "cuda": _cuda,
    "flash-attn": _flash_attn,
    "affinity": _affinity,
    "sm_120": _sm_120,
    "torch-2.9": _torch_2_9,
    "vllm": _vllm,
}


def blocker(names: Iterable[str], facts: DeviceFacts) -> str | None:
    """The first reason why one of the needs is not met here, or None."""
    return next((reason for name in names if (reason := NEEDS[name](facts))), None)
