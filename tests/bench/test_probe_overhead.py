from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.probe_overhead import (
    STRETCH,
    Pair,
    drain_in_turns,
    overhead_percent,
    pairs,
)
from tests.bench.test_token_probe import tokens


class Spy:
    def __init__(self):
        self.calls = []

    def note(self):
        self.calls.append("note")

    def resume(self):
        self.calls.append("resume")


def test_every_other_stretch_is_watched():
    spy = Spy()
    drain_in_turns(spy, tokens(4 * STRETCH))
    one = ["resume", *["note"] * STRETCH]
    assert spy.calls == [*one, *one]


@given(bare=st.floats(0.5, 50), added=st.floats(0, 0.2), drift=st.floats(-1e-3, 1e-3))
def test_an_added_cost_is_found_whatever_grows_with_the_context(bare, added, drift):
    def itl(token):
        watched = token // STRETCH % 2 == 1
        return bare * (1 + drift * token) * (1 + added * watched)

    found = overhead_percent(pairs([itl(token) for token in range(16 * STRETCH - 1)]))
    assert found.estimate == pytest.approx(100 * added, abs=0.02)


def test_too_few_pairs_give_no_figure():
    assert pairs([1.0] * 3 * STRETCH) == [Pair(1.0, 1.0)]
    assert overhead_percent([Pair(1.0, 1.0)] * 2) is None
