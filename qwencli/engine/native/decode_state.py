"""The decode step of one sequence: its state on the device, and a stepper for each cache mode.

The step reads and writes fixed buffers and asks the host nothing, so it can run eagerly, compiled,
or as a replayed CUDA graph with the same result. The host may enqueue steps ahead of what it has
read: once a stop token has been chosen, further steps change nothing.

A stepper enqueues the step whose token sits at `slot`, a number the host knows because every
step takes one slot. It never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from qwencli.config import Attention, Cache, SamplingParams
from qwencli.engine.cache.kv_cache import KVCache, QuantizedKVCache, StaticKVCache
from qwencli.engine.cpu.decoder import CpuDecoder
from qwencli.engine.device_memory import upload
from qwencli.engine.frontend.model_files import MAX_STOP_TOKENS
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.sampler import LIKELIEST, Sampler, SamplerKind, TokenMasks, kind_of
from qwencli.engine.ops.attention import AttentionPlan, Spans, decode_mask
from qwencli.engine.ops.decoder_ops import SamplingBuffers
from qwencli.engine.spec_decode import ngram


class DecodeState:
    """Buffers of one sequence.

    `token` [1] is the last token chosen, `slot` [1] where its keys and values go, `position` [1]
    its rotary position, `step` [1] how many tokens the request has chosen after it, `done` [1]
    whether it ended the answer. All on the device; int64 but for `done`.

    Args:
        max_seq_len: slots of the cache.
        with_drafts: whether steps may check drafted tokens too (`verify`).
    """

    def __init__(
        self, model: QwenModel, cache: KVCache, max_seq_len: int, with_drafts: bool = False
    ) -> None:
        device = model.device
        self.model, self.cache = model, cache
        self.kind = SamplerKind.GREEDY
        # Of steps of kind LOGITS, [1, V] float32, and what may be chosen from them.
        self.logits: torch.Tensor | None = None
        self.masks: TokenMasks | None = None
        self.sampler = Sampler(model.shape.text.vocab_size, max_seq_len, device)
        self.token, self.slot, self.position, self.step = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.done = torch.zeros(1, dtype=torch.bool, device=device)
        # One row a possible stop token; unused rows hold an id that no token has.
        self.stop_ids = torch.full((MAX_STOP_TOKENS, 1), -1, dtype=torch.int64, device=device)
        self.slots = torch.arange(max_seq_len, device=device)
        self.drafts = ngram.empty_drafts(max_seq_len, device) if with_drafts else None
        self._spans = Spans.on(device)
        self._lengths = self._spans.slots[1:]
        self._sampling = SamplingBuffers(
            token=self.token,
            slot=self.slot,
            position=self.position,
            step=self.step,
            done=self.done,
            stop_ids=self.stop_ids,
            seen=self.sampler.seen[0],
            penalty=self.sampler.penalty,
        )

    def begin(
        self,
        sampling: SamplingParams,
        prompt_ids: torch.Tensor,
        stop_ids: Sequence[int],
        next_position: torch.Tensor,
    ) -> None:
        """Set up for a request whose prompt [S] is about to be or has been prefilled.

        Args:
            next_position: int64 [1] on the device, rotary position after the prompt.
        """
        assert len(stop_ids) <= MAX_STOP_TOKENS, "checked when the model's files are opened"
        self.kind = kind_of(sampling)
        self.sampler.begin(sampling, prompt_ids)
        self.slot.fill_(len(prompt_ids))
        self.position.copy_(next_position)
        self.step.zero_()
        self.done.zero_()
        padded = [*stop_ids, *[-1] * (MAX_STOP_TOKENS - len(stop_ids))]
        (ids,) = upload([torch.tensor(padded)[:, None]], self.stop_ids.device)
        self.stop_ids.copy_(ids)
        if self.drafts is not None:
            ngram.begin(self.drafts, prompt_ids, sampling.max_new_tokens)

    def hold_logits(self) -> TokenMasks:
        """Make room for steps of kind LOGITS; returns the masks of what is chosen from them."""
        if self.masks is None:
            vocab_size, device = self.sampler.vocab_size, self.model.device
            self.masks = TokenMasks(1, vocab_size, device)
            self.logits = torch.zeros(1, vocab_size, device=device)
        return self.masks

    def park(self, size: int) -> None:
        """Make steps of up to `size` slots harmless: what they write must not land on keys and
        values that are in use, and once the answer has ended steps stay where they are."""
        self.slot.fill_(len(self.slots) - size)
        self.done.fill_(True)

    def sample_first(self, logits: torch.Tensor, masks: torch.Tensor | None = None) -> None:
        """Choose the first token from the prefill's logits [1, V], of those that `masks` allow."""
        self.token.copy_(self.sampler.sample(logits, self.step, self.kind, masks))
        self.done.copy_((self.token == self.stop_ids).any(dim=0))
        self.step.add_(1)
        if self.drafts is not None:
            self.drafts.input_ids[:1].copy_(self.token)
            self.drafts.ids.index_copy_(0, self.slot, self.token.to(torch.int32))

    def advance(self, kind: SamplerKind, plan: AttentionPlan) -> None:
        """One step: feed `token`, choose the next one."""
        model, ops = self.model, self.model.step_ops
        hidden = model.decode_hidden(self.token, self.position, self.slot, self.cache, plan)
        if kind in LIKELIEST and ops.lm_head_argmax is not None:
            model.decoder.lm_head_argmax(hidden, ops, self._sampling)
            return
        logits = model.decoder.logits(hidden, ops)
        if kind is SamplerKind.LOGITS:
            assert self.logits is not None, "hold_logits() comes first"
            self.logits.copy_(logits)
            return
        self._choose(logits, kind)

    def choose_masked(self, kind: SamplerKind) -> None:
        """End a step of kind LOGITS: choose what the row of `masks.host` allows."""
        assert self.logits is not None and self.masks is not None, "hold_logits() comes first"
        self._choose(self.logits, kind, self.masks.sent(1))

    def _choose(
        self, logits: torch.Tensor, kind: SamplerKind, masks: torch.Tensor | None = None
    ) -> None:
        chosen = self.sampler.sample(logits, self.step, kind, masks)
        self.token.copy_(torch.where(self.done, self.token, chosen))
        going = (~self.done).to(torch.int64)
        self.slot.add_(going)
        self.position.add_(going)
        self.step.add_(going)
        self.done.logical_or_((self.token == self.stop_ids).any(dim=0))

    def advance_on_cpu(self, decoder: CpuDecoder, slot: int) -> None:
        """One step of a host that reads each token before it takes the next one.

        `slot` and `position` stay where the answer began: the host counts by itself.
        """
        position = int(self.position) + slot - int(self.slot)
        logits = decoder.logits(int(self.token), position, slot)
        if self.kind is SamplerKind.LOGITS:
            assert self.logits is not None, "hold_logits() comes first"
            self.logits.copy_(logits)
        elif self.kind is SamplerKind.ARGMAX:
            # numpy's takes 10 us for a vocabulary of 150,000, torch's 300 on the CPU.
            self.token.fill_(int(logits.numpy().argmax()))
        else:
            self.token.copy_(self.sampler.sample(logits[None], self.step, self.kind))
            self.step.add_(1)  # nothing but draws reads it

    def verify(self, kind: SamplerKind, size: int, plan: AttentionPlan) -> None:
        """One greedy step of `size` tokens: feed the last token and drafts behind it, choose one to
        `size` tokens, draft the next ones. `drafts.verify_output` says what came of it."""
        assert self.drafts is not None and kind in LIKELIEST, "the caller knows what it has"
        model, ops = self.model, self.model.step_ops
        input_ids = self.drafts.input_ids[:size]
        hidden = model.decode_hidden(input_ids, self.position, self.slot, self.cache, plan)
        if ops.lm_head_verify is not None:
            model.decoder.lm_head_verify(hidden, ops, self._sampling, self.drafts)
            return
        self._accept(model.decoder.logits(hidden, ops), kind, plan.kv_len)

    def verify_on_cpu(self, decoder: CpuDecoder, slot: int) -> None:
        """`verify` of one token by a host that reads each step before it takes the next one."""
        assert self.drafts is not None, "the caller knows what it has"
        logits = decoder.logits(int(self.token), int(self.position), slot)
        self._accept(logits[None], self.kind, slot + 2)

    def _accept(self, logits: torch.Tensor, kind: SamplerKind, kv_len: int) -> None:
        assert self.drafts is not None, "callers looked"
        chosen = self.sampler.likeliest(logits, self.drafts.input_ids[: len(logits)], kind)
        rows, drafts = ngram.one_row(self._sampling, self.drafts)
        ngram.accept(chosen[None], rows, drafts)
        ngram.draft(rows, drafts, kv_len)

    def verify_masked(self, kind: SamplerKind, size: int, kv_len: int) -> None:
        """`verify` over the first `kv_len` slots, at least one more than the step can take."""
        self.verify(kind, size, self._plan(size, kv_len))

    def advance_masked(self, kind: SamplerKind, kv_len: int) -> None:
        """One step that reads the first `kv_len` slots and hides those not yet written."""
        self.advance(kind, self._plan(1, kv_len))

    def _plan(self, size: int, kv_len: int) -> AttentionPlan:
        """What `size` tokens from `slot` on see of the first `kv_len` slots."""
        model = self.model
        if model.step_ops.kv_len_on_device:
            return AttentionPlan(kv_len, None)
        self._lengths.copy_(self.slot + size)
        # Compiled, attention is one of the operators that torch may fuse.
        if size == 1 and model.flash_decode and not torch.compiler.is_compiling():
            return AttentionPlan(kv_len, None, self._lengths, spans=self._spans)
        if model.attention is Attention.FLASH:
            return AttentionPlan(kv_len, None, self._lengths)
        own = self.slot
        if size > 1:
            own = own + torch.arange(size, device=model.device)
        mask = decode_mask(self.slots[:kv_len], own, None, model.dtype)
        return AttentionPlan(kv_len, mask, self._lengths)


