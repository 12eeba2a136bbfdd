"""Operations whose sums for a token do not depend on what runs beside it: one token at a time.

A product of more rows adds up in another order, a vectorized function ends its rows otherwise, and
attention is cut up by the longest row. Here every token, of a prompt or of a step, goes through
`REFERENCE_OPS` alone, in tensors of one shape, and attends to as many slots as it sees. So a row's
result is the same bits in any batch, behind any cut of its prompt, and behind a reused beginning.
The reference of `kernels.batch_invariant`, and what runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from qwencli.engine.cache.paged_kv import (
    PAGE_SIZE,
    DecodePages,
    PackedPrompts,
    PagedKVCache,
    pages_for,
)
from qwencli.engine.ops import decoder_ops
from qwencli.engine.ops.decoder_ops import DecoderOps, Layer, Matrix, RMSNorm, Step, dense
from qwencli.engine.ops.paged_attention import attend_alone

Tensor = torch.Tensor


def each_row(operation: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """`operation` of one row [1, n] of each of `rows` [N, n] at a time -> [N, m].

    Rows are copied: libraries look at where in memory a row begins.
    """
    alone = zip(*(torch.split(each, 1) for each in rows), strict=True)
    return torch.cat([operation(*(row.clone() for row in each)) for each in alone])


def norm_qkv(hidden: Tensor, layer: Layer) -> Tensor:
    """[N, hidden] -> [N, queries, keys and values]; this and those below: `decoder_ops` by row."""
    layer = replace(layer, qkv=dense(layer.qkv, hidden))
    return each_row(lambda row: decoder_ops.norm_qkv(row, layer), hidden)


def o_residual(attended: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
    layer = replace(layer, o=dense(layer.o, hidden))
    return each_row(lambda x, row: decoder_ops.o_residual(x, layer, row), attended, hidden)


def norm_gate_up(hidden: Tensor, layer: Layer) -> Tensor:
    layer = replace(layer, gate_up=dense(layer.gate_up, hidden))
    return each_row(lambda row: decoder_ops.norm_gate_up(row, layer), hidden)


def down_residual(activated: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
    layer = replace(layer, down=dense(layer.down, hidden))
    return each_row(lambda x, row: decoder_ops.down_residual(x, layer, row), activated, hidden)


def experts_residual(hidden: Tensor, layer: Layer) -> Tensor:
    return each_row(lambda row: decoder_ops.experts_residual(row, layer), hidden)


def norm_head(hidden: Tensor, norm: RMSNorm, head: Matrix) -> Tensor:
    """A quantized head is never there whole."""
    x = each_row(norm, hidden)
    pieces = [head]
    if not isinstance(head, torch.Tensor):
        pieces = [head.part(rows) for rows in head.pieces()]
    logits = []
    for piece in pieces:
        weight = dense(piece, x)
        logits.append(each_row(lambda row, weight=weight: torch.mm(row, weight), x))
    return torch.cat(logits, 1)


def seen_slots(pages: DecodePages | PackedPrompts) -> Sequence[Tensor]:
    """The pool's slots that each token of a step, or of prompts side by side, attends to, its own
    included."""
    assert pages.tables is not None, "the runner gives prompts theirs"
    if isinstance(pages, DecodePages):
        own = [(row, place) for row, place in enumerate(pages.places.tolist())]
    else:
        parts = enumerate(zip(pages.contexts, pages.lengths, strict=True))
        own = [(row, start + n) for row, (start, length) in parts for n in range(length)]
    offsets = torch.arange(PAGE_SIZE)
    slots = []
    for row, place in own:
        table = pages.tables[row, : pages_for(place + 1)].to(torch.int64)
        slots.append((table[:, None] * PAGE_SIZE + offsets).flatten()[: place + 1])
    return slots


def attend(qkv: Tensor, layer: Layer, step: Step) -> Tensor:
    """`decoder_ops.attend_pages`, a token after the other."""
    cache = step.cache
    assert isinstance(cache, PagedKVCache) and step.pages is not None, "only rows run so"
    assert step.rope is not None, "looked up by the model"
    cos, sin = (angles.reshape(len(qkv), 1, 1, -1) for angles in step.rope[layer.index])
    attended = []
    for index, slots in enumerate(seen_slots(step.pages)):
        split = qkv[index].clone().view(1, 1, -1, layer.head_dim)
        angles = cos[index : index + 1].clone(), sin[index : index + 1].clone()
        alone = replace(
            step,
            batch=1,
            length=1,
            rope=[angles] * (layer.index + 1),
            slots=step.slots[index : index + 1],
        )
        decoder_ops.qk_norm_rope_store(split, layer, alone)
        keys, values = cache.read(layer.index, slots)
        attended.append(attend_alone(split[0, :, : layer.num_heads], keys, values))
    return torch.cat(attended)


BATCH_INVARIANT_OPS = DecoderOps(
    norm_qkv=norm_qkv,
    attend=attend,
    o_residual=o_residual,
    norm_gate_up=norm_gate_up,
    down_residual=down_residual,
    norm_head=norm_head,
    experts_residual=experts_residual,
)
