"""How many tokens a step checks, as drafts turn out right or wrong and steps cost more or less."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.engine.native.generate import MAX_INFLIGHT_STEPS
from qwencli.engine.spec_decode.policy import (
    BUDGET,
    BUDGET_A_TOKEN,
    RECENT,
    TIMED_STEPS,
    Acceptance,
    BatchDraftPolicy,
    DraftLengthPolicy,
    StepCosts,
)

SIZES = (1, 2, 4, 8)


def run(
    sizes: DraftLengthPolicy,
    chance: float,
    cost: dict[int, float],
    steps: int,
    seed: int = 1,
    ahead: int = 1,
) -> list[int]:
    """Sizes taken by steps whose drafts are right with `chance`, `ahead` of them on their way."""
    generator = random.Random(seed)
    taken: list[int] = []
    unread: deque[int] = deque()
    for _ in range(steps):
        while len(unread) < ahead:
            unread.append(sizes.next())
        size = unread.popleft()
        checked = max(size - 1, 1)
        num_matched = 0
        while num_matched < checked and generator.random() < chance:
            num_matched += 1
        tokens = 1 + num_matched if size > 1 else 1
        sizes.learn(size, num_matched, tokens, cost[size])
        taken.append(size)
    return taken


def test_the_first_steps_of_an_engine_are_plain_and_give_the_measure() -> None:
    costs = StepCosts()
    cost = dict.fromkeys(SIZES, 1.0)
    assert (
        run(DraftLengthPolicy(SIZES, True, costs), 1.0, cost, 12)[:TIMED_STEPS] == [1] * TIMED_STEPS
    )
    assert run(DraftLengthPolicy(SIZES, True, costs), 1.0, cost, 12)[-1] == 8
    assert (
        run(DraftLengthPolicy((1, 4), False, StepCosts()), 0.0, cost, 12)
        == [1] * TIMED_STEPS + [4] * 4
    )


def test_text_that_never_repeats_gets_plain_steps() -> None:
    cost = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.6}
    sizes = DraftLengthPolicy(SIZES, True, StepCosts())
    taken = run(sizes, 0.0, cost, 400)
    assert taken[100:] == [1] * 300
    gain = sizes.result().net_gain
    assert gain is not None and gain > 0.95


def test_a_request_begins_plain_until_drafts_have_been_right() -> None:
    """The host is steps ahead of the first outcome: what those would lose is lost every time."""
    cost = {1: 1.0, 2: 1.18, 4: 1.21, 8: 1.24}
    costs = StepCosts()
    for size in SIZES:
        for _ in range(TIMED_STEPS):
            costs.add(size, cost[size])
    sizes = DraftLengthPolicy(SIZES, True, costs)
    assert [sizes.next() for _ in range(8)] == [1] * 8
    assert 8 in run(sizes, 1.0, cost, 8)


def answer(text: list[int], cost: dict[int, float], costs: StepCosts | None = None) -> float:
    """How many times as fast as plain steps an answer is whose drafts at each token are right so
    many times in a row. Eight steps are on their way beyond the one that is read."""
    if costs is None:
        costs = StepCosts()
        for size in SIZES:
            for _ in range(TIMED_STEPS):
                costs.add(size, cost[size])
    sizes = DraftLengthPolicy(SIZES, True, costs)
    unread: deque[int] = deque()
    at, seconds = 0, 0.0
    while at < len(text):
        while len(unread) <= MAX_INFLIGHT_STEPS:
            unread.append(sizes.next())
        size = unread.popleft()
        num_matched = min(text[at], max(size - 1, 1))
        taken = min(1 + num_matched if size > 1 else 1, len(text) - at)
        sizes.learn(size, num_matched, taken, cost[size])
        at, seconds = at + taken, seconds + cost[size]
    return len(text) / seconds


def copied(tokens: int, then: int) -> list[int]:
    """A stretch that repeats earlier text, and one that does not."""
    return [min(tokens - 1 - index, 7) for index in range(tokens)] + [0] * then


# What steps of a 4B model take on an H200, in that of one token: bf16, 8bit and 4bit.
MEASURED = [
    {1: 1.0, 2: 1.18, 4: 1.21, 8: 1.24},
    {1: 1.0, 2: 1.38, 4: 1.41, 8: 1.46},
    {1: 1.0, 2: 1.5, 4: 1.59, 8: 1.64},
]


@pytest.mark.parametrize("cost", MEASURED)
def test_a_repeat_that_ends_before_its_steps_are_read_costs_next_to_nothing(
    cost: dict[int, float],
) -> None:
    """An H200 met this text: one token 14 times, in 256 that never repeat. And worse ones."""
    assert answer([0] * 160 + copied(14, 82), cost) > 0.99
    assert answer(copied(14, 50) * 10, cost) > 0.99
    assert answer([0] * 256, cost) == 1


@pytest.mark.parametrize("cost", MEASURED)
def test_a_repeat_that_goes_on_is_worth_it(cost: dict[int, float]) -> None:
    assert answer([7] * 512, cost) > 0.8 * 8 / cost[8]
    assert answer(copied(100, 10) * 4, cost) > 2


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=12),
    st.tuples(*[st.floats(0, 2)] * 3),
)
def test_what_is_lost_at_most(
    stretches: list[tuple[int, int]], more: tuple[float, float, float]
) -> None:
    """Whatever repeats and whatever steps cost."""
    cost = {1: 1.0, 2: 1 + more[0], 4: 1 + sum(more[:2]), 8: 1 + sum(more)}
    text = [right for tokens, then in stretches for right in copied(tokens, then)]
    plain = len(text)
    most = plain * (1 + BUDGET_A_TOKEN) + BUDGET
    assert plain / answer(text, cost) <= most + 1e-6


def test_one_slow_step_is_not_taken_for_what_steps_cost() -> None:
    """The first of a size may be: then text that repeats is drafted for all the same."""
    costs = StepCosts()
    for _ in range(TIMED_STEPS):
        costs.add(1, 1.0)
    sizes = DraftLengthPolicy(SIZES, True, costs)
    taken = []
    for _ in range(120):
        size = sizes.next()
        first = size > 1 and not any(other > 1 for other in taken)
        if first:
            sizes.learn(size, 0, 1, 20.0)
        else:
            sizes.learn(size, max(size - 1, 1), size, 1.0 if size == 1 else 1.3)
        taken.append(size)
    assert sum(size > 1 for size in taken) > 20


def test_costs_that_are_not_known_yet_lose_little() -> None:
    """An engine's first requests, of drafts that are right now and then."""
    generator = random.Random(2)
    costs = StepCosts()
    for _ in range(6):
        text = [generator.choices(range(4), (94, 3, 2, 1))[0] for _ in range(256)]
        assert answer(text, MEASURED[1], costs) > 0.99


