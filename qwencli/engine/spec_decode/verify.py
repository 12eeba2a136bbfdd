"""Speculative decoding of one request: each step verifies drafts.

A verifier, one for each cache mode that can, enqueues the step whose first token sits at `slot` or
before: how many tokens the steps took that the host has not read yet it cannot know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from qwencli.config import Cache, Speculate
from qwencli.engine.cache.kv_cache import StaticKVCache
from qwencli.engine.cpu.decoder import CpuDecoder
from qwencli.engine.event_timer import EventTimer, Mark
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.native.decode_state import (
    DecodeState,
    bucket_for,
    buckets_between,
    decodes_on_cpu,
)
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.engine.spec_decode.policy import BatchDraftPolicy, DraftLengthPolicy, StepCosts
from qwencli.results import Speculation


class Verifier(Protocol):
    def prepare(self, first_slot: int, last_slot: int, sizes: Sequence[int]) -> None:
        """Do everything that steps of `sizes` from `first_slot` on need beforehand.

        Args:
            last_slot: the highest that a step may be enqueued with.
        """

    def run(self, slot: int, size: int) -> None: ...


class EagerVerifier:
    """Operator by operator, over the slots up to the last that may be in use, or kernel by kernel,
    which read on the device how many that are. `static`."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state

    def prepare(self, first_slot: int, last_slot: int, sizes: Sequence[int]) -> None:
        return

    def run(self, slot: int, size: int) -> None:
        state, kv_len = self._state, slot + size + 1
        if state.model.step_ops.kv_len_on_device:
            kv_len = len(state.slots)
        state.verify_masked(state.kind, size, kv_len)


class CpuVerifier(EagerVerifier):
    """The same with `CpuDecoder` for steps of one token. `static` in float32 on the CPU."""

    def __init__(self, state: DecodeState) -> None:
        super().__init__(state)
        model, cache = state.model, state.cache
        assert isinstance(cache, StaticKVCache), "a growing cache has no views to keep"
        self._decoder = CpuDecoder(
            model.decoder, model.rope, cache, model.attention, model.any_attention
        )

    def run(self, slot: int, size: int) -> None:
        if size == 1:
            self._state.verify_on_cpu(self._decoder, slot)
        else:
            super().run(slot, size)


class GraphVerifier:
    """The step as a CUDA graph per size, kind of sampling and, but for kernels that read the
    length on the device, per length class. `static-graph`."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._graphs = GraphRunner(state.model.device)

    def prepare(self, first_slot: int, last_slot: int, sizes: Sequence[int]) -> None:
        state, whole = self._state, len(self._state.slots)
        for size in sizes:
            buckets = [whole]
            if not state.model.step_ops.kv_len_on_device:
                buckets = buckets_between(first_slot + size, last_slot + size, whole)
            for bucket in buckets:
                key = (state.kind, size, bucket)
                if key not in self._graphs:
                    # One slot more than it feeds: that of the token it chooses.
                    state.park(size + 1)
                    self._graphs.capture(key, self._step(*key))

    def run(self, slot: int, size: int) -> None:
        state, bucket = self._state, len(self._state.slots)
        if not state.model.step_ops.kv_len_on_device:
            bucket = bucket_for(slot + size, bucket)
        self._graphs.replay((state.kind, size, bucket))

    def _step(self, kind: SamplerKind, size: int, bucket: int) -> Callable[[], None]:
        return lambda: self._state.verify_masked(kind, size, bucket)


def _static(state: DecodeState) -> Verifier:
    launched = state.model.step_ops.kv_len_on_device
    return CpuVerifier(state) if decodes_on_cpu(state) and not launched else EagerVerifier(state)


VERIFIERS: Mapping[Cache, Callable[[DecodeState], Verifier]] = {
    Cache.STATIC: _static,
    Cache.STATIC_GRAPH: GraphVerifier,
}


# What an adaptive policy chooses from.
AUTO_VERIFY_TOKENS = (1, 2, 4, MAX_VERIFY_TOKENS)
# Where the model's own head drafts. Each draft is a pass of it; a sixth is hardly ever right.
HEAD_VERIFY_TOKENS = (1, 2, 4, 6)


def verify_sizes(speculate: Speculate, by_head: bool = False) -> tuple[int, ...]:
    """Tokens that a step may check.

    Args:
        by_head: whether the model's own head drafts them.
    """
    if by_head:
        return HEAD_VERIFY_TOKENS
    return AUTO_VERIFY_TOKENS if speculate is Speculate.AUTO else (1, 1 + int(speculate))


def batch_policy(speculate: Speculate, by_head: bool = False) -> BatchDraftPolicy | None:
    """How rows that run together speculate; None = not at all.

    Args:
        by_head: see `verify_sizes`.
    """
    if speculate is Speculate.OFF:
        return None
    adaptive = by_head or speculate is Speculate.AUTO
    return BatchDraftPolicy(verify_sizes(speculate, by_head), adaptive, looks=not by_head)


class SpeculativeDecode:
    """A `DecodeStrategy`: steps of the sizes that `DraftLengthPolicy` chooses."""

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
    """Makes the strategies of an engine's greedy requests.

    Args:
        speculate: drafts of each step, or auto.
    """

    def __init__(self, verifier: Verifier, state: DecodeState, speculate: Speculate) -> None:
        assert speculate is not Speculate.OFF, "off has no speculator"
        self._verifier, self._state = verifier, state
        self._adaptive, self._sizes = speculate is Speculate.AUTO, verify_sizes(speculate)
        self._costs = StepCosts()

    def strategy(self) -> SpeculativeDecode:
        sizes = DraftLengthPolicy(self._sizes, self._adaptive, self._costs)
        return SpeculativeDecode(self._verifier, self._state, sizes)
