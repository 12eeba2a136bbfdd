"""Checked drafts: what is chosen is distributed as without, and equal where nothing is drawn.

Each test runs tens of thousands of rows once, from fixed seeds, and compares counts of pairs of
tokens with what the sampler's own distribution gives, by chi-square.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwencli.config import SamplingParams
from qwencli.engine.native.sampler import Sampler, SamplerKind, kind_of
from qwencli.engine.ops.next_tokens import Candidates, penalised

CPU = torch.device("cpu")
VOCAB = 7
ROWS = 20_000
# Of 1e-5: fixed seeds stay on one side of it.
CHI_SQUARE_TAIL = 1e-5

Tensor = torch.Tensor


def tables(seed: int, peaked: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits [V, V] by the token in front, of a model and of one that drafts somewhat like it."""
    generator = torch.Generator().manual_seed(seed)
    model = peaked * torch.randn(VOCAB, VOCAB, generator=generator)
    return model, model + 0.8 * torch.randn(VOCAB, VOCAB, generator=generator)


def sampler_of(rows: int, **settings: Any) -> Sampler:
    """Settings of one request in all rows, each with draws of its own."""
    sampling = SamplingParams(**{"do_sample": True, "max_new_tokens": 4, "seed": -1, **settings})
    sampler = Sampler(VOCAB, 4, CPU, rows, with_drafts=True)
    sampler.begin(sampling, torch.tensor([2]))
    sampler.settings.copy_(sampler.settings[:1].expand(rows, -1))
    sampler.seen.copy_(sampler.seen[:1].expand(rows, -1))
    generator = torch.Generator().manual_seed(5)
    for name in ("uniforms", "accept_uniforms", "draft_uniforms"):
        getattr(sampler, name).uniform_(generator=generator)
    return sampler


def exact_pairs(model: Tensor, first: int, **settings: Any) -> Tensor:
    """Chances [V, V] of the next two tokens behind `first`, as plain steps draw them."""
    one = sampler_of(VOCAB, **settings)
    kind = SamplerKind.FULL
    front = dense(one.narrow(0, 1), model[first][None], one.seen[:1], kind)[0]
    seen = one.seen | torch.eye(VOCAB, dtype=torch.bool)
    return front[:, None] * dense(one, model, seen, kind)


def dense(sampler: Sampler, logits: Tensor, seen: Tensor, kind: SamplerKind) -> Tensor:
    found = sampler.candidates(penalised(logits, seen, sampler.penalty), kind)
    return torch.zeros(len(logits), VOCAB).scatter_(1, found.ids, found.probs)


def fits(counts: Tensor, odds: Tensor) -> bool:
    expected = odds * counts.sum()
    assert not counts[expected == 0].any(), "a pair that cannot be was chosen"
    possible = expected > 0
    left = (counts[possible] - expected[possible]) ** 2 / expected[possible]
    freedom = torch.tensor(float(possible.sum() - 1))
    return bool(torch.special.gammaincc(freedom / 2, left.sum() / 2) > CHI_SQUARE_TAIL)


