"""How the next tokens of rows are chosen, in plain torch.

The likeliest ones, and what the next step starts from: `kernels.greedy_step` is held to it. And
drafts checked against the distribution that a token would have been drawn from (rejection
sampling).

A draft x that was drawn from q stays with the chance min(1, p(x) / q(x)), where p is the model's
distribution; the first that does not is replaced by a draw from what p has more than q, and behind
the last draft one more token is drawn from p. What comes out is distributed as draws from p alone
(Leviathan et al. 2023, arXiv 2211.17192, theorem 1). A draft that nobody drew, such as one looked
up in the text, has a q that is 1 at x.

How many drafts a step checks depends on how long steps take, so this gives other tokens each time,
whatever they are drawn from. Where a seed was given, a token is what a plain step would draw, and a
draft stays where it is that: less often, but for drafts drawn from the same numbers not much less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class RowBuffers:
    """What the end of a step reads and writes of R rows, on the device.

    Args:
        token, slot, position, step, limit: int64 [R]. done: bool [R]. See `RowState`.
        stop_ids: int64 [R, n], -1 where unused.
        seen: bool [R, V]. penalty: float32 [R], on the scores of tokens seen; 1 = none.
    """

    token: Tensor
    slot: Tensor
    position: Tensor
    step: Tensor
    limit: Tensor
    done: Tensor
    stop_ids: Tensor
    seen: Tensor
    penalty: Tensor


def penalised(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores [R, V], those of tokens seen divided by the penalty [R] where positive, multiplied
    where negative (Keskar et al. 2019, CTRL, section 4.1, with the sign rule transformers uses)."""
    by = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * by, scores / by), scores)


def advance_rows(chosen: Tensor, rows: RowBuffers) -> None:
    """Make `chosen` [R] the rows' new tokens; rows that are over stay as they are. All of it, or
    nothing where memory is short."""
    token = torch.where(rows.done, rows.token, chosen)
    going = (~rows.done).to(torch.int64)
    stopped = (token[:, None] == rows.stop_ids).any(dim=1)
    over = stopped | (rows.step + going >= rows.limit)
    rows.token.copy_(token)
    rows.seen.scatter_(1, token[:, None], True)
    for counter in (rows.slot, rows.position, rows.step):
        counter.add_(going)
    rows.done.logical_or_(over)


def choose_likeliest(logits: Tensor, rows: RowBuffers, with_penalty: bool) -> None:
    """`advance_rows` with the likeliest tokens by logits [R, V], of equal ones the first."""
    if with_penalty:
        logits = penalised(logits.float(), rows.seen, rows.penalty)
    advance_rows(logits.argmax(dim=-1), rows)


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be chosen, likeliest first: `ids` int64 [..., C], and how likely each is:
    `weights` float32 [..., C], whose sum need not be 1; 0 = never."""

    ids: Tensor
    weights: Tensor

    @property
    def probs(self) -> Tensor:
        return self.weights / self.weights.sum(-1, keepdim=True)

    def draw(self, uniforms: Tensor) -> Tensor:
        """The tokens [...] at `uniforms` [...], each from 0 to below 1, of what adds up."""
        cumulative = self.weights.cumsum(-1)
        total = cumulative[..., -1:]
        pick = (cumulative <= uniforms[..., None] * total).sum(-1, keepdim=True)
        # Rounding may leave the target at the very top; the last that is possible is the answer:
        # the one that makes the sum whole.
        last = (cumulative < total).sum(-1, keepdim=True)
        return self.ids.gather(-1, torch.minimum(pick, last)).squeeze(-1)


def check_drafts(
    target: Candidates,
    drafts: Tensor,
    proposal: Candidates | None,
    vocab_size: int,
    accept: Tensor,
    redraw: Tensor,
    seeded: Tensor,
) -> Tensor:
    """Tokens chosen behind each of S tokens fed, int64 [R, S]: the draft itself where it stays,
    else another one. What stands behind the first that is another one is of no use.

    Args:
        target: [R, S, C], the model's. drafts: int64 [R, S - 1], all tokens fed but the first.
        proposal: [R, S - 1, D], what they were drawn from; None = nobody drew them.
        accept: [R, S - 1], redraw: [R, S], uniform draws. seeded: bool [R], rows whose tokens are
            drawn from `target` by `redraw` alone.
    """
    checked = drafts.shape[1]
    ids, probs = target.ids[:, :checked], target.probs[:, :checked]
    here = ids == drafts[..., None]
    if proposal is None:
        own, drawn_from = torch.ones_like(accept), here.to(probs.dtype)
    else:
        odds = proposal.probs
        own = (odds * (proposal.ids == drafts[..., None])).sum(-1)
        spread = odds.new_zeros(*drafts.shape, vocab_size).scatter_(-1, proposal.ids, odds)
        drawn_from = spread.gather(-1, ids)
    stays = (accept * own < (probs * here).sum(-1)) & ~seeded[:, None]
    left = (probs - drawn_from).clamp_(min=0)
    # Nothing is left where both are equal but for rounding.
    some = (left.sum(-1, keepdim=True) > 0) & ~seeded[:, None, None]
    left = torch.where(some, left, target.weights[:, :checked])
    weights = torch.cat((left, target.weights[:, checked:]), 1)
    others = Candidates(target.ids, weights).draw(redraw)
    return torch.cat((drafts.where(stays, others[:, :checked]), others[:, checked:]), 1)
