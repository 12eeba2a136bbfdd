"""How many tokens the next step should check, so that speculation pays or stays away.

With a chance p that a draft is right, a step of n tokens gives (1 - p^n) / (1 - p) of them on
average (Leviathan et al. 2023, arXiv 2211.17192, equation 1). What a step of n tokens costs is
measured as steps run. The size with the most tokens a second is taken, and 1 is a plain step.

Plain steps draft as well and see whether the first draft was right, so a text that begins to repeat
itself is noticed without paying for it. But a host that is steps ahead of what it has read finds
out late that it no longer does. So what such steps may lose is little at first and grows by what
they win, as a sender's window does (slow start: Jacobson 1988, "Congestion avoidance and control").
Rows that run beside each other have a step's size in common: what is expected of it is the mean of
theirs, and what it costs is measured for each number of rows.

Knows neither models nor devices, nor who drafts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from qwencli.results import Speculation

# What older drafts count for after each step: the last few say what the text is like.
FORGET = 0.85
# Added to what was seen: few drafts are right until several were.
PRIOR_MATCHED, PRIOR_DRAFTS = 0.4, 3.0
# Of drafts by the model's own head most are right, as long as nothing else is known.
HEAD_PRIOR_MATCHED = 1.8
# What finding out may lose, in the time of plain steps: one step of several tokens, and half a
# percent of the answer. What such steps have won may be lost again, up to a limit.
BUDGET, BUDGET_A_TOKEN, MAX_BUDGET = 0.7, 0.005, 16.0
# Plain steps that one of several tokens is taken to cost until it is known. Measured: 1.13 to 1.64.
GUESSED_COST = 1.5
# Steps after which the cost of a size is known: the first ones are often slow.
TIMED_STEPS = 8
RECENT = 2 * TIMED_STEPS
# Tokens of all rows together that a step of several checks at most: about as many as products with
# the weights take beside one token at little more cost.
MOST_VERIFIED = 32


class StepCosts:
    """Seconds that a step takes by its size, undisturbed: the least of the last `RECENT` ones, as
    steps cost more the longer the text is. Lives as long as the engine."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}

    def add(self, size: int, seconds: float) -> None:
        self._recent.setdefault(size, deque(maxlen=RECENT)).append(seconds)

    def known(self, size: int) -> bool:
        return len(self._recent.get(size, ())) >= TIMED_STEPS

    def seconds(self, size: int) -> float | None:
        """None for a size that has not run."""
        return min(self._recent[size]) if size in self._recent else None

    def in_plain_steps(self, sizes: Sequence[int]) -> dict[int, float]:
        """What a step of each size costs, ascending from 1, in plain ones, of which some ran."""
        plain = self.seconds(1)
        assert plain is not None, "callers looked"
        costs = {1: 1.0}
        cost = GUESSED_COST
        for size in sizes[1:]:
            # A step costs about as much as a smaller one: good enough to try one that is not known.
            if self.known(size):
                cost = (self.seconds(size) or 0.0) / plain
            costs[size] = cost
        return costs


class Acceptance:
    """How many drafts of one text were right of late.

    Args:
        looks: whether plain steps look at a draft too. Where they do not, what was seen is
            forgotten with each of them, so that drafts are tried again.
    """

    def __init__(self, looks: bool = True) -> None:
        self._looks, self._prior = looks, PRIOR_MATCHED if looks else HEAD_PRIOR_MATCHED
        self._matched = self._tried = 0.0

    def learn(self, size: int, num_matched: int) -> None:
        """Note that the first `num_matched` drafts of a step of `size` tokens were right; a plain
        step checks one."""
        if size == 1 and not self._looks:
            self._matched, self._tried = FORGET * self._matched, FORGET * self._tried
            return
        checked = max(size - 1, 1)
        self._matched = FORGET * self._matched + num_matched
        self._tried = FORGET * self._tried + min(num_matched + 1, checked)

    def expected(self, size: int) -> float:
        """Tokens of a step of `size`."""
        right = min((self._matched + self._prior) / (self._tried + PRIOR_DRAFTS), 1.0)
        return float(sum(right**n for n in range(size)))


class SpeculationBudget:
    """What steps of several tokens may lose, in the time of plain steps: a little to begin with and
    for each token of the answer, and what they win.

    Args:
        least: that is left when one whose price was not known has lost more than there was.
    """

    def __init__(self, least: float = 0.0) -> None:
        self._left, self._least = BUDGET, least
        # The prices of those on their way: lost, until it is read what they gave.
        self._unread: deque[float] = deque()

    def covers(self, price: float) -> bool:
        """Whether one more may be tried that takes so much longer than a plain step; if so it is
        on its way."""
        covered = sum(self._unread) + price <= self._left
        if covered:
            self._unread.append(price)
        return covered

    def answered(self, tokens: float) -> None:
        self._add(BUDGET_A_TOKEN * tokens)

    def settle(self, won: float) -> None:
        """The next one has been read, which won so much, or lost it."""
        self._unread.popleft()
        self._add(won)

    def _add(self, change: float) -> None:
        self._left = min(max(self._left + change, self._least), MAX_BUDGET)


