"""The rows of a batch: what a step reads and writes of each, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from qwencli.engine.cache.paged_kv import SCRATCH_PAGE
from qwencli.engine.cache.recurrent_state import SCRATCH_SLOT
from qwencli.engine.device_memory import upload
from qwencli.engine.frontend.model_files import MAX_STOP_TOKENS
from qwencli.engine.native.sampler import (
    LogprobBuffers,
    Sampler,
    SamplerKind,
    TokenMasks,
    widest_kind,
)
from qwencli.engine.ops.decoder_ops import Drafts
from qwencli.engine.ops.next_tokens import RowBuffers
from qwencli.engine.runner_prompt import RunnerPrompt
from qwencli.engine.spec_decode import ngram
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS

Tensor = torch.Tensor


class RowState:
    """Buffers of R rows on the device.

    `token` is the last token chosen, `slot` its place in its sequence, `position` its rotary
    position, `step` how many tokens the row has chosen and `limit` how many it may, int64 [R] all;
    `done` [R] whether it is over. `stop_ids` int64 [R, MAX_STOP_TOKENS], -1 where unused. `tables`
    int32 [R, pages]: the pages of each row. `states` int64 [R]: the slots of what they keep beside
    those, where the model keeps states.

    Args:
        with_drafts: whether steps may check drafted tokens too.
    """

    def __init__(
        self,
        rows: int,
        pages: int,
        vocab_size: int,
        max_steps: int,
        device: torch.device,
        with_drafts: bool = False,
    ) -> None:
        def column() -> Tensor:
            return torch.zeros(rows, dtype=torch.int64, device=device)

        self.token, self.slot, self.position, self.step, self.limit = (column() for _ in range(5))
        self.states = torch.full((rows,), SCRATCH_SLOT, dtype=torch.int64, device=device)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.stop_ids = torch.full((rows, MAX_STOP_TOKENS), -1, dtype=torch.int64, device=device)
        self.tables = torch.full((rows, pages), SCRATCH_PAGE, dtype=torch.int32, device=device)
        self.sampler = Sampler(vocab_size, max_steps, device, rows, with_drafts)
        self.drafts: Drafts | None = None
        if with_drafts:
            # Those that were wrong are written behind the last token too.
            self.drafts = ngram.empty_drafts(max_steps + 1 + MAX_VERIFY_TOKENS, device, rows)
        self._masks: TokenMasks | None = None
        self._logprobs: LogprobBuffers | None = None
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def masks(self) -> TokenMasks:
        """What rows may choose where some are held to a schema; made when it is first asked for."""
        if self._masks is None:
            rows, vocab_size = self.sampler.seen.shape
            self._masks = TokenMasks(rows, vocab_size, self.slot.device)
        return self._masks

    @property
    def logprobs(self) -> LogprobBuffers:
        """How likely the rows' last tokens were; made when it is first asked for."""
        if self._logprobs is None:
            rows, vocab_size = self.sampler.seen.shape
            self._logprobs = LogprobBuffers(rows, vocab_size, self.slot.device)
        return self._logprobs

    def begin(
        self,
        rows: Sequence[int],
        prompts: Sequence[RunnerPrompt],
        pages: Sequence[Sequence[int]],
        states: Sequence[int],
        ids: Sequence[Tensor],
    ) -> Tensor:
        """Set up rows whose prompts were just run; returns them on the device.

        Args:
            states: slots of what they keep beside pages.
            ids: each prompt's tokens, on the device where there is a repetition penalty.
        """
        table = torch.full((len(rows), 5 + MAX_STOP_TOKENS), -1)
        width = max(len(each) for each in pages)
        page_table = torch.full((len(rows), width), SCRATCH_PAGE)
        for line, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            limit = prompt.sampling.max_new_tokens
            own = [row, len(prompt.ids), prompt.next_position, limit, states[line]]
            table[line, :5] = torch.tensor(own)
            table[line, 5 : 5 + len(prompt.stop_ids)] = torch.tensor(prompt.stop_ids)
            page_table[line, : len(pages[line])] = torch.tensor(pages[line])
        sent, sent_pages = upload([table, page_table], self.slot.device)
        places, slot, position, limits, kept = sent[:, :5].unbind(1)
        self.slot.index_copy_(0, places, slot)
        self.position.index_copy_(0, places, position)
        self.limit.index_copy_(0, places, limits)
        self.states.index_copy_(0, places, kept)
        self.step.index_fill_(0, places, 0)
        self.stop_ids.index_copy_(0, places, sent[:, 5:])
        self.tables.index_fill_(0, places, SCRATCH_PAGE)
        self.tables[:, :width].index_copy_(0, places, sent_pages.to(torch.int32))
        self.sampler.begin_rows(rows, [prompt.sampling for prompt in prompts], ids)
        if self.drafts is not None:
            self.drafts.last_slot.index_copy_(0, places, slot + limits - 1)
            for row, text in zip(
                rows, upload([prompt.ids for prompt in prompts], self.slot.device), strict=True
            ):
                self.drafts.ids[row, : len(text)].copy_(text)
        return places

    def sample_first(
        self, logits: Tensor, rows: Sequence[int], places: Tensor, kinds: Sequence[SamplerKind]
    ) -> None:
        """Choose the first tokens of rows from the prompts' logits [n, V]."""
        if widest_kind(kinds) is SamplerKind.ARGMAX:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = torch.cat(
                [
                    self.sampler.narrow(row, 1).sample(
                        logits[line : line + 1], self.step[row : row + 1], kinds[line]
                    )
                    for line, row in enumerate(rows)
                ]
            )
        self.token.index_copy_(0, places, chosen)
        ended = (chosen[:, None] == self.stop_ids.index_select(0, places)).any(dim=1)
        self.step.index_fill_(0, places, 1)
        self.done.index_copy_(0, places, ended | (self.limit.index_select(0, places) <= 1))
        self.remember(self.max_rows)

    @property
    def max_rows(self) -> int:
        return len(self.token)

    def remember(self, count: int) -> None:
        """Add the last tokens of the first rows to the texts that drafts come from, if any do."""
        if self.drafts is not None:
            token, drafts = self.token[:count, None], self.narrow_drafts(count)
            drafts.ids.scatter_(1, self.slot[:count, None], token.to(torch.int32))
            drafts.input_ids[:, :1].copy_(token)

    def narrow_drafts(self, count: int) -> Drafts:
        """The drafts of the first rows, in the same memory."""
        assert self.drafts is not None, "the engine made room for them"
        return Drafts(*(getattr(self.drafts, each.name)[:count] for each in fields(self.drafts)))

    def hold(self, rows: Sequence[int]) -> None:
        """Keep rows where they are until `resume`: they are run beside others, and must not choose
        a token yet."""
        (places,) = upload([torch.tensor(rows)], self.slot.device)
        self._held = places, self.done.index_select(0, places)
        self.done.index_fill_(0, places, True)

    def resume(self) -> None:
        if self._held is not None:
            self.done.index_copy_(0, *self._held)
            self._held = None

    def release(self, rows: Sequence[int]) -> None:
        """Make rows harmless whose pages belong to others from now on."""
        (places,) = upload([torch.tensor(rows)], self.slot.device)
        self.tables.index_fill_(0, places, SCRATCH_PAGE)
        self.states.index_fill_(0, places, SCRATCH_SLOT)
        self.slot.index_fill_(0, places, 0)
        self.position.index_fill_(0, places, 0)
        self.done.index_fill_(0, places, True)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows to others, (from, to)."""
        sources, places = upload(
            [torch.tensor(side) for side in zip(*moves, strict=True)], self.slot.device
        )
        for state in (
            self.token,
            self.slot,
            self.position,
            self.step,
            self.limit,
            self.done,
            self.stop_ids,
            self.tables,
            self.states,
        ):
            state.index_copy_(0, places, state.index_select(0, sources))
        self.sampler.move(sources, places)
        if self.drafts is not None:
            for each in fields(self.drafts):
                state = getattr(self.drafts, each.name)
                state.index_copy_(0, places, state.index_select(0, sources))

    def buffers(self, count: int) -> RowBuffers:
        """What the end of a step reads and writes of the first rows, in the same memory."""
        return RowBuffers(
            token=self.token[:count],
            slot=self.slot[:count],
            position=self.position[:count],
            step=self.step[:count],
            limit=self.limit[:count],
            done=self.done[:count],
            stop_ids=self.stop_ids[:count],
            seen=self.sampler.seen[:count],
            penalty=self.sampler.penalty[:count],
        )
