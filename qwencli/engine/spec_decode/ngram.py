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

Tensor = torch.Tensor

# Tokens of a step at most: one that is known, and the drafts.
MAX_VERIFY_TOKENS = 1 + int(Speculate.SEVEN)
# Tokens at the end that are looked for; the longest match counts, and of those the last.
LONGEST_NGRAM = 3


def empty_drafts(max_seq_len: int, device: torch.device) -> Drafts:
    def integers(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return Drafts(
        input_ids=integers(MAX_VERIFY_TOKENS + 1),
        ids=integers(max_seq_len, torch.int32),
        last_slot=integers(1),
        verify_output=integers(2 + MAX_VERIFY_TOKENS),
    )


def begin(drafts: Drafts, prompt_ids: Tensor, max_new_tokens: int) -> None:
    """Set up for a request whose prompt [S] is known; nothing is drafted before its first step."""
    drafts.ids[: len(prompt_ids)].copy_(prompt_ids)
    drafts.input_ids.zero_()
    drafts.last_slot.fill_(len(prompt_ids) + max_new_tokens - 1)


def accept(chosen: Tensor, sampling: SamplingBuffers, drafts: Drafts) -> None:
    """Take over what is right of `chosen` [S], the likeliest tokens after each of those fed.

    Sets the token, `done`, `verify_output`, and the places of the next step. A step of one token
    checks one draft too, so that it is known what longer ones would give."""
    size = len(chosen)
    index = torch.arange(size, device=chosen.device)
    checked = max(size - 1, 1)
    num_matched = (
        (chosen[:checked] == drafts.input_ids[1 : checked + 1]).cumprod(0).sum(0, keepdim=True)
    )
    accepted = num_matched if size > 1 else torch.zeros_like(num_matched)
    stops = (chosen == sampling.stop_ids).any(dim=0)
    first_stop = torch.where(stops, index, size).amin(0, keepdim=True)
    count = torch.minimum(accepted, first_stop) + 1
    count = torch.minimum(count, drafts.last_slot - sampling.slot)
    count = torch.where(sampling.done, 0, count)
    ended = (first_stop < count) | (sampling.slot + count == drafts.last_slot)
    # Beyond what is accepted lie slots that nobody looks at before they are written again.
    drafts.ids.index_copy_(0, sampling.slot + 1 + index, chosen.to(drafts.ids.dtype))
    token = chosen.gather(0, (count - 1).clamp(min=0))
    sampling.token.copy_(torch.where(count > 0, token, sampling.token))
    sampling.seen.index_fill_(0, torch.where(index < count, chosen, sampling.token), True)
    for moved in (sampling.slot, sampling.position, sampling.step):
        moved.add_(count)
    sampling.done.logical_or_(ended)
    drafts.verify_output[: 2 + size].copy_(torch.cat((count, num_matched, chosen)))


def draft(sampling: SamplingBuffers, drafts: Drafts, kv_len: int) -> None:
    """Guess what follows `sampling.token` and put it into `drafts.input_ids`.

    Where the text ends sooner than the drafts, what follows the match repeats; where nothing
    matches, the last token does.

    Args:
        kv_len: ids that are searched. Above `sampling.slot`, but while a graph is captured: then
            the slot is anywhere in the cache, and what is drafted is of no use.
    """
    ids, slot = drafts.ids, sampling.slot
    searched = ids[:kv_len]
    places = torch.arange(kv_len, device=ids.device)
    matches = places < slot
    length = torch.zeros_like(places)
    for back in range(LONGEST_NGRAM):
        last = ids.gather(0, (slot - back).clamp(min=0))
        matches = matches & (searched.roll(back) == last) & (places >= back)
        length += matches
    best = torch.where(length > 0, length * kv_len + places, -1).amax(0, keepdim=True)
    start = torch.where(best < 0, slot, best % kv_len + 1)
    ahead = torch.arange(MAX_VERIFY_TOKENS, device=ids.device)
    guessed = ids.gather(0, start + ahead % (slot + 1 - start))
    drafts.input_ids.copy_(torch.cat((sampling.token, guessed.to(torch.int64))))
