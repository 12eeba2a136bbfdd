"""Chooses the next token on the device, without asking the host anything.

Every setting is a tensor, so one captured graph serves all settings of its kind, and the random
numbers of a request are drawn before it starts: one uniform per token, from a CPU generator, so
that a seed gives the same text in every cache mode and on every device with the same logits.

The order is the one `generate()` of transformers applies: repetition penalty, temperature, top-k,
top-p, min-p, and one draw from what is left.
"""

from __future__ import annotations

import secrets
from enum import StrEnum

import torch

from qwencli.config import SamplingParams
from qwencli.engine.native.upload import upload

# `--top-k` ends at 200; a partial sort of this many candidates serves every top-k request.
TOP_K_CANDIDATES = 256


class SamplerKind(StrEnum):
    """What a graph must contain; a request needs the smallest kind that can express it."""

    ARGMAX = "argmax"
    GREEDY = "greedy"
    TOP_K = "top-k"
    FULL = "full"


LIKELIEST = (SamplerKind.ARGMAX, SamplerKind.GREEDY)


def kind_of(sampling: SamplingParams) -> SamplerKind:
    if not sampling.do_sample:
        penalised = sampling.repetition_penalty != 1.0
        return SamplerKind.GREEDY if penalised else SamplerKind.ARGMAX
    return SamplerKind.TOP_K if 0 < sampling.top_k <= TOP_K_CANDIDATES else SamplerKind.FULL


class Sampler:
    """Sampling state of one sequence in fixed buffers.

    Args:
        vocab_size: V, rows of the output head.
        max_steps: most tokens one request may generate.
    """

    def __init__(self, vocab_size: int, max_steps: int, device: torch.device) -> None:
        def scalar(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.temperature = scalar(torch.float32)
        self.top_p = scalar(torch.float32)
        self.min_p = scalar(torch.float32)
        self.penalty = scalar(torch.float32)
        self.top_k = scalar(torch.int64)
        self.uniforms = torch.zeros(max_steps, device=device)  # [max_steps]
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # [V]
        self._true = torch.ones(1, dtype=torch.bool, device=device)

    def begin(self, sampling: SamplingParams, prompt_ids: torch.Tensor) -> None:
        """Set up for a request. `prompt_ids` [S] count as seen by the repetition penalty."""
        self.temperature.fill_(sampling.temperature)
        self.top_p.fill_(sampling.top_p)
        self.min_p.fill_(sampling.min_p)
        self.penalty.fill_(sampling.repetition_penalty)
        self.top_k.fill_(sampling.top_k or self.vocab_size)
        self.seen.zero_()
        self.seen[prompt_ids.clamp(max=self.vocab_size - 1)] = True
        if sampling.do_sample:
            seed = secrets.randbits(32) if sampling.seed < 0 else sampling.seed
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.rand(sampling.max_new_tokens, generator=generator)
            (sent,) = upload([drawn], self.uniforms.device)
            self.uniforms[: len(drawn)].copy_(sent)

    def sample(self, logits: torch.Tensor, step: torch.Tensor, kind: SamplerKind) -> torch.Tensor:
        """Choose from `logits` [V] the token of `step` (int64 [1]) -> int64 [1]."""
        if kind is SamplerKind.ARGMAX:
            return logits.argmax(dim=-1, keepdim=True)
        scores = self._penalised(logits.float(), self.seen)
        if kind is SamplerKind.GREEDY:
            token = scores.argmax(dim=-1, keepdim=True)
        else:
            token = self._draw(scores, step, kind)
        self.seen.index_copy_(0, token, self._true)
        return token

    def likeliest(self, logits: torch.Tensor, fed: torch.Tensor, kind: SamplerKind) -> torch.Tensor:
        """The likeliest token after each of `fed` [S], from logits [S, V] -> int64 [S].

        Each of `fed` counts as seen from its own row on; none is remembered as seen.
        """
        if kind is SamplerKind.ARGMAX:
            return logits.argmax(dim=-1)
        seen = self.seen.repeat(len(fed), 1)
        for row in range(1, len(fed)):
            seen[row:].index_fill_(1, fed[row : row + 1], True)
        return self._penalised(logits.float(), seen).argmax(dim=-1)

    def _penalised(self, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Scores of seen tokens divided by the penalty where positive, multiplied where negative
        (Keskar et al. 2019, CTRL, section 4.1, with the sign rule transformers uses)."""
        lowered = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen, lowered, scores)

    def _draw(self, scores: torch.Tensor, step: torch.Tensor, kind: SamplerKind) -> torch.Tensor:
        candidates = self.vocab_size
        if kind is SamplerKind.TOP_K:
            candidates = min(TOP_K_CANDIDATES, candidates)
        ranked, ids = torch.topk(scores / self.temperature, candidates)  # descending [C]
        rank = torch.arange(candidates, device=scores.device)
        ranked = ranked.masked_fill(rank >= self.top_k, float("-inf"))
        probs = ranked.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        keep = (before < self.top_p) & (probs >= self.min_p * probs[:1])
        # The likeliest token always stays, also for --top-p 0.
        keep = keep | (rank == 0)
        cumulative = (probs * keep).cumsum(dim=-1)
        target = self.uniforms.gather(0, step) * cumulative[-1:]
        # Rounding may leave the target at the very top; the last kept rank is the answer then.
        pick = (cumulative <= target).sum(dim=-1, keepdim=True)
        last_kept = keep.sum(dim=-1, keepdim=True) - 1
        return ids.gather(0, torch.minimum(pick, last_kept))
