"""How a request takes its steps: one token each, or as many as speculation finds worth checking."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch

from qwencli.config import Speculate
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.steppers import Stepper
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.engine.spec_decode.policy import DraftLengthPolicy, StepCosts
from qwencli.engine.spec_decode.verify import Verifier
from qwencli.results import Speculation

# What an adaptive pace chooses from.
AUTO_VERIFY_TOKENS = (1, 2, 4, MAX_VERIFY_TOKENS)


class DecodeStrategy(Protocol):
    def begin(self, clock: EventTimer, first_slot: int, last_slot: int) -> None:
        """Prepare for a request whose first step feeds `first_slot`, and whose last token would
        get `last_slot`. Overwrites the decoding state."""

    def step(self) -> torch.Tensor:
        """Enqueue a step; returns the buffer that says what it chose."""

    def tokens(self, values: list[int], before: Mark, mark: Mark) -> list[int]:
        """The tokens of the next unread step, from its `values`.

        Args:
            before, mark: when the step before it and this one ended.
        """

    def result(self) -> Speculation | None: ...


class AutoregressiveDecode:
    """One token a step."""

    def __init__(self, stepper: Stepper, state: DecodeState) -> None:
        self._stepper, self._state = stepper, state
        self._slot = 0

    def begin(self, clock: EventTimer, first_slot: int, last_slot: int) -> None:
        self._stepper.prepare(first_slot, last_slot)
        self._slot = first_slot

    def step(self) -> torch.Tensor:
        self._stepper.run(self._slot)
        self._slot += 1
        return self._state.token

    def tokens(self, values: list[int], before: Mark, mark: Mark) -> list[int]:
        return values

    def result(self) -> Speculation | None:
        return None


class SpeculativeDecode:
    """Steps of the sizes that `DraftLengthPolicy` chooses."""

    def __init__(self, verifier: Verifier, state: DecodeState, sizes: DraftLengthPolicy) -> None:
        assert state.drafts is not None, "the engine made room for them"
        self._verifier, self._state, self._sizes = verifier, state, sizes
        self._verify_output = state.drafts.verify_output
        self._unread: deque[int] = deque()

    def begin(self, clock: EventTimer, first_slot: int, last_slot: int) -> None:
        self._clock = clock
        self._verifier.prepare(first_slot, last_slot, self._sizes.all)
        # Where the next step begins at most: unread ones may have taken all they were given.
        self._slot, self._last_slot = first_slot, last_slot

    def step(self) -> torch.Tensor:
        size = self._sizes.next()
        self._verifier.run(min(self._slot, self._last_slot), size)
        self._unread.append(size)
        self._slot += size
        return self._verify_output

    def tokens(self, values: list[int], before: Mark, mark: Mark) -> list[int]:
        size = self._unread.popleft()
        num_accepted, num_matched, *chosen = values
        self._slot -= size - num_accepted
        if num_accepted:
            self._sizes.learn(size, num_matched, num_accepted, self._clock.seconds(before, mark))
        return chosen[:num_accepted]

    def result(self) -> Speculation | None:
        return self._sizes.result()


class Speculator:
    """Makes the paces of an engine's greedy requests.

    Args:
        speculate: drafts of each step, or auto.
    """

    def __init__(self, verifier: Verifier, state: DecodeState, speculate: Speculate) -> None:
        assert speculate is not Speculate.OFF, "off has no speculator"
        self._verifier, self._state = verifier, state
        self._adaptive = speculate is Speculate.AUTO
        self._sizes = AUTO_VERIFY_TOKENS if self._adaptive else (1, 1 + int(speculate))
        self._costs = StepCosts()

    def strategy(self) -> SpeculativeDecode:
        sizes = DraftLengthPolicy(self._sizes, self._adaptive, self._costs)
        return SpeculativeDecode(self._verifier, self._state, sizes)
