"""Ways of running the decode step, one per cache mode.

A stepper enqueues the step whose token sits at `slot`, a number the host knows because every
step takes one slot. It never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from qwencli.config import Cache
from qwencli.engine.cache.kv_cache import StaticKVCache
from qwencli.engine.cache.kv_quantized import QuantizedKVCache
from qwencli.engine.cpu.decoder import CpuDecoder
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.ops.attention import AttentionPlan

SMALLEST_BUCKET = 256


class Stepper(Protocol):
    def prepare(self, first_slot: int, last_slot: int) -> None:
        """Do everything that the steps from `first_slot` to `last_slot` need beforehand."""

    def run(self, slot: int) -> None: ...


def bucket_for(slot: int, max_seq_len: int) -> int:
    """Smallest length class that contains `slot`: four classes to each doubling.

    Attention reads a whole class, so it reads at most a quarter more than is there.
    """
    octave = max(SMALLEST_BUCKET, 1 << max(slot.bit_length() - 1, 0))
    grain = max(SMALLEST_BUCKET, octave // 4)
    return min(max_seq_len, (slot // grain + 1) * grain)


def buckets_between(first_slot: int, last_slot: int, max_seq_len: int) -> list[int]:
    """The classes that the slots from first to last fall into, ascending."""
    buckets = [bucket_for(first_slot, max_seq_len)]
    while buckets[-1] <= last_slot:
        buckets.append(bucket_for(buckets[-1], max_seq_len))
    return buckets


class EagerStepper:
    """Operator by operator, over exactly the slots in use. `dynamic` and `static`."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state

    def prepare(self, first_slot: int, last_slot: int) -> None:
        return

    def run(self, slot: int) -> None:
        self._state.advance(self._state.kind, AttentionPlan(slot + 1, None))


class CpuStepper:
    """The step of `CpuDecoder`, over exactly the slots in use. `static` in float32 on the CPU,
    where neither weights nor cache are quantized."""

    def __init__(self, state: DecodeState) -> None:
        model, cache = state.model, state.cache
        assert isinstance(cache, StaticKVCache), "a growing cache has no views to keep"
        self._state = state
        self._decoder = CpuDecoder(
            model.decoder, model.rope, cache, model.attention, model.any_attention
        )

    def prepare(self, first_slot: int, last_slot: int) -> None:
        return

    def run(self, slot: int) -> None:
        self._state.advance_on_cpu(self._decoder, slot)


class CompiledStepper:
    """The step through torch.compile, one compilation per length class. `static-compile`."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._step: Callable[[SamplerKind, int], None] = torch.compile(
            state.advance_masked, dynamic=False
        )

    def prepare(self, first_slot: int, last_slot: int) -> None:
        self._state.model.rope.reach(bucket_for(last_slot, len(self._state.slots)))

    def run(self, slot: int) -> None:
        self._step(self._state.kind, bucket_for(slot, len(self._state.slots)))


class GraphStepper:
    """The step as a CUDA graph per kind of sampling and, but for kernels that read the length on
    the device, per length class. `static-graph`.
    """

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._graphs = GraphRunner(state.model.device)

    def prepare(self, first_slot: int, last_slot: int) -> None:
        """Capture the graphs that are missing. Overwrites the state: comes before `begin`."""
        kind = self._state.kind
        for bucket in self._buckets(first_slot, last_slot):
            if (kind, bucket) not in self._graphs:
                self._state.park(1)
                self._graphs.capture((kind, bucket), self._step(kind, bucket))

    def run(self, slot: int) -> None:
        self._graphs.replay((self._state.kind, self._buckets(slot, slot)[0]))

    def _step(self, kind: SamplerKind, bucket: int) -> Callable[[], None]:
        return lambda: self._state.advance_masked(kind, bucket)

    def _buckets(self, first_slot: int, last_slot: int) -> list[int]:
        whole = len(self._state.slots)
        if self._state.model.step_ops.kv_len_on_device:
            return [whole]
        return buckets_between(first_slot, last_slot, whole)


def decodes_on_cpu(state: DecodeState) -> bool:
    """Whether `CpuDecoder` can run the model."""
    device, dtype = state.model.device.type, state.model.dtype
    plain = not state.model.quantized and not isinstance(state.cache, QuantizedKVCache)
    return device == "cpu" and dtype == torch.float32 and plain


def _static(state: DecodeState) -> Stepper:
    return CpuStepper(state) if decodes_on_cpu(state) else EagerStepper(state)


STEPPERS: Mapping[Cache, Callable[[DecodeState], Stepper]] = {
    Cache.DYNAMIC: EagerStepper,
    Cache.STATIC: _static,
    Cache.STATIC_COMPILE: CompiledStepper,
    Cache.STATIC_GRAPH: GraphStepper,
}
