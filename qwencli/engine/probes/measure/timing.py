"""Time of a repeated piece of work on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from qwencli.engine.clock import Clock

SAMPLES = 7
# Of one sample: long against the resolution of events and the wait at its end.
SAMPLE_S = 0.02


def seconds_per_call(device: str, work: Callable[[], object], samples: int = SAMPLES) -> float:
    """Median time of one call within a row of calls, its launch included."""
    return statistics.median(_timed(device, work, calls_for(device, work), samples))


def calls_for(device: str, work: Callable[[], object]) -> int:
    """How many calls make a sample; runs `work` a few times, which also warms it up."""
    for _ in range(3):
        work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return max(1, min(1000, round(SAMPLE_S / (time.perf_counter() - start))))


def sustained(device: str, work: Callable[[], object], duration_s: float) -> float:
    """Fastest sample's time of one call while `work` keeps the device busy for `duration_s`."""
    calls = calls_for(device, work)
    until = time.monotonic() + duration_s
    times: list[float] = []
    while not times or time.monotonic() < until:
        times += _timed(device, work, calls, 1)
    return min(times)


def _timed(device: str, work: Callable[[], object], calls: int, samples: int) -> Iterator[float]:
    for _ in range(samples):
        clock = Clock(device)
        for _ in range(calls):
            work()
        end = clock.mark()
        synchronize(device)
        yield clock.seconds(clock.origin, end) / calls


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def compute_dtype(device: str) -> torch.dtype:
    """What models compute in on this device: bfloat16, float16 where the GPU has no bfloat16,
    float32 on the CPU."""
    if not device.startswith("cuda"):
        return torch.float32
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16
