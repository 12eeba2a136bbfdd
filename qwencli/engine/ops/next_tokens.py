"""The end of a step of many rows in plain torch: the tokens chosen, and what the next step starts
from. `kernels.greedy_step` is held to it."""

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
    """Make `chosen` [R] the rows' new tokens; rows that are over stay as they are."""
    rows.token.copy_(torch.where(rows.done, rows.token, chosen))
    rows.seen.scatter_(1, rows.token[:, None], True)
    going = (~rows.done).to(torch.int64)
    for counter in (rows.slot, rows.position, rows.step):
        counter.add_(going)
    stopped = (rows.token[:, None] == rows.stop_ids).any(dim=1)
    rows.done.logical_or_(stopped | (rows.step >= rows.limit))


def choose_likeliest(logits: Tensor, rows: RowBuffers, with_penalty: bool) -> None:
    """`advance_rows` with the likeliest tokens by logits [R, V], of equal ones the first."""
    if with_penalty:
        logits = penalised(logits.float(), rows.seen, rows.penalty)
    advance_rows(logits.argmax(dim=-1), rows)
