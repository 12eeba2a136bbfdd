from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.bench.measure.probe_overhead import (
    RUNS,
    STRETCH,
    Pair,
    drain_in_turns,
    overhead_percent,
    pairs,
)
from tests.bench.measure.test_host_probe import tokens


class Spy:
    def __init__(self):
        self.calls = []

    def note(self):
        self.calls.append("note")

    def resume(self):
        self.calls.append("resume")


def test_every_other_stretch_is_watched():
    spy = Spy()
    drain_in_turns(spy, tokens(4 * STRETCH), 1)
    one = ["resume", *["note"] * STRETCH]
    assert spy.calls == [*one, *one]
    other = Spy()
    drain_in_turns(other, tokens(4 * STRETCH), 2)
    assert other.calls == [*["note"] * STRETCH, *one, "resume"]


@settings(max_examples=20)
@given(bare=st.floats(0.5, 50), added=st.floats(0, 0.2), drift=st.floats(-1e-3, 1e-3))
def test_an_added_cost_is_found_whatever_grows_with_the_context(bare, added, drift):
    def itl(token, run):
        watched = (token // STRETCH + run // 2) % 2 == 1
        return bare * (1 + drift * token) * (1 + added * watched)

    found = overhead_percent(
        pair
        for run in range(1, RUNS + 1)
        for pair in pairs([itl(token, run) for token in range(16 * STRETCH - 1)], run)
    )
    assert found.estimate == pytest.approx(100 * added, abs=0.02)


def test_odd_and_even_stretches_that_are_not_alike_cancel_out():
    def itl(token):
        return 1.0 + 0.05 * (token // STRETCH % 2)

    each = [pairs([itl(token) for token in range(17 * STRETCH)], run) for run in range(1, RUNS + 1)]
    assert each[0][0].itl_probe_on_ms > each[0][0].itl_probe_off_ms
    assert each[1][0].itl_probe_on_ms < each[1][0].itl_probe_off_ms
    assert abs(overhead_percent(pair for found in each for pair in found).estimate) < 1e-6


def test_too_few_pairs_give_no_figure():
    assert pairs([1.0] * 3 * STRETCH, 1) == [Pair(1, 0, 1.0, 1.0)]
    assert overhead_percent([Pair(1, 0, 1.0, 1.0)] * 9) is None
