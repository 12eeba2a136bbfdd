"""Time of a repeated piece of work on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from qwencli.engine.event_timer import EventTimer

SAMPLES = 7
# Of one sample: long against the resolution of events and the wait at its end.
SAMPLE_S = 0.02
# Work that takes this long shows its time in a single call, and has no time for more.
LONG_S = 0.2


def seconds_per_call(device: str, work: Callable[[], object], samples: int = SAMPLES) -> float:
    """Median time of one call within a row of calls, its launch included."""
    once = _warm_seconds(device, work)
    if once >= LONG_S:
        return once
    return statistics.median(samples_s(device, work, _calls(once), samples))


def _warm_seconds(device: str, work: Callable[[], object]) -> float:
    """Time of a call after a first one, which pays for what is set up once."""
    work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _calls(once_s: float) -> int:
    return max(1, min(1000, round(SAMPLE_S / once_s)))


def sustained(device: str, work: Callable[[], object], duration_s: float) -> float:
    """Fastest sample's time of one call while `work` keeps the device busy for `duration_s`."""
    calls = _calls(_warm_seconds(device, work))
    until = time.monotonic() + duration_s
    times: list[float] = []
    while not times or time.monotonic() < until:
        times += samples_s(device, work, calls, 1)
    return min(times)


def samples_s(device: str, work: Callable[[], object], calls: int, samples: int) -> Iterator[float]:
    """Time of one call in each of `samples` rows of `calls` calls."""
    for _ in range(samples):
        clock = EventTimer(device)
        for _ in range(calls):
            work()
        end = clock.mark()
        synchronize(device)
        yield clock.seconds(clock.origin, end) / calls


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def still_works(device: str) -> bool:
    """Whether the device survived the last error; many leave it unusable for this process."""
    try:
        synchronize(device)
        return float(torch.ones(1, device=device)) == 1.0
    except RuntimeError:
        return False


def compute_dtype(device: str) -> torch.dtype:
    """What models compute in on this device: bfloat16, float16 where the GPU has no bfloat16,
    float32 on the CPU."""
    if not device.startswith("cuda"):
        return torch.float32
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16