SMALLEST_BUCKET = 256


class Stepper(Protocol):
    """Runs decode steps of a `DecodeState`: plainly, compiled, or as replays of CUDA graphs."""

    def prepare(self, first_slot: int, last_slot: int) -> None:
        """Do everything that the steps from `first_slot` to `last_slot` need beforehand."""

    def run(self, slot: int) -> None:
        """One step, whose token goes to `slot`; its result stays on the device."""


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
    """Operator by operator, over exactly the slots in use. `dynamic`, and `static` without kernels
    that read the length on the device."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state

    def prepare(self, first_slot: int, last_slot: int) -> None:
        return

    def run(self, slot: int) -> None:
        self._state.advance(self._state.kind, AttentionPlan(slot + 1, None))


class LaunchedStepper:
    """Kernel by kernel, each of which reads the length on the device. `static`."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state

    def prepare(self, first_slot: int, last_slot: int) -> None:
        return

    def run(self, slot: int) -> None:
        self._state.advance_masked(self._state.kind, len(self._state.slots))


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
        from qwencli.engine.graphs import GraphRunner

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
    if state.model.step_ops.kv_len_on_device:
        return LaunchedStepper(state)
    return CpuStepper(state) if decodes_on_cpu(state) else EagerStepper(state)


STEPPERS: Mapping[Cache, Callable[[DecodeState], Stepper]] = {
    Cache.DYNAMIC: EagerStepper,
    Cache.STATIC: _static,
    Cache.STATIC_COMPILE: CompiledStepper,
    Cache.STATIC_GRAPH: GraphStepper,
}
