"""Points in time on the device, expressed on the host's `time.perf_counter`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

# torch.cuda.Event on CUDA, a float of perf_counter elsewhere.
Mark = Any
PAIRS_KEPT = 1024


class EventTimer:
    """Marks moments in the order of the device's stream without waiting for them.

    On CUDA a mark is an event; it may be read once the device has passed it. Elsewhere the host
    runs in step with the device, and a mark is the host's own time.
    """

    def __init__(self, device: str) -> None:
        self._device, self._cuda = device, device.startswith("cuda")
        # Time between two marks that the device has passed. Rows of a batch share their marks.
        self.seconds: Callable[[Mark, Mark], float] = functools.lru_cache(PAIRS_KEPT)(self._seconds)
        if self._cuda:
            import torch

            # One wait per request ties the GPU's clock to the host's.
            torch.cuda.synchronize(device)
        self.origin = self.mark()
        self.origin_s = time.perf_counter()

    def mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Of this device: a bare record() marks a stream of the current one, which is cuda:0.
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, earlier: Mark, later: Mark) -> float:
        if self._cuda:
            return float(earlier.elapsed_time(later)) / 1e3
        return float(later - earlier)

    def host_s(self, mark: Mark) -> float:
        return self.origin_s + self.seconds(self.origin, mark)
