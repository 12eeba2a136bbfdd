"""Which kernels a piece of work really ran, by the profiler's account."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qwencli.engine.probes.measure.timing import synchronize

_NOT_KERNELS = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Profile:
    """Names in the order of first use, how many ran, and how long the device was at it (ms)."""

    names: tuple[str, ...]
    count: int
    busy_ms: float


def profile(device: str, work: Callable[[], object]) -> Profile | None:
    """What ran on the device during `work`; None where the profiler sees nothing there."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    if not device.startswith("cuda"):
        return None
    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        work()
        synchronize(device)
    kernels = [
        event
        for event in recorded.events() or ()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(_NOT_KERNELS)
    ]
    if not kernels:
        return None
    return Profile(
        names=tuple(dict.fromkeys(event.name for event in kernels)),
        count=len(kernels),
        busy_ms=covered([(e.time_range.start, e.time_range.end) for e in kernels]) / 1e3,
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line the spans (start, end) cover together.

    Kernels that are launched before the one in front has ended overlap it.
    """
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# Word in a kernel's name -> the SDPA backend it belongs to; the first that fits. What attention
# leaves behind besides (copies of masks, conversions) matches none.
FAMILIES = (
    ("cudnn", "cudnn"),
    ("flash_fwd", "flash"),
    ("flash::", "flash"),
    ("fmha", "mem_efficient"),
    ("attention_kernel", "mem_efficient"),
    ("softmax", "math"),
)


def attention_family(names: tuple[str, ...]) -> str | None:
    """The SDPA backend that these kernels belong to; None where the names do not say."""
    lowered = [name.lower() for name in names]
    return next((family for word, family in FAMILIES if any(word in n for n in lowered)), None)


def attention_kernels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the names that belong to an attention backend."""
    return tuple(n for n in names if any(word in n.lower() for word, _ in FAMILIES))


def short(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return plain.partition("<")[0].partition("(")[0].strip()[:80]
