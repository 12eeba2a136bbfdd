"""Watches one `generate()` call from inside: when each phase and each token ended.

`generate()` already waits for the GPU once per token, when it asks whether to stop. The recorder
adds no wait of its own: on CUDA it records an event and starts an asynchronous copy of the new
token id when the token has been chosen, and reads both at the *next* token, when `generate()`'s
own wait has passed them. Tokens are therefore handed on one step late, with exact times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria

from qwencli.engine.event_timer import EventTimer, Mark


class VisionSpan:
    """Marks the start and end of each run of the vision tower by hooks; a context manager."""

    def __init__(self, model: Any, clock: EventTimer) -> None:
        self.marks: list[tuple[Mark, Mark]] = []
        self._clock = clock
        self._start: Mark = None
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


class TokenRecorder(StoppingCriteria):
    """Called by `generate()` after each token is chosen and before it waits for the device.

    Args:
        capacity: most tokens the call can produce.
        deliver: called once per token, one token late; `flush` delivers the last.
    """

    def __init__(
        self, clock: EventTimer, device: str, capacity: int, deliver: Callable[[int, Mark], None]
    ) -> None:
        self._clock, self._deliver = clock, deliver
        self._cuda = device.startswith("cuda")
        self._go_on = torch.zeros(1, dtype=torch.bool, device=device)
        self._ids = torch.empty(capacity, dtype=torch.int64, pin_memory=self._cuda)
        self._count = 0
        self._pending: Mark = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.flush()
        self._ids[self._count].copy_(input_ids[0, -1], non_blocking=self._cuda)
        self._pending = self._clock.mark()
        self._count += 1
        return self._go_on

    def flush(self) -> None:
        """Deliver the token whose id the device has written by now."""
        if self._pending is not None:
            mark, self._pending = self._pending, None
            self._deliver(int(self._ids[self._count - 1]), mark)