def chosen_pairs(sampler: Sampler, kind: SamplerKind, drafter: Tensor | None, model: Tensor):
    """The first two tokens of each row behind token 2, the second by a plain step where the first
    draft did not stay; and how many drafts stayed."""
    rows = len(sampler.seen)
    fed = [torch.full((rows,), 2)]
    step = torch.zeros(rows, dtype=torch.int64)
    found: list[Candidates] = []
    for _ in range(2):
        if drafter is None:
            fed.append((fed[-1] * 3 + 1) % VOCAB)
            continue
        token, candidates = sampler.draw_draft(drafter[fed[-1]], fed[1:], step)
        fed.append(token)
        found.append(candidates)
    input_ids = torch.stack(fed, 1)
    proposal = None
    if found:
        proposal = Candidates(
            torch.stack([each.ids for each in found], 1),
            torch.stack([each.weights for each in found], 1),
        )
    chosen = sampler.check(model[input_ids].flatten(0, 1), input_ids, step, kind, proposal)
    one = chosen[:, 0]
    sampler.seen.scatter_(1, one[:, None], True)
    alone = sampler.sample(model[one], step + 1, kind)
    stayed = one == input_ids[:, 1]
    two = torch.where(stayed, chosen[:, 1], alone)
    both = stayed & (two == input_ids[:, 2])
    return one, two, float(stayed.float().mean()), float(both.float().mean())


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 4},
    {"temperature": 1.3, "top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.6},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("looked_up", [False, True])
def test_tokens_are_distributed_as_without_drafts(
    settings: dict[str, Any], looked_up: bool
) -> None:
    model, drafter = tables(seed=3)
    sampler = sampler_of(ROWS, **settings)
    kind = kind_of(SamplingParams(**{"do_sample": True, "max_new_tokens": 4, **settings}))
    one, two, stayed, _ = chosen_pairs(sampler, kind, None if looked_up else drafter, model)
    counts = torch.bincount(one * VOCAB + two, minlength=VOCAB**2).float().view(VOCAB, VOCAB)
    odds = exact_pairs(model, 2, **settings)
    assert fits(counts, odds)
    assert not fits(counts, exact_pairs(drafter, 2, **settings) * 0.5 + odds * 0.5)
    # As often as theory says: what both have in common, or what the model gives the guess.
    plain = sampler_of(1, **settings)
    of_model, of_drafter = (
        dense(plain, each[2][None], plain.seen, kind)[0] for each in (model, drafter)
    )
    expected = of_model[(2 * 3 + 1) % VOCAB]
    if not looked_up:
        expected = torch.minimum(of_model, of_drafter).sum()
    assert stayed == pytest.approx(float(expected), abs=0.015)


@pytest.mark.parametrize("looked_up", [False, True])
def test_tokens_of_a_seed_are_those_of_plain_steps(looked_up: bool) -> None:
    """And drafts drawn from the same numbers stay as often as most others would."""
    model, drafter = tables(seed=3)
    sampler = sampler_of(20_000, seed=9, top_p=0.9)
    kind, zero = SamplerKind.FULL, torch.zeros(20_000, dtype=torch.int64)
    plain = [sampler.sample(model[2].expand(20_000, -1), zero, kind)]
    plain.append(sampler.sample(model[plain[0]], zero + 1, kind))
    sampler.seen.zero_()
    one, two, stayed, _ = chosen_pairs(sampler, kind, None if looked_up else drafter, model)
    assert torch.equal(one, plain[0]) and torch.equal(two, plain[1])
    alone = sampler_of(1, seed=9, top_p=0.9)
    odds = [dense(alone, each[2][None], alone.seen, kind)[0] for each in (model, drafter)]
    common = float(torch.minimum(*odds).sum())
    assert looked_up or stayed > 0.75 * common


@pytest.mark.parametrize("seed", [-1, 3])
def test_a_drafter_that_is_the_model_is_always_right(seed: int) -> None:
    model, _ = tables(seed=8)
    sampler = sampler_of(5000, seed=seed)
    _, _, stayed, both = chosen_pairs(sampler, SamplerKind.TOP_K, model, model)
    assert stayed == both == 1.0


def test_without_drafts_the_same_tokens_are_drawn_as_by_plain_steps() -> None:
    model, _ = tables(seed=4)
    sampler, step = sampler_of(4000, temperature=1.2, top_k=5), torch.ones(4000, dtype=torch.int64)
    fed = torch.randint(0, VOCAB, (4000, 1), generator=torch.Generator().manual_seed(1))
    logits = model[fed[:, 0]]
    checked = sampler.check(logits, fed, step, SamplerKind.TOP_K, None)
    assert torch.equal(checked[:, 0], sampler.sample(logits, step, SamplerKind.TOP_K))
    again = sampler.check(logits, fed, step, SamplerKind.TOP_K, None)
    assert torch.equal(again, checked)


@pytest.mark.parametrize("kind", [SamplerKind.ARGMAX, SamplerKind.GREEDY, SamplerKind.TOP_K])
def test_rows_that_do_not_draw_take_the_likeliest_token(kind: SamplerKind) -> None:
    """Whatever the others need: with a penalty and without, and of equal scores the first."""
    model, drafter = tables(seed=6)
    model = model.round()
    penalty = 1.0 if kind is SamplerKind.ARGMAX else 1.7
    sampler = sampler_of(VOCAB, do_sample=False, repetition_penalty=penalty)
    fed = torch.stack((torch.arange(VOCAB), (torch.arange(VOCAB) * 5 + 2) % VOCAB), 1)
    logits = model[fed].flatten(0, 1)
    step = torch.zeros(VOCAB, dtype=torch.int64)
    token, candidates = sampler.draw_draft(drafter[fed[:, 0]], (), step)
    expected = penalised(drafter[fed[:, 0]], sampler.seen, sampler.penalty).argmax(-1)
    assert torch.equal(token, expected) and torch.equal(candidates.probs[:, 0], torch.ones(VOCAB))
    proposal = Candidates(candidates.ids[:, None], candidates.weights[:, None])
    fed[:, 1] = torch.where(torch.arange(VOCAB) % 2 == 0, token, fed[:, 1])
    logits = model[fed].flatten(0, 1)
    chosen = sampler.check(logits, fed, step, kind, proposal)
    front = penalised(model[fed[:, 0]], sampler.seen, sampler.penalty).argmax(-1)
    assert torch.equal(chosen[:, 0], front)
    seen = sampler.seen.scatter(1, fed[:, 1:], True)
    behind = penalised(model[fed[:, 1]], seen, sampler.penalty).argmax(-1)
    assert torch.equal(chosen[:, 1], behind)
