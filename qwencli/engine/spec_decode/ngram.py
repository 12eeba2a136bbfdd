"""Prompt look-up: tokens drafted from earlier text, and which of them a step accepts.

After a text that ends in words it had before, the words that came after them then are a good guess
(prompt look-up decoding, Saxena 2023; Yang et al. 2023, arXiv 2304.04487). A step feeds the last
token and the drafts behind it; the likeliest token after each is what plain steps would have
chosen as long as the drafts before were right. So no answer changes, but for the rounding of sums
in another order.

The plain operators here are the reference of a kernel. All happens on the device: the host neither
drafts nor waits.
"""

from __future__ import annotations

import torch

from qwencli.config import Speculate
from qwencli.engine.ops.decoder_ops import Drafts, SamplingBuffers
from qwencli.engine.ops.next_tokens import RowBuffers

Tensor = torch.Tensor

# Tokens of a step at most: one that is known, and the drafts.
MAX_VERIFY_TOKENS = 1 + int(Speculate.SEVEN)
# Tokens at the end that are looked for; the longest match counts, and of those the last.
LONGEST_NGRAM = 3


def empty_drafts(max_seq_len: int, device: torch.device, *rows: int) -> Drafts:
    """Buffers of one sequence, or of `rows`."""

    def integers(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(*rows, size, dtype=dtype, device=device)

    return Drafts(
        input_ids=integers(MAX_VERIFY_TOKENS + 1),
        ids=integers(max_seq_len, torch.int32),
        last_slot=torch.zeros(rows or 1, dtype=torch.int64, device=device),
        verify_output=integers(2 + MAX_VERIFY_TOKENS),
    )


def begin(drafts: Drafts, prompt_ids: Tensor, max_new_tokens: int) -> None:
    """Set up for a request whose prompt [S] is known; nothing is drafted before its first step."""
    drafts.ids[: len(prompt_ids)].copy_(prompt_ids)
    drafts.input_ids.zero_()
    drafts.last_slot.fill_(len(prompt_ids) + max_new_tokens - 1)


def accept(chosen: Tensor, rows: RowBuffers, drafts: Drafts) -> None:
    """Take over what is right of `chosen` [R, S], the likeliest tokens after each of those fed.

    Sets the token, `done`, `verify_output`, and the places of the next step. A step of one token
    checks one draft too, so that it is known what longer ones would give."""
    size = chosen.shape[1]
    index = torch.arange(size, device=chosen.device)
    checked = max(size - 1, 1)
    right = chosen[:, :checked] == drafts.input_ids[:, 1 : checked + 1]
    num_matched = right.cumprod(1).sum(1)
    accepted = num_matched if size > 1 else torch.zeros_like(num_matched)
    stops = (chosen[:, :, None] == rows.stop_ids[:, None]).any(dim=2)
    first_stop = torch.where(stops, index, size).amin(1)
    count = torch.minimum(accepted, first_stop) + 1
    count = torch.minimum(count, drafts.last_slot - rows.slot)
    count = torch.where(rows.done, 0, count)
    ended = (first_stop < count) | (rows.slot + count == drafts.last_slot)
    # Beyond what is accepted lie slots that nobody looks at before they are written again.
    drafts.ids.scatter_(1, rows.slot[:, None] + 1 + index, chosen.to(drafts.ids.dtype))
    token = chosen.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
    rows.token.copy_(torch.where(count > 0, token, rows.token))
    taken = torch.where(index < count[:, None], chosen, rows.token[:, None])
    rows.seen.scatter_(1, taken, True)
    for moved in (rows.slot, rows.position, rows.step):
        moved.add_(count)
    rows.done.logical_or_(ended)
    output = torch.cat((count[:, None], num_matched[:, None], chosen), 1)
    drafts.verify_output[:, : 2 + size].copy_(output)


def draft(rows: RowBuffers, drafts: Drafts, kv_len: int) -> None:
    """Guess what follows `rows.token` and put it into `drafts.input_ids`.

    Where the text ends sooner than the drafts, what follows the match repeats; where nothing
    matches, the last token does.

    Args:
        kv_len: ids that are searched. Above `rows.slot`, but while a graph is captured: then the
            slot is anywhere in the cache, and what is drafted is of no use.
    """
    ids, slot = drafts.ids, rows.slot[:, None]
    searched = ids[:, :kv_len]
    kv_len = searched.shape[1]
    places = torch.arange(kv_len, device=ids.device)
    matches = places < slot
    length = torch.zeros_like(matches, dtype=torch.int64)
    for back in range(LONGEST_NGRAM):
        last = ids.gather(1, (slot - back).clamp(min=0))
        matches = matches & (searched.roll(back, 1) == last) & (places >= back)
        length += matches
    best = torch.where(length > 0, length * kv_len + places, -1).amax(1, keepdim=True)
    start = torch.where(best < 0, slot, best % kv_len + 1)
    ahead = torch.arange(MAX_VERIFY_TOKENS, device=ids.device)
    guessed = ids.gather(1, start + ahead % (slot + 1 - start))
    drafts.input_ids.copy_(torch.cat((rows.token[:, None], guessed.to(torch.int64)), 1))


def one_row(sampling: SamplingBuffers, drafts: Drafts) -> tuple[RowBuffers, Drafts]:
    """The buffers of one sequence as those of rows, in the same memory."""
    rows = RowBuffers(
        token=sampling.token,
        slot=sampling.slot,
        position=sampling.position,
        step=sampling.step,
        limit=sampling.step,
        done=sampling.done,
        stop_ids=sampling.stop_ids.t(),
        seen=sampling.seen[None],
        penalty=sampling.penalty,
    )
    return rows, Drafts(
        drafts.input_ids[None], drafts.ids[None], drafts.last_slot, drafts.verify_output[None]
    )
