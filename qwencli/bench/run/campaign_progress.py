"""How far a campaign is: a bar at a terminal, a line now and then elsewhere, and what is left.

A process is cut into steps: load and warm-up, each run, the checks after the runs. The share of it
that is done is that of its time, where steps to come take as long as the last of their kind did
(GUESSES before there was one). Processes are weighted by their predicted time. What is left follows
from the time that the done share took.

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
# Kind of step -> how long it takes, in loads: most of a short process goes before its first run.
_LOADING, _CHECKS = "loading", "checks"
GUESSES = {_LOADING: 1.0, "run": 0.125, _CHECKS: 0.5}


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
        self._number, self._runs = 0, 0
        self._made_s: list[float] = []
        self._done = self._shown = 0.0
        self._doing = self._place = ""
        self._took_s: dict[str, float] = {}

    def begin(self, place: str, runs: int) -> None:
        """The next process begins, which will make so many runs; `place` says which of all."""
        self._number += 1
        self._place = place
        self._runs, self._made_s = runs, []
        self._doing = _LOADING
        self._step_began_s = self._clock()
        self.tick()

    def step(self, what: str) -> None:
        """A step has ended; `what` comes next ("run 2 of 5": its first word is its kind)."""
        now = self._clock()
        took_s = now - self._step_began_s
        self._took_s[_kind(self._doing)] = took_s
        self._made_s.append(took_s)
        self._doing, self._step_began_s = what, now
        self.tick()

    def end(self) -> None:
        """The process has ended, whether or not it made all of its steps."""
        if _kind(self._doing) == _CHECKS:
            self._took_s[_CHECKS] = self._clock() - self._step_began_s
        self._done += self._weight
        self._made_s, self._doing = [], ""

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
        """From 0 to 1; it never falls, whatever is learned of the steps to come."""
        total = sum(self._weights)
        found = (self._done + self._weight * self._within()) / total if total else 1.0
        self._shown = max(self._shown, min(1.0, found))
        return self._shown

    def _within(self) -> float:
        """What of the process is done."""
        usual_s = self._usual_s(_kind(self._doing))
        if not self._doing or not usual_s:
            return 0.0
        so_far_s = min(self._clock() - self._step_began_s, _MOST_OF_A_STEP * usual_s)
        done_s = sum(self._made_s) + so_far_s
        later = max(0, self._runs - len(self._made_s)) * ["run"]
        if _kind(self._doing) != _CHECKS:
            later.append(_CHECKS)
        return done_s / (done_s + usual_s - so_far_s + sum(map(self._usual_s, later)))

    def _usual_s(self, kind: str) -> float:
        """0.0 where nothing is known yet."""
        guess_s = GUESSES.get(kind, 0.0) * self._took_s.get(_LOADING, 0.0)
        return self._took_s.get(kind, guess_s)

    @property
    def left_s(self) -> float | None:
        """By the time that the done share took; before the first step by prediction, where there
        is one."""
        spent, share = self._clock() - self._began_s, self.share
        if share and (self._made_s or self._done):
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
