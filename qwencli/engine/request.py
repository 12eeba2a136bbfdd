"""What the scheduler knows of a request: its lengths, its row and its pages; and what a step is.

No tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from qwencli.errors import QwenCliError
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationChunk

RequestId = int
# One token of a prompt: its id, or a picture's digest and the place inside the picture.
Key = int | tuple[bytes, int]
# A request, or what makes one: pictures are then opened when it is its turn, and not held before.
# Raises what is wrong with it.
RequestSource = GenerationRequest | Callable[[], GenerationRequest]


def request_of(source: RequestSource) -> GenerationRequest:
    """The request, made now if it is still to be made; raises what is wrong with it."""
    return source if isinstance(source, GenerationRequest) else source()


@dataclass(frozen=True)
class StepOutput:
    """What one step gave one request: a piece of its answer, or the error that ended it.

    A request is over with the output that carries a result or an error; none follows.
    """

    request: RequestId
    chunk: GenerationChunk | None = None
    error: QwenCliError | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or (self.chunk is not None and self.chunk.result is not None)


@dataclass(eq=False)
class Sequence:
    """One request as it is scheduled.

    Args:
        num_prompt_tokens, max_new_tokens: at least 1 each.
        row: its place in the decode state, and `pages` its part of the KV pool, by page of its
            tokens; none while it waits. state: the slot of what it keeps beside them, where the
            model keeps states.
        keys: of the prompt's tokens, where it shares them with others; see `prefix_cache.Key`.
        page_keys: of the whole pages of its tokens, see `prefix_cache.page_keys`.
        keep_at: after how many of its tokens its state is kept for others that begin alike; 0 = it
            is not.
        num_cached: prompt tokens that another sequence had computed, in pages that it shares.
        num_computed: prompt tokens whose keys and values are in the pool, or on the way there.
        num_scheduled: new tokens that steps were scheduled for, one a step until it is known that a
            step gave more.
        num_ahead: by how many more than those it may be ahead: drafts of steps that are not read.
        large_visuals: places of the first token, and behind the last one, of pictures and videos
            that are encoded over several steps, and which of the prompt's they are; those that are
            done are taken out.
        alone: whether its prompt runs in steps of its own, since one of several failed.
        reserved: tokens of its answer that come in a later round (see `response`), for which it
            has pages as well.
        goes_on: whether it is a later round, whose prompt's beginning only its own pages have.
        constrained: what it may choose next depends on the token before, which the host must have
            read: its first token is read before it takes a second one.
    """

    request: RequestId
    num_prompt_tokens: int
    max_new_tokens: int
    page_keys: list[bytes] = field(default_factory=list)
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    state: int | None = None
    keep_at: int = 0
    num_cached: int = 0
    num_computed: int = 0
    num_scheduled: int = 0
    num_ahead: int = 0
    large_visuals: list[tuple[int, int, int]] = field(default_factory=list)
    alone: bool = False
    reserved: int = 0
    goes_on: bool = False
    constrained: bool = False
    keys: SequenceOf[Key] = ()

    @property
    def max_tokens(self) -> int:
        """Slots that prompt and answer take together; the last token is never fed."""
        return self.num_prompt_tokens + self.max_new_tokens + self.reserved - 1

    def visual_before(self, stop: int) -> int | None:
        """Which large picture has to be encoded before the next tokens up to `stop` can run."""
        for first, end, index in self.large_visuals:
            if end > self.num_computed:
                return index if first < stop else None
        return None

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed == self.num_prompt_tokens


@dataclass(frozen=True)
class PromptChunk:
    """Tokens `start` to `stop` of a prompt, run in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.sequence.num_prompt_tokens


@dataclass(frozen=True)
class Limits:
    """What one step may hold.

    Args:
        max_rows: sequences that run at once.
        max_prefill_tokens: prompt tokens of one step.
        max_prompts: prompts of one step.
        context_worth: tokens in front of a prompt token that cost as much to attend to as all else
            about it: late parts of a long prompt are shorter. None = they are not.
        powers_of_two: whether equal prompts that start beside running rows are a power of two:
            such passes come again, and are graphs.
        unstreamed_prefill_tokens: prompt tokens of one step while nobody reads along; None = no
            more than else.
        unstreamed_prompts: how many there must be room for then before any start; but no more than
            an eighth of those that run, or could, and than a step holds.
    """

    max_rows: int
    max_prefill_tokens: int
    max_prompts: int
    context_worth: int | None = None
    powers_of_two: bool = False
    unstreamed_prefill_tokens: int | None = None
    unstreamed_prompts: int = 1

    @property
    def most_prefill_tokens(self) -> int:
        """Prompt tokens of any step."""
        return max(self.max_prefill_tokens, self.unstreamed_prefill_tokens or 0)

    def tokens_within(self, start: int, left: float) -> int:
        """How many tokens from place `start` on are worth no more than `left` at a prompt's
        beginning; one at least where anything is left."""
        worth = self.context_worth
        if worth is None or left <= 0:
            return max(0, int(left))
        # n + n (start + n / 2) / worth = left
        before = worth + start
        return max(1, int(math.sqrt(before**2 + 2 * worth * left) - before))

    def cost(self, start: int, stop: int) -> float:
        """What these tokens are worth, see `tokens_within`."""
        count = stop - start
        if self.context_worth is None:
            return count
        return count * (1 + (start + stop) / 2 / self.context_worth)


@dataclass(frozen=True)
class Batch:
    """The work of one step.

    Args:
        encode: whose large picture runs through some more of the vision tower; beside it no
            prompts run.
        moves: rows that change their place first of all, (from, to).
        prefill: prompts, or parts of them; the last part of one gives its first token.
        decode: sequences that take one more token afterwards, those just prefilled among them.
        released: rows that must forget what they ran before, after the moves.
        restored: states that sequences go on from, (from, to), before anything runs. kept: states
            that are kept for others, likewise, once the prompts have run.
    """

    moves: tuple[tuple[int, int], ...]
    prefill: tuple[PromptChunk, ...]
    decode: tuple[Sequence, ...]
    released: tuple[int, ...]
    encode: Sequence | None = None
    restored: tuple[tuple[int, int], ...] = ()
    kept: tuple[tuple[int, int], ...] = ()