class DraftLengthPolicy:
    """Chooses the sizes of one request's steps and counts what came of them.

    Args:
        sizes: that steps may have, ascending from 1. With two of them the larger is always taken
            once it is known what plain steps cost.
        adaptive: whether a size has to pay.
    """

    def __init__(self, sizes: Sequence[int], adaptive: bool, costs: StepCosts) -> None:
        assert sizes[0] == 1, "a plain step is what the others are measured by"
        self.all, self._adaptive, self._costs = sizes, adaptive, costs
        self._acceptance = Acceptance()
        self._budget = SpeculationBudget()
        self._steps: Counter[int] = Counter()
        self._tokens = 0

    def next(self) -> int:
        plain = self._costs.seconds(1)
        if plain is None or not self._costs.known(1):
            return 1
        if not self._adaptive:
            return self.all[-1]
        costs, expected = self._costs.in_plain_steps(self.all), self._acceptance.expected
        best = max(self.all, key=lambda size: (expected(size) / costs[size], -size))
        return best if best > 1 and self._budget.covers(costs[best] - 1) else 1

    def learn(self, size: int, num_matched: int, num_accepted: int, seconds: float) -> None:
        """A step of `size` tokens took `seconds`.

        Args:
            num_matched: drafts in a row that were right; a plain step looks at one.
            num_accepted: tokens that it gave the answer.
        """
        self._costs.add(size, seconds)
        self._acceptance.learn(size, num_matched)
        self._steps[size] += 1
        self._tokens += num_accepted
        self._budget.answered(num_accepted)
        if self._adaptive and size > 1:
            self._budget.settle(num_accepted - self._costs.in_plain_steps(self.all)[size])

    def result(self) -> Speculation:
        plain = self._costs.seconds(1)
        drafted = sum((size - 1) * steps for size, steps in self._steps.items())
        gain = None
        if plain is not None:
            seconds = sum(
                steps * (self._costs.seconds(size) or plain) for size, steps in self._steps.items()
            )
            gain = self._tokens * plain / seconds if seconds > 0 else None
        return Speculation(drafted, self._tokens - self._steps.total(), gain)


class BatchDraftPolicy:
    """Chooses the sizes of steps of several rows.

    Args:
        sizes, adaptive: see `DraftLengthPolicy`. looks: see `Acceptance`.
    """

    def __init__(self, sizes: Sequence[int], adaptive: bool, looks: bool = True) -> None:
        assert sizes[0] == 1, "a plain step is what the others are measured by"
        self._sizes, self._adaptive, self._looks = sizes, adaptive, looks
        self._costs: dict[int, StepCosts] = {}
        # What all rows lose is paid back before it is tried again.
        self._budget = SpeculationBudget(least=-MAX_BUDGET)

    def new_text(self) -> Acceptance:
        """The acceptance of a text that begins."""
        return Acceptance(self._looks)

    def next(self, rows: int, texts: Sequence[Acceptance]) -> int:
        """Tokens that the next step checks of each row; 1 only looks whether drafts are right, 0
        does not even that: the rows are too many.

        Args:
            rows: that the step runs, at least as many as `texts`, which take part.
        """
        rows = _bucket(rows)
        able = [size for size in self._sizes if size * rows <= MOST_VERIFIED]
        if len(able) < 2:
            return 0
        costs = self._costs.setdefault(rows, StepCosts())
        if not costs.known(1):
            return 1
        if not self._adaptive:
            return able[-1]
        prices = costs.in_plain_steps(able)

        def gain(size: int) -> float:
            return sum(text.expected(size) for text in texts) / len(texts) / prices[size]

        best = max(able, key=lambda size: (gain(size), -size))
        return best if best > 1 and self._budget.covers(prices[best] - 1) else 1

    def learn(self, rows: int, size: int, num_accepted: float, seconds: float | None) -> None:
        """A step of `size` tokens a row gave `num_accepted` a row that was not over; 0 where all
        were.

        Args:
            seconds: that it took; None where something else ran beside it.
        """
        costs = self._costs[_bucket(rows)]
        if seconds is not None:
            costs.add(size, seconds)
        self._budget.answered(num_accepted)
        if self._adaptive and size > 1:
            cost = costs.in_plain_steps(self._sizes)[size]
            if seconds is not None and not costs.known(size):
                cost = seconds / (costs.seconds(1) or seconds)
            self._budget.settle(num_accepted - cost if num_accepted else 0.0)


def _bucket(rows: int) -> int:
    """Numbers of rows whose steps take about as long are one."""
    return 1 << (rows - 1).bit_length()
