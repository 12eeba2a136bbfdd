"""How many tokens a step checks, as drafts turn out right or wrong and steps cost more or less."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.engine.native.speculation import RECENT, TIMED_STEPS, Sizes, StepCosts

SIZES = (1, 2, 4, 8)


def run(
    sizes: Sizes, chance: float, cost: dict[int, float], steps: int, seed: int = 1, ahead: int = 1
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
        hits = 0
        while hits < checked and generator.random() < chance:
            hits += 1
        tokens = 1 + hits if size > 1 else 1
        sizes.learn(size, hits, tokens, cost[size])
        taken.append(size)
    return taken


def test_the_first_steps_of_an_engine_are_plain_and_give_the_measure() -> None:
    costs = StepCosts()
    cost = dict.fromkeys(SIZES, 1.0)
    assert run(Sizes(SIZES, True, costs), 1.0, cost, 12)[:TIMED_STEPS] == [1] * TIMED_STEPS
    assert run(Sizes(SIZES, True, costs), 1.0, cost, 12)[-1] == 8
    assert run(Sizes((1, 4), False, StepCosts()), 0.0, cost, 12) == [1] * TIMED_STEPS + [4] * 4


def test_text_that_never_repeats_gets_plain_steps() -> None:
    cost = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.6}
    sizes = Sizes(SIZES, True, StepCosts())
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
    sizes = Sizes(SIZES, True, costs)
    assert [sizes.next() for _ in range(8)] == [1] * 8
    assert 8 in run(sizes, 1.0, cost, 8)


def test_a_draft_that_is_right_now_and_then_costs_next_to_nothing() -> None:
    """With eight steps on their way, from an engine's first request on. What 4B steps cost."""
    cost = {1: 1.0, 2: 1.25, 4: 1.41, 8: 1.5}
    costs = StepCosts()
    for seed in range(40):
        sizes = Sizes(SIZES, True, costs)
        run(sizes, 0.03, cost, 256, seed, ahead=8)
        gain = sizes.result().net_gain
        assert gain is not None and gain > 0.99
    sizes = Sizes(SIZES, True, costs)
    run(sizes, 0.8, cost, 256, ahead=8)
    assert (sizes.result().net_gain or 0) > 2


def test_text_that_begins_to_repeat_is_noticed_and_given_up_again() -> None:
    cost = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.6}
    sizes = Sizes(SIZES, True, StepCosts())
    run(sizes, 0.0, cost, 100)
    assert 8 in run(sizes, 1.0, cost, 30)
    assert run(sizes, 0.0, cost, 60)[-1] == 1


def test_what_steps_cost_is_measured_where_the_text_is_now() -> None:
    """Else a long text's longer steps are held against a short one's plain steps."""
    costs = StepCosts()
    for _ in range(RECENT):
        costs.add(1, 1.0)
    taken = run(Sizes(SIZES, True, costs), 0.5, {1: 2.0, 2: 2.1, 4: 2.2, 8: 3.2}, 400)
    assert sum(size > 1 for size in taken[100:]) > 150


@given(st.floats(0, 1), st.tuples(*[st.floats(0, 3)] * 3), st.integers(0, 99))
def test_speculation_costs_little_where_it_does_not_pay(
    chance: float, more: tuple[float, float, float], seed: int
) -> None:
    """However steps cost and drafts turn out, tokens a second stay near those of plain steps once
    it is known what steps cost."""
    cost = {1: 1.0, 2: 1 + more[0], 4: 1 + sum(more[:2]), 8: 1 + sum(more)}
    costs = StepCosts()
    run(Sizes(SIZES, True, costs), 1.0, cost, 100)
    sizes = Sizes(SIZES, True, costs)
    run(sizes, chance, cost, 600, seed)
    gain = sizes.result().net_gain
    assert gain is not None and gain > 0.9


@pytest.mark.parametrize(("size", "hits", "taken"), [(4, 3, 4), (4, 0, 1), (1, 1, 1)])
def test_what_is_counted(size: int, hits: int, taken: int) -> None:
    sizes = Sizes(SIZES, True, StepCosts())
    sizes.learn(1, 0, 1, 2.0)
    sizes.learn(size, hits, taken, 2.0)
    result = sizes.result()
    assert (result.num_drafted, result.num_accepted) == (size - 1, taken - 1)
    assert result.net_gain == pytest.approx((1 + taken) / 2)
    assert (result.accept_percent is None) == (size == 1)
