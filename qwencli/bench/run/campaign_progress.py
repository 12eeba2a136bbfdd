"""How far a campaign is: a bar at a terminal, a line now and then elsewhere, and what is left.

A process is cut into steps: load and warm-up, each run, the checks after the runs. The share of a
campaign that is done is that of its steps, each process weighted by its predicted time. What is
left follows from the time that the done share took. Within a step the share grows with the clock,
as long as the step of that kind before it took.

Nothing is drawn between a worker's messages but twice a second at most: the bar is beside what is
measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qwencli.bench.plan.predict import duration
from qwencli.output import Output

# Told the share that is done, from 0 to 1, and what is going on.
Moved = Callable[[float, str], None]
# Between lines where there is no terminal.
LINE_EVERY_S = 30.0
# Of the bar: it is as long as a terminal lets it.
_UNITS = 1000
# No step is done before its message says so, however long it takes.
_MOST_OF_A_STEP = 0.95


def not_shown(share: float, text: str) -> None:
    """Where nobody watches."""


@contextmanager
def show_progress(output: Output, clock: Callable[[], float] = time.monotonic) -> Iterator[Moved]:
    """Yields what shows how far a campaign is, while the block runs."""
    said_s = clock()

    def line(share: float, text: str) -> None:
        nonlocal said_s
        if clock() - said_s >= LINE_EVERY_S:
            said_s = clock()
            output.notice(f"    {text}")

    with output.bar(_UNITS, still=True) as advance:
        if advance is None:
            yield line
        else:
            yield lambda share, text: advance(round(_UNITS * share), text)


class CampaignProgress:
    """Counts the steps of a campaign's processes.

    Args:
        weights: of the processes that will run, in their order; predicted seconds where they are
            `in_seconds`, else any number.
        moved: told after each step, and while a step lasts.
    """

    def __init__(
        self,
        weights: Sequence[float],
        moved: Moved = not_shown,
        *,
        in_seconds: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._weights = list(weights)
        self._moved, self._clock = moved, clock
        self._predicted_s = sum(weights) if in_seconds else None
        self._began_s = self._step_began_s = clock()
        self._number, self._steps, self._made = 0, 1, 0
        self._done = 0.0
        self._doing = self._place = ""
        self._took_s: dict[str, float] = {}

    def begin(self, place: str, runs: int) -> None:
        """The next process begins, which will make so many runs; `place` says which of all."""
        self._number += 1
        self._place = place
        self._steps, self._made = runs + 2, 0
        self._doing = "loading"
        self._step_began_s = self._clock()
        self.tick()

    def step(self, what: str) -> None:
        """A step has ended; `what` comes next ("run 2 of 5": its first word is its kind)."""
        now = self._clock()
        self._took_s[_kind(self._doing)] = now - self._step_began_s
        self._made = min(self._made + 1, self._steps)
        self._doing, self._step_began_s = what, now
        self.tick()

    def end(self) -> None:
        """The process has ended, whether or not it made all of its steps."""
        self._done += self._weight
        self._made, self._doing = 0, ""

    def skip(self) -> None:
        """The next process will not run after all."""
        self._number += 1
        self._weights[self._number - 1] = 0.0

    def tick(self) -> None:
        """Time has passed."""
        self._moved(self.share, f"{self._place} {self._doing}{time_left(self.left_s)}")

    @property
    def _weight(self) -> float:
        return self._weights[self._number - 1] if self._number else 0.0

    @property
    def share(self) -> float:
        total = sum(self._weights)
        within = 0.0
        if self._doing:
            within = min(self._made + self._of_step(), self._steps) / self._steps
        return min(1.0, (self._done + self._weight * within) / total) if total else 1.0

    def _of_step(self) -> float:
        usual = self._took_s.get(_kind(self._doing))
        if not usual:
            return 0.0
        return min(_MOST_OF_A_STEP, (self._clock() - self._step_began_s) / usual)

    @property
    def left_s(self) -> float | None:
        """By the time that the done share took; before the first step by prediction, where there
        is one."""
        spent, share = self._clock() - self._began_s, self.share
        if share and (self._made or self._done):
            return spent * (1 - share) / share
        return None if self._predicted_s is None else max(0.0, self._predicted_s - spent)


def _kind(doing: str) -> str:
    return doing.partition(" ")[0]


def time_left(seconds: float | None) -> str:
    """ ", about 3 min 10 s left", coarser the longer it is; "" where it is not known."""
    if seconds is None:
        return ""
    coarse = 1 if seconds < 20 else 10 if seconds < 600 else 60
    return f", about {duration(coarse * round(seconds / coarse))} left"