def test_text_that_begins_to_repeat_is_noticed_and_given_up_again() -> None:
    cost = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.6}
    sizes = DraftLengthPolicy(SIZES, True, StepCosts())
    run(sizes, 0.0, cost, 100)
    assert 8 in run(sizes, 1.0, cost, 30)
    assert run(sizes, 0.0, cost, 60)[-1] == 1


def test_what_steps_cost_is_measured_where_the_text_is_now() -> None:
    """Else a long text's longer steps are held against a short one's plain steps."""
    costs = StepCosts()
    for _ in range(RECENT):
        costs.add(1, 1.0)
    taken = run(DraftLengthPolicy(SIZES, True, costs), 0.5, {1: 2.0, 2: 2.1, 4: 2.2, 8: 3.2}, 400)
    assert sum(size > 1 for size in taken[100:]) > 150


@given(st.floats(0, 1), st.tuples(*[st.floats(0, 3)] * 3), st.integers(0, 99))
def test_speculation_costs_little_where_it_does_not_pay(
    chance: float, more: tuple[float, float, float], seed: int
) -> None:
    """However steps cost and drafts turn out, tokens a second stay near those of plain steps once
    it is known what steps cost."""
    cost = {1: 1.0, 2: 1 + more[0], 4: 1 + sum(more[:2]), 8: 1 + sum(more)}
    costs = StepCosts()
    run(DraftLengthPolicy(SIZES, True, costs), 1.0, cost, 100)
    sizes = DraftLengthPolicy(SIZES, True, costs)
    run(sizes, chance, cost, 600, seed)
    gain = sizes.result().net_gain
    assert gain is not None and gain > 0.9


@pytest.mark.parametrize(("size", "num_matched", "taken"), [(4, 3, 4), (4, 0, 1), (1, 1, 1)])
def test_what_is_counted(size: int, num_matched: int, taken: int) -> None:
    sizes = DraftLengthPolicy((1, 4), False, StepCosts())
    sizes.learn(1, 0, 1, 2.0)
    sizes.learn(size, num_matched, taken, 2.0)
    result = sizes.result()
    assert (result.num_drafted, result.num_accepted) == (size - 1, taken - 1)
    assert result.net_gain == pytest.approx((1 + taken) / 2)
    assert (result.accept_percent is None) == (size == 1)


def run_rows(chance: float, rows: int, tokens: int, cost: float, looks: bool) -> float:
    """How much faster than plain steps rows are whose drafts are right with this chance, where each
    token that a step checks takes so much of a plain step's time; steps are read one late."""
    policy = BatchDraftPolicy(SIZES, adaptive=True, looks=looks)
    texts = [policy.new_text() for _ in range(rows)]
    draws = random.Random(rows)
    unread: list[tuple[int, list[int]]] = []
    given = seconds = 0.0
    while given < tokens:
        size = policy.next(rows, texts) or 1
        right = [next((n for n in range(size - 1 or 1) if draws.random() >= chance), size - 1 or 1)
                 for _ in texts]  # fmt: skip
        unread.append((size, right))
        seconds += 1 + cost * (size - 1)
        given += sum(min(n, size - 1) + 1 for n in right) / rows
        if len(unread) > 1:
            size, right = unread.pop(0)
            for text, matched in zip(texts, right, strict=True):
                text.learn(size, matched)
            mean = sum(min(n, size - 1) + 1 for n in right) / rows
            policy.learn(rows, size, mean, 1 + cost * (size - 1))
    return given / seconds


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("cost", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("looks", [True, False], ids=["text", "head"])
def test_rows_win_where_drafts_are_right_and_never_lose_a_hundredth(
    rows, chance, cost, looks
) -> None:
    gain = run_rows(chance, rows, 2000, cost, looks)
    assert gain > 0.99
    assert gain > 1.5 or not (chance == 0.9 and cost <= 0.1)


def test_many_rows_are_not_even_drafted_for() -> None:
    policy = BatchDraftPolicy(SIZES, adaptive=True)
    assert [policy.next(rows, [Acceptance()]) for rows in (1, 16, 17, 256)] == [1, 1, 0, 0]
