"""Tokens drafted by the model's own head, all on the device; see `layers.mtp`.

The head goes over the tokens of a step as soon as it is known which of them were right, and guesses
one token behind the last of those; each further guess is one more pass of it over a token a row. So
it has seen all tokens of a text, but for what it made of wrong drafts: that lies behind the last
token, and is written again before it is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwencli.engine.cache.paged_kv import DecodePages, PagedKVCache
from qwencli.engine.native.model import QwenModel

Tensor = torch.Tensor

# Passes of the head in a row at most: later ones are hardly ever right.
MAX_MTP_DRAFTS = 5
# How a draft is chosen: from logits [R, V], and how many drafts of the step are in front of it.
Choose = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class ChosenTokens:
    """What a step chose of S tokens it fed to each of R rows, which have moved on since.

    Args:
        hidden: [R * S, hidden], of the tokens fed, by `decode_rows`.
        chosen: int64 [R, S], the token behind each of them. count: int64 [R], how many of these
            the row took; 0 where it was over.
        slot, position: int64 [R], of the last of them. tables: int32 [R, pages].
        longest: tokens of the longest row at most, those fed included.
    """

    hidden: Tensor
    chosen: Tensor
    count: Tensor
    slot: Tensor
    position: Tensor
    tables: Tensor
    longest: int


def draft(
    model: QwenModel, cache: PagedKVCache, step: ChosenTokens, num_drafts: int, choose: Choose
) -> Tensor:
    """`num_drafts` tokens that may follow the last ones of each row: int64 [R, num_drafts]."""
    head, (rows, size) = model.draft_head, step.chosen.shape
    assert head is not None, "the model was loaded with one"
    first = DecodePages(step.tables, step.slot - step.count, step.longest)
    out = model.draft_head_rows(
        step.chosen.flatten(),
        model.decoder.norm(step.hidden),
        step.position - step.count,
        cache,
        first,
    )
    places = torch.arange(rows, device=out.device) * size + (step.count - 1).clamp(min=0)
    last, ops = out.index_select(0, places), model.row_ops(rows)
    drafts: list[Tensor] = []
    while True:
        drafts.append(choose(head.logits(last, ops), len(drafts)))
        if len(drafts) == num_drafts:
            return torch.stack(drafts, 1)
        ahead = len(drafts) - 1
        pages = DecodePages(step.tables, step.slot + ahead, step.longest + ahead + 1)
        hidden, position = head.norm(last), step.position + ahead
        last = model.draft_head_rows(drafts[-1], hidden, position, cache, pages)


def likeliest(logits: Tensor, ahead: int) -> Tensor:
    return logits.argmax(dim=-1)
