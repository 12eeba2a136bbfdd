"""The pause before a process: so long, or until the GPU has cooled down.

A GPU that the cell before has heated starts the next one at another clock; with cells in shuffled
order that is noise, with a pause it is neither.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from qwencli.errors import UsageError

SETTLE = "settle"
# Settled: within this many seconds the temperature has fallen by less than one degree, which is
# the step in which the driver reports it.
_WINDOW_S = 10.0
_STEP_C = 1.0
_MOST_S = 180.0


@dataclass(frozen=True)
class Cooldown:
    """`seconds` of pause; None = until the temperature settles, at most three minutes."""

    seconds: float | None = 0.0


NO_PAUSE = Cooldown()


def read_cooldown(text: str) -> Cooldown:
    """A number of seconds, or the word "settle".

    Raises:
        UsageError: neither.
    """
    if text == SETTLE:
        return Cooldown(None)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise UsageError(
            f"--cooldown {text!r} is not a pause", f"give 0 to 3600 seconds, or {SETTLE}"
        )
    return Cooldown(seconds)


def cool_down(
    cooldown: Cooldown,
    temperature_c: Callable[[], float | None],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Wait. Where no sensor says how hot the GPU is, there is nothing to settle and no pause.

    Args:
        temperature_c: the latest reading, None without one.
    """
    if cooldown.seconds is not None:
        sleep(cooldown.seconds)
        return
    begun = clock()
    readings: deque[tuple[float, float]] = deque()
    while (now := clock()) - begun < _MOST_S:
        reading = temperature_c()
        if reading is None:
            return
        readings.append((now, reading))
        while readings[0][0] < now - _WINDOW_S:
            readings.popleft()
        whole = now - begun >= _WINDOW_S
        if whole and max(value for _, value in readings) - reading < _STEP_C:
            return
        sleep(1.0)
