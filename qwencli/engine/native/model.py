"""A whole model on one device: encode images, prefill a prompt, decode one token.

The generation half builds on three calls: `encode_images` -> `prefill` -> `decode_step`. It owns
sampling, stopping, CUDA graphs and requests; this module owns none of them and reads nothing back
from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwencli.config import Attention
from qwencli.engine.cache.kv_cache import DynamicKVCache, KVCache, QuantizedKVCache, StaticKVCache
from qwencli.engine.cache.paged_kv import (
    DecodePages,
    PackedPrompts,
    PagedKVCache,
    QuantizedPagedKVCache,
)
from qwencli.engine.layers.decoder import Decoder, DeepStack
from qwencli.engine.layers.vision_layout import Grid
from qwencli.engine.layers.vision_tower import VisionFeatures, VisionTower
from qwencli.engine.loading import weights as loader
from qwencli.engine.native.prompt_inputs import ModelPrompt, PromptInputs, prompt_inputs
from qwencli.engine.ops.attention import ATTENTION, AttentionPlan, can_flash_decode, prompt_plan
from qwencli.engine.ops.decoder_ops import REFERENCE_OPS, DecoderOps, Step, paged_ops, prompt_ops
from qwencli.engine.ops.paged_attention import decode_slots
from qwencli.engine.ops.rope import CosSin, Rope
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme
from qwencli.errors import InputError
from qwencli.models.shapes import ModelShape, TextShape

if TYPE_CHECKING:
    from qwencli.engine.cache.recurrent_state import RecurrentStates

# Tokens of a prompt that run at a time. Their products keep a GPU busy, and the widest rows between
# (gate and up) take 120 MB of a 4B model.
PREFILL_CHUNK = 2048


def longest_chunk() -> int:
    """Tokens of the last chunk at most: a pass over the few that a picture of 1920x1080 has above
    the others would read all weights once more."""
    return PREFILL_CHUNK + PREFILL_CHUNK // 8


# Shape, rotary rows, type and device -> operations of a decode step.
Fused = Callable[[TextShape, torch.Tensor, torch.dtype, torch.device], DecoderOps]
# Operations of a lone step -> those of all prompts and steps that share a pool of pages.
RowOps = Callable[[DecoderOps], DecoderOps]


class QwenModel:
    """Any supported Qwen model, text or vision. Call everything under `torch.inference_mode()`.

    Args:
        max_seq_len: slots that a cache of this model can have at most.
        attention: a concrete implementation, not `auto`.
        fused: makes the operations of decode steps of one sequence; None = plain torch, as for
            prompts.
        kv: how static caches quantize keys and values; None = not.
        any_attention: whether decode steps may attend in another way where that is faster.
        batch_invariant: makes the operations of rows such that no row's result depends on others;
            None = the fastest for their number.
    """

    def __init__(
        self,
        shape: ModelShape,
        loaded: loader.LoadedWeights,
        max_seq_len: int,
        attention: Attention = Attention.SDPA,
        fused: Fused | None = None,
        kv: Scheme | None = None,
        any_attention: bool = False,
        batch_invariant: RowOps | None = None,
    ) -> None:
        embed = loaded.tensors["text.embed"]
        self.shape = shape
        self.device, self.dtype = embed.device, embed.dtype
        self.max_seq_len = max_seq_len
        self.unused_tensors = loaded.unused
        self.decoder = Decoder(
            shape.text, loaded.tensors, loaded.matrices, by_rows=fused is not None
        )
        self.draft_head = None
        if shape.text.draft_head:
            from qwencli.engine.layers.draft_head import DraftHead

            self.draft_head = DraftHead(
                shape.text, loaded.tensors, loaded.matrices, fused is not None, self.decoder
            )
        self.quantized = bool(loaded.matrices)
        # A picture's larger side is never above its number of tokens: positions lag behind slots.
        text = shape.text
        self.rope = Rope(text.rope, text.rotary_dim, max_seq_len, self.dtype, self.device)
        self.attention, self.any_attention = attention, any_attention
        self.kv = kv
        self._attend = ATTENTION[attention]
        self.flash_decode = attention is Attention.SDPA and can_flash_decode(
            text.num_heads, text.num_kv_heads, text.head_dim, self.dtype, self.device
        )
        # Whether prompts need no mask: both align the last query with the last key.
        self.flash_prompts = self.flash_decode or attention is Attention.FLASH
        self.step_ops = REFERENCE_OPS
        if fused is not None:
            self.step_ops = fused(shape.text, self.rope.rows, self.dtype, self.device)
        self.prompt_ops = prompt_ops(self.step_ops)
        self._few_rows_ops = paged_ops(self.step_ops, few=True)
        self._many_rows_ops = paged_ops(self.step_ops, few=False)
        self.batch_invariant = batch_invariant is not None
        # Whether steps of rows read on the device how long each is.
        self.reads_lengths = self.step_ops.attend_rows is not None
        if batch_invariant is not None:
            self._few_rows_ops = self._many_rows_ops = batch_invariant(self.step_ops)
            self.prompt_ops = replace(self.prompt_ops, norm_head=self._many_rows_ops.norm_head)
            self.reads_lengths = self._many_rows_ops.kv_len_on_device
        self.vision = None
        if shape.vision is not None:
            ops = self.step_ops
            own = ops.attend_segments(shape.vision.head_dim)
            self.vision = VisionTower(
                shape.vision, loaded.tensors, attention, ops.apply_rope, ops.add_norm, own
            )

    @classmethod
    def load(
        cls,
        folder: Path,
        shape: ModelShape,
        dtype: torch.dtype,
        device: torch.device,
        max_seq_len: int,
        attention: Attention = Attention.SDPA,
    ) -> QwenModel:
        """Load the checkpoint in `folder`. Raises ModelFileError, see `weights.load`."""
        return cls(shape, loader.load(folder, shape, dtype, device), max_seq_len, attention)

    @property
    def dense_copies_bytes(self) -> int:
        """What `keep_dense_copies` takes; 0 where it gives nothing."""
        if self.step_ops.many_rows is None or self.batch_invariant:
            return 0
        sizes = [matrix.rows * matrix.columns for matrix in self._dequantized_matrices]
        return sum(sizes) * self.dtype.itemsize

    def keep_dense_copies(self) -> None:
        """Keep dequantized the matrices that products of many rows would dequantize each time."""
        from qwencli.engine.kernels.dequantize import keep_dense

        keep_dense(self._dequantized_matrices, self.dtype)

    def forget_dense_copies(self) -> None:
        if self.dense_copies_bytes:
            from qwencli.engine.kernels.dequantize import forget_dense

            forget_dense(self._dequantized_matrices)

    @property
    def _dequantized_matrices(self) -> list[QuantizedTensor]:
        matrices = self.decoder.quantized_matrices
        if self.draft_head is not None:
            matrices = matrices + self.draft_head.quantized_matrices
        return [
            each
            for each in matrices
            if each.scheme is not Scheme.FP8
            and not (each.scheme is Scheme.INT8 and each.scaled_by_row)
        ]

    def static_cache(self, batch: int = 1, max_seq_len: int | None = None) -> StaticKVCache:
        """A cache of `max_seq_len` slots (default: the model's) for `batch` sequences."""
        slots = self.max_seq_len if max_seq_len is None else max_seq_len
        text, dtype, device = self.shape.text, self.dtype, self.device
        if self.kv is None:
            return StaticKVCache(text, batch, slots, dtype, device)
        return QuantizedKVCache(text, batch, slots, dtype, device, self.kv)

    def dynamic_cache(self, batch: int = 1) -> DynamicKVCache:
        """A cache that grows."""
        return DynamicKVCache(self.shape.text, batch)

    def encode_images(self, patches: torch.Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """Encode images or videos given as patches (see `VisionTower.encode`).

        Raises:
            InputError: a text model, or patches that do not match the grids.
        """
        if self.vision is None:
            raise InputError(f"{self.shape.model_type} is a text model and takes no images")
        return self.vision.encode(patches, grids)

    def prepare(
        self, prompts: Sequence[ModelPrompt], features: VisionFeatures | None = None
    ) -> PromptInputs:
        """Lay out prompts with the features of all their images, in the order of their tokens.

        Raises:
            InputError: see `prompt_inputs`; also a prompt that leaves no slot for a new token.
        """
        inputs = prompt_inputs(self.shape, prompts, features, self.device)
        if inputs.length >= self.max_seq_len:
            raise InputError(
                f"the prompt has {inputs.length} tokens, the cache holds {self.max_seq_len}",
                f"use --max-seq-len {inputs.length + 1} or more, or smaller images",
            )
        return inputs

    def prefill(
        self, inputs: PromptInputs, cache: KVCache, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Run the prompt from slot `start` (whatever is before it is in `cache`) to `stop`.

        A long prompt of one sequence is run in chunks, see `longest_chunk`, which bound what
        it needs beside the cache. Returns the logits [B, V] after the last token run; advances
        `cache.length` to `stop`. Of a quantized head they are those of a decode step, see
        `prompt_ops`. Pieces (`start` or `stop` given) are for a batch of one.
        """
        stop = inputs.length if stop is None else stop
        assert cache.length == start < stop <= inputs.length, "pieces follow each other"
        while inputs.batch == 1 and stop - start > longest_chunk():
            self._prefill_chunk(inputs, cache, start, start + PREFILL_CHUNK)
            start += PREFILL_CHUNK
        hidden = self._prefill_chunk(inputs, cache, start, stop)
        return self.prompt_logits(hidden[stop - start - 1 :: stop - start])

    def _prefill_chunk(
        self, inputs: PromptInputs, cache: KVCache, start: int, stop: int
    ) -> torch.Tensor:
        """The hidden states [B * (stop - start), hidden] of these tokens."""
        hidden = self.decoder.embed(inputs.ids[:, start:stop].flatten())
        visual = inputs.visual_slice(start, stop)
        deepstack = None
        if visual is not None:
            places, embeds, deepstack = visual
            hidden.index_copy_(0, places, embeds)
        plan = prompt_plan(
            start,
            stop - start,
            self.shape.text.num_kv_heads,
            self.dtype,
            self.device,
            inputs.left_pads,
            self.flash_prompts,
        )
        rope = self.rope.at(inputs.positions[:, :, start:stop])
        slots = torch.arange(start, stop, device=self.device)
        hidden = self.prompt_hidden(hidden, rope, slots, plan, cache, deepstack)
        cache.length = stop
        return hidden

    def prompt_hidden(
        self,
        hidden: torch.Tensor,
        rope: CosSin,
        slots: torch.Tensor,
        plan: AttentionPlan,
        cache: KVCache,
        deepstack: DeepStack | None,
    ) -> torch.Tensor:
        """All layers over a prompt's hidden states [B * S, hidden], overwritten.

        Args:
            rope: `Rope.at` of its positions. slots: int64 [S], where its keys and values go.
        """
        step = Step(
            batch=cache.batch,
            length=len(slots),
            rope=[rope] * self._num_layers,
            slots=slots,
            plan=plan,
            cache=cache,
            attention=self._attend,
            ops=self.prompt_ops,
        )
        return self.decoder.forward(hidden, step, deepstack)

    def prompt_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of hidden states [B, hidden] after the layers."""
        return self.decoder.logits(hidden, self.prompt_ops)

    def decode_step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slot: torch.Tensor,
        cache: KVCache,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """Logits [B * S, V] after S more tokens a row; see `decode_hidden`."""
        hidden = self.decode_hidden(tokens, positions, slot, cache, plan)
        return self.decoder.logits(hidden, self.step_ops)

    def decode_hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slot: torch.Tensor,
        cache: KVCache,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """Hidden states [B * S, hidden] of S more tokens a row; the body of a CUDA graph.

        Everything that changes from step to step is read from the device; the host decides only
        `plan.kv_len` (a bucket that covers the slots), and `cache.length` is the caller's.

        Args:
            tokens: int64 [B * S], the S of a row side by side.
            positions: int64 [B], rotary position of the first token of each row.
            slot: int64 [1], of the first token, equal for all rows.
            plan: with a mask (`decode_mask`) unless S is 1, kv_len is slot + 1 and no row is
                padded, or `step_ops.kv_len_on_device`.
        """
        # Positions never exceed slots. A compiled step cannot fill the table: its stepper did.
        if not torch.compiler.is_compiling():
            self.rope.reach(plan.kv_len)
        ops = self.step_ops
        length = len(tokens) // cache.batch
        places, slots = positions[:, None], slot
        if length > 1 and not ops.kv_len_on_device:
            ahead = torch.arange(length, device=self.device)
            places, slots = places + ahead, slot + ahead
        step = Step(
            batch=cache.batch,
            length=length,
            rope=None if ops.kv_len_on_device else self._step_rope(places),
            slots=slots,
            plan=plan,
            cache=cache,
            attention=self._attend,
            ops=ops,
            positions=positions,
            gained=self.decoder.head_gains is not None,
        )
        return self.decoder.forward(self.decoder.embed(tokens), step)

    def paged_cache(self, num_pages: int) -> PagedKVCache:
        """A pool of pages for any number of sequences."""
        text, dtype, device = self.shape.text, self.dtype, self.device
        if self.kv is None:
            return PagedKVCache(text, num_pages, dtype, device)
        return QuantizedPagedKVCache(text, num_pages, dtype, device, self.kv)

    def recurrent_states(
        self, num_slots: int, step_tokens: int = 1, checked_tokens: int = 0
    ) -> RecurrentStates | None:
        """What so many sequences keep beside their pages; None where that is nothing.

        Args:
            step_tokens, checked_tokens: see `RecurrentStates`.
        """
        text = self.shape.text
        if text.delta is None:
            return None
        from qwencli.engine.cache.recurrent_state import RecurrentStates

        return RecurrentStates(
            text, num_slots, self.dtype, self.device, step_tokens, checked_tokens
        )

    def prefill_packed(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cache: PagedKVCache,
        packed: PackedPrompts,
        deepstack: DeepStack | None,
        states: RecurrentStates | None = None,
    ) -> torch.Tensor:
        """All layers over prompts, or parts of them, side by side: hidden states [N, hidden],
        overwritten.

        Args:
            positions: int64 [3, N], rotary. slots: int64 [N], the pool's, where keys and values go.
            states: see `recurrent_states`.
        """
        step = self._packed_step(positions, slots, cache, packed, states)
        return self.decoder.forward(hidden, step, deepstack)

    def draft_head_packed(
        self,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cache: PagedKVCache,
        packed: PackedPrompts,
    ) -> None:
        """The head that drafts tokens over prompts, or parts of them, side by side, for the keys
        and values that they leave.

        Args:
            embeds: [N, hidden], of the token behind each. hidden: [N, hidden], by `prefill_packed`,
                whose other arguments these are.
        """
        assert self.draft_head is not None, "the shape has one"
        step = self._packed_step(positions, slots, cache, packed, None)
        self.draft_head.forward(embeds, step.ops.normed(hidden, self.decoder.norm), step)

    def _packed_step(
        self,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cache: PagedKVCache,
        packed: PackedPrompts,
        states: RecurrentStates | None,
    ) -> Step:
        by_row = self.batch_invariant
        rope = self._rope_of_rows(positions) if by_row else self.rope.at(positions[:, None])
        return Step(
            batch=1,
            length=len(slots),
            rope=[rope] * self._num_layers,
            slots=slots,
            plan=AttentionPlan(0, None),
            cache=cache,
            attention=self._attend,
            ops=self._many_rows_ops,
            pages=packed,
            states=None if states is None else states.layers,
        )

    def row_ops(self, rows: int) -> DecoderOps:
        """The operations of a step of so many rows that share a pool of pages."""
        return self._few_rows_ops if rows <= self.step_ops.max_batch_rows else self._many_rows_ops

    def decode_rows(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedKVCache,
        pages: DecodePages,
        states: RecurrentStates | None = None,
    ) -> torch.Tensor:
        """Hidden states [B * S, hidden] of S more tokens of each of B rows; the body of a CUDA
        graph.

        Args:
            tokens: int64 [B * S], the S of a row side by side.
            positions: int64 [B], rotary position of the first token of each row.
            states: see `recurrent_states`. Steps of several tokens leave the recurrent ones as they
                are, until `adopt_accepted`.
        """
        step = self._rows_step(len(tokens), positions, cache, pages, states)
        return self.decoder.forward(self.decoder.embed(tokens), step)

    def draft_head_rows(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedKVCache,
        pages: DecodePages,
    ) -> torch.Tensor:
        """The head that drafts tokens over S more of each of B rows: [B * S, hidden], not normed;
        part of a CUDA graph.

        Args:
            tokens: int64 [B * S], those *behind* the ones that `positions` and `pages` are of.
            hidden: [B * S, hidden], normed, of the latter.
        """
        assert self.draft_head is not None, "the shape has one"
        step = self._rows_step(len(tokens), positions, cache, pages, None)
        return self.draft_head.forward(self.decoder.embed(tokens), hidden, step)

    def _rows_step(
        self,
        num_tokens: int,
        positions: torch.Tensor,
        cache: PagedKVCache,
        pages: DecodePages,
        states: RecurrentStates | None,
    ) -> Step:
        rope: Sequence[CosSin] | None = None
        slots, gained = pages.places, False
        length = num_tokens // len(positions)
        if self.batch_invariant:
            cos, sin = self._rope_of_rows(positions.expand(3, -1))
            rope = [(cos.transpose(0, 1), sin.transpose(0, 1))] * self._num_layers
            slots = decode_slots(pages.tables, pages.places[:, None]).flatten()
        elif self.step_ops.attend_rows is None:
            gained = self.step_ops is REFERENCE_OPS and self.decoder.head_gains is not None
            ahead = torch.arange(length, device=self.device)
            at = positions[:, None] + ahead
            rope = self._step_rope(at) if gained else [self._rows_of(at)] * self._num_layers
            slots = decode_slots(pages.tables, pages.places[:, None] + ahead).flatten()
        return Step(
            batch=len(positions),
            length=length,
            rope=rope,
            slots=slots,
            plan=AttentionPlan(0, None),
            cache=cache,
            attention=self._attend,
            ops=self.row_ops(num_tokens),
            positions=positions,
            gained=gained,
            pages=pages,
            states=None if states is None else states.layers,
            updates=None
            if states is None or length == 1
            else states.by_layer(states.updates(len(positions), length)),
        )

    def adopt_accepted(
        self, states: RecurrentStates, pages: DecodePages, size: int, accepted: torch.Tensor
    ) -> None:
        """Bring states to where the first `accepted` [B] of the `size` tokens of each row of the
        last `decode_rows` leave them; `pages.places` are by now those of the next step."""
        assert pages.states is not None, "the step was given them"
        self.row_ops(len(accepted)).adopt_accepted(
            states.updates(len(accepted), size),
            states.recurrent,
            pages.states,
            pages.places,
            accepted,
        )

    def _rows_of(self, places: torch.Tensor) -> CosSin:
        cos, sin = self.rope.step(places)
        return cos.contiguous(), sin.contiguous()

    def _rope_of_rows(self, positions: torch.Tensor) -> CosSin:
        """`Rope.at` of positions [3, N] -> [1, N, 1, D]; on the CPU one at a time, as a vectorized
        cosine rounds otherwise at the end of what it is given."""
        if self.device.type != "cpu":
            return self.rope.at(positions[:, None])
        each = [self.rope.at(one) for one in torch.split(positions[:, None], 1, dim=2)]
        cos, sin = (torch.cat(part, 1) for part in zip(*each, strict=True))
        return cos, sin

    @property
    def _num_layers(self) -> int:
        """Decoder layers, and that of the head that drafts tokens."""
        return len(self.decoder.layers) + (self.draft_head is not None)

    def _step_rope(self, positions: torch.Tensor) -> Sequence[CosSin]:
        gains = self.decoder.head_gains
        if gains is None:
            return [self.rope.step(positions)] * self._num_layers
        return self.rope.step_by_layer(positions, gains)
