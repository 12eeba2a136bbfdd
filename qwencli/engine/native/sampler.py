"""Chooses the next token on the device, without asking the host anything.

Every setting is a tensor, so one captured graph serves all settings of its kind, and the random
numbers of a request are drawn before it starts: one uniform per token, from a CPU generator, so
that a seed gives the same text in every cache mode and on every device with the same logits.
Settings are a row a sequence: rows of one step may differ in all of them.

The order is the one `generate()` of transformers applies: repetition penalty, temperature, top-k,
top-p, min-p, and one draw from what is left.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable, Sequence
from enum import StrEnum

import torch

from qwencli.config import SamplingParams
from qwencli.engine.device_memory import upload
from qwencli.engine.ops.next_tokens import Candidates, check_drafts, penalised

# `--top-k` ends at 200; a partial sort of this many candidates serves every top-k request.
TOP_K_CANDIDATES = 256
# How many of the likeliest tokens are told of at most, as in OpenAI's API.
MAX_LOGPROBS = 20


class SamplerKind(StrEnum):
    """What a graph must contain; a request needs the smallest kind that can express it.

    A step of kind LOGITS chooses nothing: what may be chosen is known later (`TokenMasks`).
    """

    LOGITS = "logits"
    ARGMAX = "argmax"
    GREEDY = "greedy"
    TOP_K = "top-k"
    FULL = "full"


LIKELIEST = (SamplerKind.ARGMAX, SamplerKind.GREEDY)


def kind_of(sampling: SamplingParams) -> SamplerKind:
    """The cheapest sampler that draws as `sampling` says."""
    if not sampling.do_sample:
        penalised = sampling.repetition_penalty != 1.0
        return SamplerKind.GREEDY if penalised else SamplerKind.ARGMAX
    return SamplerKind.TOP_K if 0 < sampling.top_k <= TOP_K_CANDIDATES else SamplerKind.FULL


def is_greedy(sampling: SamplingParams) -> bool:
    """Whether a token is the likeliest, and nothing else: what drafts can be held to."""
    return kind_of(sampling) is SamplerKind.ARGMAX


def widest_kind(kinds: Iterable[SamplerKind]) -> SamplerKind:
    """The smallest kind that can express requests of all of `kinds`."""
    return max(kinds, key=list(SamplerKind).index)


class TokenMasks:
    """Which tokens each of R rows may choose: bits, int32 [R, ceil(V/32)], the lowest first.

    `host` is written between two steps, all bits set where a row is free, and `sent` to the device.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        words = -(-vocab_size // 32)
        self.host = torch.full((rows, words), -1, dtype=torch.int32, pin_memory=cuda)
        self._device = torch.full_like(self.host, -1, device=device) if cuda else self.host
        # Masks go to the device beside the step whose logits they are for, not behind it.
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def sent(self, count: int) -> torch.Tensor:
        """The masks of the first `count` rows on the device, once what runs there is through.

        The step that used those before must be over: the host has read what it chose.
        """
        part = self._device[:count]
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                part.copy_(self.host[:count], non_blocking=True)
            torch.cuda.current_stream(part.device).wait_stream(self._stream)
        return part


class LogprobBuffers:
    """How likely the last tokens of R rows were, by the model alone, and the likeliest in their
    place: `logprobs` float32 [R, 1 + MAX_LOGPROBS], the first of which is the token's own, and
    `ids` int64 [R, MAX_LOGPROBS] of the others.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        count = min(MAX_LOGPROBS, vocab_size)
        self.logprobs = torch.zeros(rows, 1 + count, device=device)
        self.ids = torch.zeros(rows, count, dtype=torch.int64, device=device)

    def note(
        self, logits: torch.Tensor, chosen: torch.Tensor, places: torch.Tensor | None = None
    ) -> None:
        """Store log-probabilities of the tokens `chosen` [n] from `logits` [n, V], and of the
        likeliest ones, for the first rows or for those at `places` [n]."""
        scores = logits.float()
        total = scores.logsumexp(dim=-1, keepdim=True)
        top, ids = scores.topk(self.ids.shape[1], dim=-1)
        own = scores.gather(1, chosen[:, None])
        logprobs = torch.cat((own, top), dim=1) - total
        if places is None:
            self.logprobs[: len(ids)].copy_(logprobs)
            self.ids[: len(ids)].copy_(ids)
        else:
            self.logprobs.index_copy_(0, places, logprobs)
            self.ids.index_copy_(0, places, ids)

    def copied(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and ids of the first rows, on their way to the host."""
        cuda = self.ids.device.type == "cuda"
        logprobs, ids = (
            torch.empty(part.shape, dtype=part.dtype, pin_memory=cuda).copy_(
                part, non_blocking=cuda
            )
            for part in (self.logprobs[:count], self.ids[:count])
        )
        return logprobs, ids


def masked(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """`logits` [R, V] with minus infinity where the bits of `masks` [R, ceil(V/32)] are not set."""
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (masks.view(torch.uint8)[:, :, None] >> bits) & 1  # [R, ceil(V/32) * 4, 8]
    allowed = allowed.flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill(allowed == 0, float("-inf"))


class Sampler:
    """Sampling state of R sequences in fixed buffers, a row each.

    Args:
        vocab_size: V, rows of the output head.
        max_steps: most tokens one request may generate.
        rows: R.
        with_drafts: whether steps may check drafted tokens (`check`).

    `by_row`: tokens are drawn a row at a time, so that sums do not depend on how many there are.
    """

    by_row = False

    def __init__(
        self,
        vocab_size: int,
        max_steps: int,
        device: torch.device,
        rows: int = 1,
        with_drafts: bool = False,
    ) -> None:
        self.vocab_size = vocab_size
        # One table, so that rows that begin together are set up in one copy: [R, 6].
        self.settings = torch.zeros(rows, len(_SETTINGS), device=device)
        columns = self.settings.unbind(1)
        self.temperature, self.top_p, self.min_p, self.penalty, self.top_k, self.seeded = columns
        self.uniforms = torch.zeros(rows, max_steps, device=device)  # [R, max_steps]
        # Whether a draft of each step stays, and which one it is, by draws of their own.
        drafted = max_steps if with_drafts else 0
        self.accept_uniforms = torch.zeros(rows, drafted, device=device)
        self.draft_uniforms = torch.zeros(rows, drafted, device=device)
        self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)  # [R, V]

    def narrow(self, first: int, count: int) -> Sampler:
        """The same state of `count` rows from `first` on, in the same memory."""
        part = copy.copy(self)
        for name in _BY_ROW:
            setattr(part, name, getattr(self, name).narrow(0, first, count))
        return part

    def begin(self, sampling: SamplingParams, prompt_ids: torch.Tensor) -> None:
        """Set up the first row. `prompt_ids` [S] count as seen by the repetition penalty."""
        self.settings[0].copy_(self._settings(sampling))
        self._mark_seen(0, prompt_ids)
        self._set_uniforms(0, sampling)

    def begin_rows(
        self,
        rows: Sequence[int],
        samplings: Sequence[SamplingParams],
        prompt_ids: Sequence[torch.Tensor],
    ) -> None:
        """Set up some rows, each as `begin` does."""
        table = [self._settings(sampling) for sampling in samplings]
        (sent,) = upload([torch.stack(table)], self.settings.device)
        (places,) = upload([torch.tensor(rows)], self.settings.device)
        self.settings.index_copy_(0, places, sent)
        for row, sampling, ids in zip(rows, samplings, prompt_ids, strict=True):
            # Without a penalty it is read for nothing.
            if sampling.repetition_penalty != 1.0:
                self._mark_seen(row, ids)
            self._set_uniforms(row, sampling)

    def move(self, sources: torch.Tensor, places: torch.Tensor) -> None:
        """Copy rows `sources` (int64 on the device) to `places`, where nothing runs."""
        for name in ("settings", "seen", *_UNIFORMS):
            state = getattr(self, name)
            state.index_copy_(0, places, state.index_select(0, sources))

    def _settings(self, sampling: SamplingParams) -> torch.Tensor:
        top_k = sampling.top_k or self.vocab_size
        if not sampling.do_sample:
            # Beside rows that draw, a row that does not is one that has a single candidate.
            top_k = 1
        settings = (
            sampling.temperature if sampling.do_sample else 1.0,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            top_k,
            sampling.seed >= 0,
        )
        return torch.tensor(settings, dtype=torch.float32)

    def _mark_seen(self, row: int, prompt_ids: torch.Tensor) -> None:
        seen = self.seen[row]
        seen.zero_()
        seen[prompt_ids.clamp(max=self.vocab_size - 1)] = True

    def _set_uniforms(self, row: int, sampling: SamplingParams) -> None:
        if sampling.do_sample:
            seed = secrets.randbits(32) if sampling.seed < 0 else sampling.seed
            generator = torch.Generator().manual_seed(seed)
            tables = [self.uniforms]
            if self.accept_uniforms.shape[1]:
                # Behind the others, which are those of a request without drafts.
                tables += [self.accept_uniforms, self.draft_uniforms]
            drawn = [torch.rand(sampling.max_new_tokens, generator=generator) for _ in tables]
            for table, sent in zip(tables, upload(drawn, self.uniforms.device), strict=True):
                table[row, : len(sent)].copy_(sent)

    def sample(
        self,
        logits: torch.Tensor,
        step: torch.Tensor,
        kind: SamplerKind,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Choose from `logits` [R, V] the token of each row's `step` (int64 [R]) -> int64 [R].

        Args:
            masks: what each row may choose; see `masked`.
        """
        if masks is not None:
            logits = masked(logits, masks)
        if kind is SamplerKind.ARGMAX:
            return logits.argmax(dim=-1)
        scores = penalised(logits.float(), self.seen, self.penalty)
        if kind is SamplerKind.GREEDY:
            token = scores.argmax(dim=-1)
        else:
            token = self._draw_rows(scores, step, kind)
        self.seen.scatter_(1, token[:, None], True)
        return token

    def likeliest(
        self, logits: torch.Tensor, input_ids: torch.Tensor, kind: SamplerKind
    ) -> torch.Tensor:
        """The likeliest token after each of `input_ids` [S], from logits [S, V] -> int64 [S]. Of
        one row.

        Each of `input_ids` counts as seen from its own row on; none is remembered as seen.
        """
        if kind is SamplerKind.ARGMAX:
            return logits.argmax(dim=-1)
        seen = self.seen.repeat(len(input_ids), 1)
        for row in range(1, len(input_ids)):
            seen[row:].index_fill_(1, input_ids[row : row + 1], True)
        return penalised(logits.float(), seen, self.penalty).argmax(dim=-1)

    def check(
        self,
        logits: torch.Tensor,
        input_ids: torch.Tensor,
        step: torch.Tensor,
        kind: SamplerKind,
        proposal: Candidates | None,
    ) -> torch.Tensor:
        """The tokens behind each of S tokens fed to R rows, of which all but the first are drafts:
        int64 [R, S]. As `check_drafts`; the likeliest ones where nothing is drawn.

        Args:
            logits: [R * S, V]. input_ids: int64 [R, S]. step: int64 [R], of the first one.
            proposal: what drafts were drawn from, [R, S - 1, C]; None = nobody drew them.
        """
        rows, size = input_ids.shape
        if kind is SamplerKind.ARGMAX:
            return logits.argmax(dim=-1).view(rows, size)
        # Each draft counts as seen from its own place on.
        seen = self.seen[:, None].repeat(1, size, 1)
        for place in range(1, size):
            ids = input_ids[:, place, None, None].expand(rows, size - place, 1)
            seen[:, place:].scatter_(2, ids, True)
        spread = self._repeated(size)
        scores = penalised(logits.float(), seen.flatten(0, 1), spread.penalty)
        if kind is SamplerKind.GREEDY:
            return scores.argmax(dim=-1).view(rows, size)
        flat = spread._settled(spread.candidates(scores, kind), scores)
        target = Candidates(*(each.view(rows, size, -1) for each in (flat.ids, flat.weights)))
        at = step[:, None] + torch.arange(size, device=step.device)
        at = at.clamp(max=self.uniforms.shape[1] - 1)
        accept = self.accept_uniforms.gather(1, at[:, : size - 1])
        redraw = self.uniforms.gather(1, at)
        seeded = self.seeded > 0
        return check_drafts(
            target, input_ids[:, 1:], proposal, self.vocab_size, accept, redraw, seeded
        )

    def draw_draft(
        self, logits: torch.Tensor, drafts: Sequence[torch.Tensor], step: torch.Tensor
    ) -> tuple[torch.Tensor, Candidates]:
        """A draft of each row behind `drafts`, int64 [R] each, from `logits` [R, V], and what it
        was drawn from: at most `TOP_K_CANDIDATES` tokens, whatever the row may choose from.

        Args:
            step: int64 [R], of the first of the drafts.
        """
        seen = self.seen
        if drafts:
            seen = seen.scatter(1, torch.stack(tuple(drafts), 1), True)
        scores = penalised(logits.float(), seen, self.penalty)
        candidates = self._settled(self.candidates(scores, SamplerKind.TOP_K), scores)
        at = (step + len(drafts)).clamp(max=self.draft_uniforms.shape[1] - 1)
        own, plain = (
            table.gather(1, at[:, None]).squeeze(1)
            for table in (self.draft_uniforms, self.uniforms)
        )
        return candidates.draw(torch.where(self.seeded > 0, plain, own)), candidates

    def _repeated(self, count: int) -> Sampler:
        """The settings of each row so many times."""
        part = copy.copy(self)
        for name in _SETTINGS:
            setattr(part, name, getattr(self, name).repeat_interleave(count, 0))
        return part

    def candidates(self, scores: torch.Tensor, kind: SamplerKind) -> Candidates:
        """What each row may choose from by scores [R, V], and how likely it is to."""
        count = self.vocab_size
        if kind is SamplerKind.TOP_K:
            count = min(TOP_K_CANDIDATES, count)
        # Descending, [R, C].
        ranked, ids = torch.topk(scores / self.temperature[:, None], count)
        rank = torch.arange(count, device=scores.device)
        ranked = ranked.masked_fill(rank >= self.top_k[:, None], float("-inf"))
        probs = ranked.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        keep = (before < self.top_p[:, None]) & (probs >= self.min_p[:, None] * probs[:, :1])
        # The likeliest token always stays, also for --top-p 0; one that is forbidden never does.
        keep = (keep & (probs > 0)) | (rank == 0)
        return Candidates(ids, probs * keep)

    def _settled(self, candidates: Candidates, scores: torch.Tensor) -> Candidates:
        """With the one that a row takes alone, of equal scores, where it does not draw."""
        likeliest = scores.argmax(dim=-1, keepdim=True)
        ids = torch.where((self.top_k == 1)[:, None], likeliest, candidates.ids)
        return Candidates(ids, candidates.weights)

    def _draw_rows(
        self, scores: torch.Tensor, step: torch.Tensor, kind: SamplerKind
    ) -> torch.Tensor:
        if self.by_row:
            rows = [slice(row, row + 1) for row in range(len(scores))]
            drawn = [self.narrow(row.start, 1)._draw(scores[row], step[row], kind) for row in rows]
            token = torch.cat(drawn)
        else:
            token = self._draw(scores, step, kind)
            if len(self.top_k) == 1:
                return token
        # Of equal scores a row that does not draw takes the one it would take alone.
        return torch.where(self.top_k == 1, scores.argmax(dim=-1), token)

    def _draw(self, scores: torch.Tensor, step: torch.Tensor, kind: SamplerKind) -> torch.Tensor:
        uniforms = self.uniforms.gather(1, step[:, None]).squeeze(1)
        return self.candidates(scores, kind).draw(uniforms)


_SETTINGS = ("temperature", "top_p", "min_p", "penalty", "top_k", "seeded")
_UNIFORMS = ("uniforms", "accept_uniforms", "draft_uniforms")
_BY_ROW = ("settings", *_SETTINGS, *_UNIFORMS, "seen")
