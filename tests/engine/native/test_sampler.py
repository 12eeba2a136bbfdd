"""The on-device sampler against distributions worked out by hand."""

from __future__ import annotations

import pytest
import torch

from qwencli.config import SamplingParams
from qwencli.engine.native.sampler import Sampler, SamplerKind, kind_of, masked, widest_kind
from qwencli.engine.ops.next_tokens import penalised

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 4000
AT_A_TIME = 50


def draw(sampling: SamplingParams, logits=LOGITS, seen=(), draws=DRAWS, device="cpu"):
    """Frequencies of `draws` independent draws from the same logits, many of them at a time."""
    place = torch.device(device)
    alone = Sampler(len(logits), draws, place)
    params = SamplingParams(**{**vars(sampling), "max_new_tokens": draws})
    alone.begin(params, torch.tensor(seen, dtype=torch.int64, device=place))
    uniforms = alone.uniforms.view(-1, AT_A_TIME)
    sampler = Sampler(len(logits), len(uniforms), place, rows=AT_A_TIME)
    for name in ("settings", "seen"):
        getattr(sampler, name).copy_(getattr(alone, name).expand(AT_A_TIME, -1))
    sampler.uniforms.copy_(uniforms.t())
    counts = torch.zeros(len(logits))
    for step in range(len(uniforms)):
        before = sampler.seen.clone()
        steps = torch.full((AT_A_TIME,), step, device=place)
        tokens = sampler.sample(logits.to(place).expand(AT_A_TIME, -1), steps, kind_of(params))
        sampler.seen.copy_(before)
        counts += tokens.cpu().bincount(minlength=len(logits))
    return counts


def expected(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logits=LOGITS):
    """The distribution that transformers' warpers leave, in their order."""
    scores = logits / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    probs = scores.softmax(-1)
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(-1) - probs[order]
    keep = torch.zeros(len(logits), dtype=torch.bool)
    keep[order] = before < top_p
    keep &= probs >= min_p * probs.max()
    kept = probs * keep
    return kept / kept.sum()


# 99.9% points of chi-square for 1 to 5 degrees of freedom.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
]
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11}


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_distribution_is_the_one_transformers_leaves(settings):
    from transformers.generation import logits_process as warpers

    scores = LOGITS[None].clone()
    for name, warper in (
        ("temperature", warpers.TemperatureLogitsWarper),
        ("top_k", warpers.TopKLogitsWarper),
        ("top_p", warpers.TopPLogitsWarper),
        ("min_p", warpers.MinPLogitsWarper),
    ):
        if name in settings:
            scores = warper(settings[name])(None, scores)
    torch.testing.assert_close(expected(**settings), scores[0].softmax(-1))


def assert_follows_the_distribution(settings, device):
    counts = draw(SamplingParams(**{**NEUTRAL, **settings}), device=device)
    wanted = expected(**settings) * DRAWS
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    assert statistic < CHI_SQUARE[int(possible.sum()) - 1]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_distribution(settings):
    assert_follows_the_distribution(settings, "cpu")


def test_the_same_seed_draws_the_same_and_another_does_not():
    def tokens(seed):
        sampling = SamplingParams(top_k=0, top_p=1.0, seed=seed)
        return draw(sampling, draws=200).tolist()

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_the_likeliest_token_always_stays(narrow):
    open_filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}
    counts = draw(SamplingParams(**{**open_filters, **narrow}), draws=100)
    assert counts[0] == 100


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    sampler = Sampler(6, 4, torch.device("cpu"))
    sampler.begin(SamplingParams(do_sample=False, repetition_penalty=2.0), torch.tensor([0, 4]))
    found = penalised(LOGITS[None], sampler.seen, sampler.penalty)
    assert found.tolist() == [[1.0, 1.0, 0.5, 0.0, -2.0, -3.0]]


def test_a_chosen_token_counts_as_seen():
    sampler = Sampler(6, 4, torch.device("cpu"))
    sampler.begin(SamplingParams(do_sample=False, repetition_penalty=2.0), torch.tensor([5]))
    logits = torch.tensor([2.0, 1.9, 0.0, 0.0, 0.0, 0.0])
    step = torch.tensor([0])
    chosen = [int(sampler.sample(logits[None], step, SamplerKind.GREEDY)) for _ in range(2)]
    assert chosen == [0, 1]


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [
        (SamplingParams(do_sample=False, top_k=5), SamplerKind.ARGMAX),
        (SamplingParams(do_sample=False, repetition_penalty=1.1), SamplerKind.GREEDY),
        (SamplingParams(top_k=5), SamplerKind.TOP_K),
        (SamplingParams(top_k=0), SamplerKind.FULL),
    ],
)
def test_kind_is_the_smallest_that_can_express_the_request(sampling, kind):
    assert kind_of(sampling) is kind


