"""Watches one `generate()` call from inside: when each phase and each token ended.

`generate()` already waits for the GPU once per token, when it asks whether to stop. The recorder
adds no wait of its own: on CUDA it records an event and starts an asynchronous copy of the new
token id when the token has been chosen, and reads both at the *next* token, when `generate()`'s
own wait has passed them. Tokens are therefore handed on one step late, with exact times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria


class Clock:
    """Points in time on the device's stream, expressed on the host's `perf_counter`."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            # One wait per request ties the GPU's clock to the host's.
            torch.cuda.synchronize(device)
        self.origin = self.mark()
        self.origin_s = time.perf_counter()

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, earlier: Any, later: Any) -> float:
        """Time between two marks that the device has reached."""
        if self._cuda:
            return float(earlier.elapsed_time(later)) / 1e3
        return float(later - earlier)

    def host_s(self, mark: Any) -> float:
        return self.origin_s + self.seconds(self.origin, mark)


class VisionSpan:
    """Marks the vision tower's start and end through forward hooks; a context manager."""

    def __init__(self, model: Any, clock: Clock) -> None:
        self.marks: list[tuple[Any, Any]] = []
        self._clock = clock
        self._start: Any = None
        self._tower = getattr(getattr(model, "model", None), "visual", None)
        self._handles: list[Any] = []

    def __enter__(self) -> VisionSpan:
        if self._tower is not None:
            self._handles = [
                self._tower.register_forward_pre_hook(self._before),
                self._tower.register_forward_hook(self._after),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: Any, inputs: Any) -> None:
        self._start = self._clock.mark()

    def _after(self, module: Any, inputs: Any, output: Any) -> None:
        self.marks.append((self._start, self._clock.mark()))

    def seconds(self) -> float | None:
        """Total over the request; None when no image was encoded. Call after the device is idle."""
        if not self.marks:
            return None
        return sum(self._clock.seconds(start, end) for start, end in self.marks)


class TokenRecorder(StoppingCriteria):
    """Called by `generate()` after each token is chosen and before it waits for the device.

    `deliver(token_id, mark)` is called once per token, one token late; `flush` delivers the last.
    """

    def __init__(
        self, clock: Clock, device: str, capacity: int, deliver: Callable[[int, Any], None]
    ) -> None:
        self._clock, self._deliver = clock, deliver
        self._cuda = device.startswith("cuda")
        self._go_on = torch.zeros(1, dtype=torch.bool, device=device)
        self._ids = torch.empty(capacity, dtype=torch.int64, pin_memory=self._cuda)
        self._count = 0
        self._pending: Any = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.flush()
        self._ids[self._count].copy_(input_ids[0, -1], non_blocking=self._cuda)
        self._pending = self._clock.mark()
        self._count += 1
        return self._go_on  # type: ignore[return-value]

    def flush(self) -> None:
        """Deliver the token whose id the device has written by now."""
        if self._pending is not None:
            mark, self._pending = self._pending, None
            self._deliver(int(self._ids[self._count - 1]), mark)
