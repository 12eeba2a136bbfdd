"""Tokens drafted by the model's own head, all on the device; see `layers.draft_head`.

The head goes over the tokens of a step as soon as it is known which of them were right, and guesses
one token behind the last of those; each further guess is one more pass of it over a token a row. So
it has seen all tokens of a text, but for what it made of wrong drafts: that lies behind the last
token, and is written again before it is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qwencli.engine.cache.paged_kv import DecodePages, PagedKVCache
from qwencli.engine.device_memory import upload
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.sampler import Sampler
from qwencli.engine.ops.decoder_ops import Drafts
from qwencli.engine.ops.next_tokens import Candidates, RowBuffers
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS

Tensor = torch.Tensor

# Tokens that the head catches up with at once; and hidden states that are kept for it, which those
# of a step that turn out wrong must not overwrite.
CAUGHT_UP, RING = MAX_VERIFY_TOKENS, 2 * MAX_VERIFY_TOKENS
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
    ops = model.row_ops(rows)
    first = DecodePages(step.tables, step.slot - step.count, step.longest)
    out = model.draft_head_rows(
        step.chosen.flatten(),
        ops.normed(step.hidden, model.decoder.norm),
        step.position - step.count,
        cache,
        first,
    )
    places = torch.arange(rows, device=out.device) * size + (step.count - 1).clamp(min=0)
    last = out.index_select(0, places)
    drafts: list[Tensor] = []
    while True:
        drafts.append(choose(head.logits(last, ops), len(drafts)))
        if len(drafts) == num_drafts:
            return torch.stack(drafts, 1)
        ahead = len(drafts) - 1
        pages = DecodePages(step.tables, step.slot + ahead, step.longest + ahead + 1)
        hidden, position = ops.normed(last, head.norm), step.position + ahead
        last = model.draft_head_rows(drafts[-1], hidden, position, cache, pages)


class HeadInputs:
    """Hidden states of R rows that the head has not gone over yet.

    Rows take steps without drafts too, and the head is not run for those: it catches up before it
    drafts again, with `CAUGHT_UP` tokens at most. What lies further back it never sees, and then
    guesses worse.

    `hidden` [R, RING, hidden] has that of the token in slot s at s % RING, by `decode_rows`; `done`
    int64 [R] says how many tokens of each row the head is through with.
    """

    def __init__(self, rows: int, model: QwenModel) -> None:
        size = rows, RING, model.shape.text.hidden_size
        self.hidden = torch.zeros(size, dtype=model.dtype, device=model.device)
        self.done = torch.zeros(rows, dtype=torch.int64, device=model.device)

    def begin(self, places: Tensor, last_slots: Tensor, hidden: Tensor) -> None:
        """Set up rows at `places` [n] whose prompts end at `last_slots` [n], with the hidden states
        [n, hidden] of their last tokens: the head is through with those in front of them."""
        self.hidden[places, last_slots % RING] = hidden
        self.done.index_copy_(0, places, last_slots)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows to others, (from, to)."""
        sources, places = upload(
            [torch.tensor(side) for side in zip(*moves, strict=True)], self.done.device
        )
        for state in (self.hidden, self.done):
            state.index_copy_(0, places, state.index_select(0, sources))

    def note(self, hidden: Tensor, slot: Tensor) -> None:
        """Take over `hidden` [R * S, hidden] of tokens that were fed to the first R rows from
        `slot` [R] on."""
        rows, at = len(slot), slot[:, None]
        states = hidden.view(rows, -1, hidden.shape[-1])
        if states.shape[1] > 1:  # a plain step has few kernels to spare
            at = at + torch.arange(states.shape[1], device=slot.device)
        at = at % RING
        self.hidden[:rows].scatter_(1, at[..., None].expand_as(states), states)

    def draft(
        self,
        model: QwenModel,
        cache: PagedKVCache,
        rows: RowBuffers,
        drafts: Drafts,
        tables: Tensor,
        longest: int,
        num_drafts: int,
        choose: Choose,
    ) -> None:
        """Guess what follows `rows.token` and put it into `drafts.input_ids`, with what the head
        has not seen before."""
        slot, done = rows.slot, self.done[: len(rows.slot)]
        # Rows that nothing uses are at 0, and were elsewhere.
        count = (slot - done).clamp(0, CAUGHT_UP)
        ahead = torch.arange(CAUGHT_UP, device=slot.device)
        at = (slot - count)[:, None] + ahead
        hidden = self.hidden[: len(slot)]
        index = (at % RING)[..., None].expand(-1, -1, hidden.shape[-1])
        behind = (at + 1).clamp(max=drafts.ids.shape[1] - 1)
        step = ChosenTokens(
            hidden=hidden.gather(1, index).flatten(0, 1),
            chosen=drafts.ids.gather(1, behind).to(torch.int64),
            count=count,
            slot=slot,
            position=rows.position,
            tables=tables,
            longest=longest,
        )
        guessed = draft(model, cache, step, num_drafts, choose)
        drafts.input_ids[:, 0].copy_(rows.token)
        drafts.input_ids[:, 1 : 1 + num_drafts].copy_(guessed)
        # While a graph is captured rows are over, and take the step afterwards.
        done.copy_(torch.where(rows.done, done, slot))


def likeliest(logits: Tensor, ahead: int) -> Tensor:
    return logits.argmax(dim=-1)


class DrawnDrafts:
    """Chooses drafts as the rows' own settings say, and keeps what each was drawn from.

    Args:
        step: int64 [R], how many tokens the rows have chosen.
    """

    def __init__(self, sampler: Sampler, step: Tensor) -> None:
        self._sampler, self._step = sampler, step
        self._drafts: list[Tensor] = []
        self._drawn_from: list[Candidates] = []

    def __call__(self, logits: Tensor, ahead: int) -> Tensor:
        token, candidates = self._sampler.draw_draft(logits, self._drafts, self._step)
        self._drafts.append(token)
        self._drawn_from.append(candidates)
        return token

    @property
    def proposal(self) -> Candidates | None:
        """The candidates that all drafts were drawn from, [R, drafts, C]; None without drafts."""
        if not self._drawn_from:
            return None
        parts = [(each.ids, each.weights) for each in self._drawn_from]
        return Candidates(*(torch.stack(side, 1) for side in zip(*parts, strict=True)))