def test_each_of_several_tokens_counts_as_seen_from_its_own_row_on():
    logits = torch.tensor([[5.0, 4.9, 4.8, 4.0]]).repeat(3, 1)
    sampler = Sampler(4, 8, torch.device("cpu"))
    sampler.begin(SamplingParams(do_sample=False, repetition_penalty=1.5), torch.tensor([3]))
    input_ids = torch.tensor([3, 0, 1])
    assert sampler.likeliest(logits, input_ids, SamplerKind.GREEDY).tolist() == [0, 1, 2]
    assert sampler.likeliest(logits, input_ids, SamplerKind.ARGMAX).tolist() == [0, 0, 0]
    assert sampler.seen.tolist() == [[False, False, False, True]]


def test_rows_with_different_settings_choose_what_each_would_choose_alone():
    generator = torch.Generator().manual_seed(3)
    settings = [
        SamplingParams(do_sample=False, max_new_tokens=8),
        SamplingParams(do_sample=False, repetition_penalty=1.5, max_new_tokens=8),
        SamplingParams(**{**NEUTRAL, "top_k": 3, "seed": 4, "max_new_tokens": 8}),
        SamplingParams(**{**NEUTRAL, "temperature": 1.7, "min_p": 0.1, "max_new_tokens": 8}),
    ]
    together = Sampler(12, 8, torch.device("cpu"), rows=len(settings))
    alone = [Sampler(12, 8, torch.device("cpu")) for _ in settings]
    prompt = torch.tensor([1, 5])
    together.begin_rows(range(len(settings)), settings, [prompt] * len(settings))
    for sampler, sampling in zip(alone, settings, strict=True):
        sampler.begin(sampling, prompt)
    kind = widest_kind(kind_of(sampling) for sampling in settings)
    assert kind is SamplerKind.FULL
    for step in range(8):
        logits = torch.randn(len(settings), 12, generator=generator)
        # Equal scores: what does not draw takes the first of them, as it does alone.
        logits[0, 3] = logits[0, 7] = 9.0
        at = torch.tensor([step])
        chosen = together.sample(logits, at.expand(len(settings)), kind).tolist()
        for row, (sampler, sampling) in enumerate(zip(alone, settings, strict=True)):
            assert chosen[row] == int(sampler.sample(logits[row : row + 1], at, kind_of(sampling)))
    assert torch.equal(together.narrow(1, 1).seen, alone[1].seen)


@pytest.mark.parametrize("vocab_size", [5, 32, 70])
def test_masks_forbid_what_their_bits_leave_out(vocab_size):
    torch.manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size)
    allowed = torch.rand(3, vocab_size) < 0.5
    words = -(-vocab_size // 32)
    bits = torch.zeros(3, words, dtype=torch.int64)
    for row, token in allowed.nonzero().tolist():
        bits[row, token // 32] |= 1 << (token % 32)
    packed = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    found = masked(logits, packed)
    assert torch.equal(found, torch.where(allowed, logits, -torch.inf))
    assert torch.equal(masked(logits, torch.full((3, words), -1, dtype=torch.int32)), logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5},
        {"top_k": 3, "top_p": 1.0},
        {"top_k": 0, "top_p": 1.0, "temperature": 2.0},
        {"top_k": 2, "top_p": 0.0},
    ],
)
def test_only_tokens_of_the_mask_are_chosen(settings):
    params = SamplingParams(**{"seed": 3, "max_new_tokens": 200, **settings})
    sampler = Sampler(len(LOGITS), 200, torch.device("cpu"))
    sampler.begin(params, torch.tensor([4]))
    # The last draw there can be: rounding must not carry it to what is forbidden.
    sampler.uniforms[:, 100:] = 1 - 2**-24
    masks = torch.tensor([[0b110000]], dtype=torch.int32)
    chosen = {
        int(sampler.sample(LOGITS[None], torch.tensor([step]), kind_of(params), masks))
        for step in range(200)
    }
    assert chosen <= {4, 5} and chosen
