"""Ways of running a step that checks drafted tokens, one per cache mode that can.

A verifier enqueues the step whose first token sits at `slot` or before: how many tokens the steps
took that the host has not read yet it cannot know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from qwencli.config import Cache
from qwencli.engine.cache.kv_cache import StaticKVCache
from qwencli.engine.cpu.decoder import CpuDecoder
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.native.steppers import bucket_for, buckets_between, decodes_on_cpu

WHY_NOT: Mapping[Cache, str] = {
    Cache.DYNAMIC: "a cache that grows cannot take back the keys and values of wrong drafts",
    Cache.STATIC_COMPILE: "a compiled step would be compiled again for every number of tokens",
}


class Verifier(Protocol):
    def prepare(self, first_slot: int, last_slot: int, sizes: Sequence[int]) -> None:
        """Do everything that steps of `sizes` from `first_slot` on need beforehand.

        Args:
            last_slot: the highest that a step may be enqueued with.
        """

    def run(self, slot: int, size: int) -> None: ...


class EagerVerifier:
    """Operator by operator, over the slots up to the last that may be in use. `static`."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state

    def prepare(self, first_slot: int, last_slot: int, sizes: Sequence[int]) -> None:
        return

    def run(self, slot: int, size: int) -> None:
        self._state.verify_masked(self._state.kind, size, slot + size + 1)


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
    return CpuVerifier(state) if decodes_on_cpu(state) else EagerVerifier(state)


VERIFIERS: Mapping[Cache, Callable[[DecodeState], Verifier]] = {
    Cache.STATIC: _static,
    Cache.STATIC_GRAPH: GraphVerifier,
}
